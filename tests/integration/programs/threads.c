/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Creates and joins threads all the time; each calls feature() and ends.
 *
 *   threads [N]          N threads that create such threads, 2 unless told
 *   feature 3 -> feature(3)
 *   report    -> threads T right R denied D wrong W
 */
#define _GNU_SOURCE
#include <pthread.h>

#include "feature.h"

static struct tally tally;
static atomic_long created;

static void *short_lived(void *argument)
{
	long n = (long)argument;

	count(&tally, n, feature(n));
	return NULL;
}

static void *create(void *unused)
{
	(void)unused;
	for (long i = 0;; i++) {
		pthread_t thread;
		if (pthread_create(&thread, NULL, short_lived, (void *)(i % 100)) != 0)
			fail("pthread_create");
		atomic_fetch_add(&created, 1);
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

	for (int i = 0; i < creators; i++) {
		pthread_t thread;
		if (pthread_create(&thread, NULL, create, NULL) != 0)
			fail("pthread_create");
	}
	say_ready();
	while (next_line(word, &number)) {
		if (strcmp(word, "feature") == 0)
			printf("%ld\n", feature(number));
		else if (strcmp(word, "report") == 0)
			printf("threads %ld right %ld denied %ld wrong %ld\n", created, tally.right, tally.denied,
			       tally.wrong);
		else
			puts("?");
	}
	return 0;
}
