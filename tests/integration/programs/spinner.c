/* SPDX-License-Identifier: GPL-2.0-only
 *
 * N threads that look at the clock all the time, and so notice how long they were stopped.
 *
 *   spinner N
 *   reset  -> ok               report -> G0 G1 ...   (each thread's largest gap since the reset, in ns)
 *   sites 5 -> 10005           (calls sites(5): 10,000 instructions of 4 bytes, at sites + 4 * i, each adds 1)
 *   feature 3 -> feature(3)
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <time.h>

#include "feature.h"

long sites(long n);
__asm__(".text\n"
	".globl sites\n"
	".type sites, @function\n"
	"	.p2align 12\n" /* the same number of pages in every build */
	"sites:\n"
	"	.cfi_startproc\n"
	"	.rept 10000\n"
	"	leaq 1(%rdi), %rdi\n"
	"	.endr\n"
	"	movq %rdi, %rax\n"
	"	ret\n"
	"	.cfi_endproc\n"
	"	.size sites, . - sites\n"
	"	.p2align 12\n");

#define MOST 256
static _Atomic uint64_t largest[MOST][8]; /* a cache line each */
static atomic_uint epoch, seen[MOST];

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void *spin(void *argument)
{
	long self = (long)argument;
	uint64_t before = now(), most = 0;
	unsigned mine = 0;

	for (;;) {
		uint64_t after = now();
		if (after - before > most) {
			most = after - before;
			atomic_store_explicit(&largest[self][0], most, memory_order_relaxed);
		}
		before = after;
		unsigned current = atomic_load_explicit(&epoch, memory_order_acquire);
		if (current != mine) {
			mine = current;
			most = 0;
			atomic_store_explicit(&largest[self][0], 0, memory_order_relaxed);
			atomic_store_explicit(&seen[self], mine, memory_order_release);
			before = now();
		}
	}
	return NULL;
}

int main(int argc, char **argv)
{
	int threads = argc > 1 ? atoi(argv[1]) : 1;
	char word[32];
	long number;

	if (threads < 1 || threads > MOST)
		return 2;
	for (long i = 0; i < threads; i++) {
		pthread_t thread;
		if (pthread_create(&thread, NULL, spin, (void *)i) != 0)
			fail("pthread_create");
	}
	say_ready();
	while (next_line(word, &number)) {
		if (strcmp(word, "reset") == 0) {
			unsigned wanted = atomic_fetch_add(&epoch, 1) + 1;
			for (int i = 0; i < threads; i++)
				while (atomic_load_explicit(&seen[i], memory_order_acquire) != wanted)
					sched_yield();
			puts("ok");
		} else if (strcmp(word, "report") == 0) {
			for (int i = 0; i < threads; i++)
				printf("%s%lu", i ? " " : "", (unsigned long)largest[i][0]);
			putchar('\n');
		} else if (strcmp(word, "sites") == 0) {
			printf("%ld\n", sites(number));
		} else if (strcmp(word, "feature") == 0) {
			printf("%ld\n", feature(number));
		} else {
			puts("?");
		}
	}
	return 0;
}
