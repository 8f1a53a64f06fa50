/* SPDX-License-Identifier: GPL-2.0-only
 *
 * As many threads as its argument says block every signal and wait.
 *
 *   feature 3 -> feature(3)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include "feature.h"

static void *wait_blocked(void *unused)
{
	for (;;)
		pause();
	return unused;
}

int main(int count, char **arguments)
{
	char word[32];
	long number;
	sigset_t all, before;
	pthread_attr_t attributes;
	pthread_t thread;

	if (count != 2)
		return 2;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 1 << 16);
	for (long i = 0; i < atol(arguments[1]); i++) {
		int error = pthread_create(&thread, &attributes, wait_blocked, NULL);

		if (error)
			return error == EAGAIN ? CANNOT_RUN : 1;
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	say_ready();
	while (next_line(word, &number))
		printf("%ld\n", feature(number));
	return 0;
}
