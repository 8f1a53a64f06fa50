/* SPDX-License-Identifier: GPL-2.0-only
 *
 * N threads that call feature(), as often as they are told or all the time, and check what they get.
 *
 *   callers N
 *   each 1000  -> right R denied D wrong W    (each thread calls that often; the results of these calls)
 *   start      -> ok                          (each thread calls all the time, until: stop)
 *   report     -> right R denied D wrong W    (since the last start)
 *   stop       -> right R denied D wrong W
 *   feature 3  -> feature(3)
 */
#define _GNU_SOURCE
#include <limits.h>
#include <pthread.h>

#include "feature.h"

static struct tally tally;
static long wanted;
static atomic_bool stopping;
static pthread_barrier_t begin, end;

static void *call(void *unused)
{
	for (;;) {
		pthread_barrier_wait(&begin);
		for (long i = 0; i < wanted && !stopping; i++)
			count(&tally, i % 8, feature(i % 8));
		pthread_barrier_wait(&end);
	}
	return unused;
}

static void say(void)
{
	printf("right %ld denied %ld wrong %ld\n", tally.right, tally.denied, tally.wrong);
}

static void let_go(long calls)
{
	tally.right = tally.denied = tally.wrong = 0;
	wanted = calls;
	stopping = false;
	pthread_barrier_wait(&begin);
}

int main(int argc, char **argv)
{
	unsigned threads = argc > 1 ? (unsigned)atoi(argv[1]) : 1;
	char word[32];
	long number;

	pthread_barrier_init(&begin, NULL, threads + 1);
	pthread_barrier_init(&end, NULL, threads + 1);
	for (unsigned i = 0; i < threads; i++) {
		pthread_t thread;
		if (pthread_create(&thread, NULL, call, NULL) != 0)
			fail("pthread_create");
	}
	say_ready();
	while (next_line(word, &number)) {
		if (strcmp(word, "each") == 0) {
			let_go(number);
			pthread_barrier_wait(&end);
			say();
		} else if (strcmp(word, "start") == 0) {
			let_go(LONG_MAX);
			puts("ok");
		} else if (strcmp(word, "report") == 0) {
			say();
		} else if (strcmp(word, "stop") == 0) {
			stopping = true;
			pthread_barrier_wait(&end);
			say();
		} else if (strcmp(word, "feature") == 0) {
			printf("%ld\n", feature(number));
		} else {
			puts("?");
		}
	}
	return 0;
}
