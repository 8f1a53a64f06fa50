/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Threads that block every signal and make threads all the time, which inherit that, call feature() and end.
 *
 *   creators [N]         N threads that make threads, 2 unless told
 *   feature 3 -> feature(3)
 *   report    -> right R denied D wrong W
 *   masks     -> 1 if the creating threads block SIGTRAP, all of them; 0 if none; else -1
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>

#include "feature.h"

#define MOST 64
static struct tally tally;
static atomic_int blocks[MOST];

static void *short_lived(void *argument)
{
	long n = (long)argument;

	count(&tally, n, feature(n));
	return NULL;
}

static void *create(void *argument)
{
	long self = (long)argument;
	sigset_t all, now;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, NULL);
	for (long i = 0;; i++) {
		pthread_t thread;
		pthread_sigmask(SIG_SETMASK, NULL, &now);
		blocks[self] = sigismember(&now, SIGTRAP);
		if (pthread_create(&thread, NULL, short_lived, (void *)(i % 8)) != 0)
			fail("pthread_create");
		if (pthread_join(thread, NULL) != 0)
			fail("pthread_join");
	}
	return NULL;
}

int main(int argc, char **argv)
{
	int creators = argc > 1 ? atoi(argv[1]) : 2;
	char word[32];
	long number;

	for (long i = 0; i < creators; i++) {
		pthread_t thread;
		if (pthread_create(&thread, NULL, create, (void *)i) != 0)
			fail("pthread_create");
	}
	say_ready();
	while (next_line(word, &number)) {
		if (strcmp(word, "feature") == 0) {
			printf("%ld\n", feature(number));
		} else if (strcmp(word, "report") == 0) {
			printf("right %ld denied %ld wrong %ld\n", tally.right, tally.denied, tally.wrong);
		} else if (strcmp(word, "masks") == 0) {
			int blocked = 0;
			for (int i = 0; i < creators; i++)
				blocked += blocks[i];
			printf("%d\n", blocked == creators ? 1 : blocked == 0 ? 0 : -1);
		} else {
			puts("?");
		}
	}
	return 0;
}
