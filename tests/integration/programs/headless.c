/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Its main thread ends upon the first line and stays a zombie; another one answers.
 *
 *   end       -> ended
 *   feature 3 -> feature(3)
 */
#define _GNU_SOURCE
#include <pthread.h>

#include "feature.h"

static void *answer(void *first)
{
	char word[32];
	long number;

	pthread_join(*(pthread_t *)first, NULL);
	puts("ended");
	while (next_line(word, &number))
		printf("%ld\n", feature(number));
	exit(0);
}

int main(void)
{
	static pthread_t first;
	pthread_t other;
	char word[32];
	long number;

	say_ready();
	if (!next_line(word, &number))
		return 0;
	first = pthread_self();
	if (pthread_create(&other, NULL, answer, &first) != 0)
		fail("pthread_create");
	pthread_exit(NULL);
}
