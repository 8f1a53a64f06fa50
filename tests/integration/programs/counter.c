/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Calls functions on request, and has N threads call work() in tight loops meanwhile.
 *
 *   counter [N]
 *   feature 3 -> feature(3)      other 3 -> other(3)      work 3 -> work(3)
 *   report    -> calls C wrong W denied D      (of the threads)
 */
#define _GNU_SOURCE
#include <pthread.h>

#include "feature.h"

NOIPA long other(long n)
{
	return n * 5 + 2;
}

/* A loop, a branch and a call, to have something to patch anywhere. */
NOIPA long work(long n)
{
	unsigned long hash = 14695981039346656037ul;

	for (long i = 0; i < 16; i++) {
		hash = (hash ^ (unsigned long)(n + i)) * 1099511628211ul;
		if (hash & 1)
			hash += (unsigned long)other(i);
	}
	return (long)(hash >> 1);
}

#define INPUTS 64
static long expected[INPUTS];
static atomic_long calls, wrong, refused;

static void *worker(void *unused)
{
	(void)unused;
	for (long i = 0;; i++) {
		long result = work(i % INPUTS);
		atomic_fetch_add_explicit(&calls, 1, memory_order_relaxed);
		if (result == DENIED)
			atomic_fetch_add_explicit(&refused, 1, memory_order_relaxed);
		else if (result != expected[i % INPUTS])
			atomic_fetch_add_explicit(&wrong, 1, memory_order_relaxed);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	int threads = argc > 1 ? atoi(argv[1]) : 0;
	char word[32];
	long number;

	for (long i = 0; i < INPUTS; i++)
		expected[i] = work(i);
	for (int i = 0; i < threads; i++) {
		pthread_t thread;
		if (pthread_create(&thread, NULL, worker, NULL) != 0)
			fail("pthread_create");
	}
	say_ready();
	while (next_line(word, &number)) {
		if (strcmp(word, "feature") == 0)
			printf("%ld\n", feature(number));
		else if (strcmp(word, "other") == 0)
			printf("%ld\n", other(number));
		else if (strcmp(word, "work") == 0)
			printf("%ld\n", work(number));
		else if (strcmp(word, "report") == 0)
			printf("calls %ld wrong %ld denied %ld\n", calls, wrong, refused);
		else
			puts("?");
	}
	return 0;
}
