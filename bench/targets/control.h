/* SPDX-License-Identifier: GPL-2.0-only
 *
 * A page shared with the benchmark: a thread that measures answers there, without a system call and while it measures.
 */
#ifndef CONTROL_H
#define CONTROL_H

#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

/* An interruption of less than this, in ns, is a timer's or a cache's. */
#define NOTABLE 10000u

/* Read by bench/control.py. */
struct control {
	_Atomic uint64_t asked;	     /* raised by the benchmark: odd: measure anew, even: rest */
	_Atomic uint64_t answered;   /* follows it */
	_Atomic uint64_t largest;    /* the largest gap since then, in ns, but for those of preemption alone */
	_Atomic uint64_t any;	     /* the largest gap of all */
	_Atomic uint64_t stopped;    /* the largest gap in which the thread was stopped */
	_Atomic uint64_t lost;	     /* the sum of all NOTABLE gaps, but for those of preemption alone */
	_Atomic uint64_t preempted;  /* how many gaps there were of preemption alone */
	_Atomic uint64_t thread;     /* the tid of who measures */
	_Atomic uint64_t sites;	     /* the address of the first site */
};

/* Of the thread that measures. A ptrace stop is a voluntary switch, making way for another process is not. */
struct switches {
	long voluntary, involuntary;
};

static inline struct switches switches(void)
{
	struct rusage usage;

	getrusage(RUSAGE_THREAD, &usage);
	return (struct switches){ usage.ru_nvcsw, usage.ru_nivcsw };
}

static inline struct control *map_control(const char *path)
{
	int file = open(path, O_RDWR | O_CLOEXEC);
	void *page = file < 0 ? MAP_FAILED : mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);

	if (page == MAP_FAILED) {
		perror(path);
		exit(99);
	}
	return page;
}

/* Rests while the benchmark wants that. Whether it wants to measure anew; then all is zero. */
static inline int starts_anew(struct control *control, struct switches *before)
{
	uint64_t asked = atomic_load_explicit(&control->asked, memory_order_acquire);

	if (asked == atomic_load_explicit(&control->answered, memory_order_relaxed))
		return 0;
	while (asked % 2 == 0) {
		atomic_store_explicit(&control->answered, asked, memory_order_release);
		usleep(500);
		asked = atomic_load_explicit(&control->asked, memory_order_acquire);
	}
	control->largest = control->any = control->stopped = control->lost = control->preempted = 0;
	*before = switches();
	atomic_store_explicit(&control->answered, asked, memory_order_release);
	return 1;
}

/* Whether it took time to count. */
static inline int count_gap(struct control *control, uint64_t gap, struct switches *before, int always_waits)
{
	if (gap > atomic_load_explicit(&control->any, memory_order_relaxed))
		atomic_store_explicit(&control->any, gap, memory_order_relaxed);
	if (gap < NOTABLE) {
		if (gap > atomic_load_explicit(&control->largest, memory_order_relaxed))
			atomic_store_explicit(&control->largest, gap, memory_order_relaxed);
		return 0;
	}
	struct switches after = switches();
	if (!always_waits && after.involuntary > before->involuntary && after.voluntary == before->voluntary) {
		control->preempted += 1;
	} else {
		if (gap > control->largest)
			control->largest = gap;
		if (gap > control->stopped && after.voluntary > before->voluntary)
			control->stopped = gap;
		control->lost += gap;
	}
	*before = after;
	return 1;
}

#endif
