/* SPDX-License-Identifier: GPL-2.0-only
 *
 * N threads: one spins on the clock and so notices how long it was stopped, the others wait and work in turns, as the
 * threads of servers do. The sites are never executed.
 *
 *   observer CONTROL N main|other OBSERVER_CPU OTHERS_CPU
 *
 * main: the main thread spins. other: the main thread waits in read(), another one spins.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "clock.h"
#include "control.h"
#include "sites.h"

static struct control *control;
static int observer_cpu, others_cpu;

static void run_on(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set) != 0)
		perror("sched_setaffinity");
}

static void *observe(void *unused)
{
	(void)unused;
	run_on(observer_cpu);
	control->sites = (uint64_t)sites;
	control->thread = (uint64_t)gettid();
	uint64_t before = now();
	struct switches counted = switches();
	for (;;) {
		uint64_t after = now();
		int late = count_gap(control, after - before, &counted, 0);
		before = starts_anew(control, &counted) || late ? now() : after;
	}
	return NULL;
}

static volatile unsigned long result;

static void work(void)
{
	for (int i = 0; i < 2000; i++)
		result = result * 31 + (unsigned long)i;
}

/* A third of the threads each in a futex, in epoll_wait and in nanosleep, 10 ms at a time. */
static void *serve(void *argument)
{
	long self = (long)argument;
	int events = epoll_create1(EPOLL_CLOEXEC);
	pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
	pthread_cond_t condition = PTHREAD_COND_INITIALIZER;

	run_on(others_cpu);
	for (;;) {
		struct timespec until, pause = { 0, 10000000 };
		struct epoll_event event;
		switch (self % 3) {
		case 0:
			clock_gettime(CLOCK_REALTIME, &until);
			until.tv_nsec += 10000000;
			until.tv_sec += until.tv_nsec / 1000000000;
			until.tv_nsec %= 1000000000;
			pthread_mutex_lock(&mutex);
			pthread_cond_timedwait(&condition, &mutex, &until);
			pthread_mutex_unlock(&mutex);
			break;
		case 1:
			epoll_wait(events, &event, 1, 10);
			break;
		default:
			nanosleep(&pause, NULL);
		}
		work();
	}
	return NULL;
}

static void start(void *(*run)(void *), long argument)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, run, (void *)argument) != 0)
		exit(99);
}

int main(int argc, char **argv)
{
	if (argc != 6)
		return 2;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	control = map_control(argv[1]);
	int threads = atoi(argv[2]);
	int main_observes = strcmp(argv[3], "main") == 0;
	observer_cpu = atoi(argv[4]);
	others_cpu = atoi(argv[5]);

	for (long i = main_observes ? 1 : 2; i < threads; i++)
		start(serve, i);
	if (main_observes)
		observe(NULL);
	start(observe, 0);
	run_on(others_cpu);
	char byte;
	while (read(STDIN_FILENO, &byte, 1) > 0)
		;
	return 0;
}
