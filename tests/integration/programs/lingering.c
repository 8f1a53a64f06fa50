/* SPDX-License-Identifier: GPL-2.0-only
 *
 * A thread that blocks SIGTRAP is in a signal handler, at the start and until it is told to return. With the argument
 * `sigsuspend` the handler has come in by a temporary mask: while it runs, SIGTRAP is not blocked.
 *
 *   return    -> returned
 *   blocks    -> 1 if the thread blocks SIGTRAP, else 0
 *   feature 3 -> feature(3), in the thread       (these two once it has returned)
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include "feature.h"

static int requests[2], answers[2];

static void answer(long result)
{
	if (write(answers[1], &result, sizeof(result)) != sizeof(result))
		_exit(99);
}

static long request(void)
{
	long n;

	if (read(requests[0], &n, sizeof(n)) != sizeof(n))
		_exit(0);
	return n;
}

static void linger(int number)
{
	answer(number);
	request();
}

static void *work(void *suspends)
{
	sigset_t mask;

	sigemptyset(&mask);
	sigaddset(&mask, SIGTRAP);
	if (suspends)
		sigaddset(&mask, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &mask, NULL);
	pthread_kill(pthread_self(), SIGUSR1);
	if (suspends) {
		sigemptyset(&mask);
		sigsuspend(&mask);
	}
	answer(0);
	for (;;) {
		long n = request();
		pthread_sigmask(SIG_BLOCK, NULL, &mask);
		answer(n < 0 ? sigismember(&mask, SIGTRAP) : feature(n));
	}
	return suspends;
}

static long ask(long n)
{
	if (write(requests[1], &n, sizeof(n)) != sizeof(n) || read(answers[0], &n, sizeof(n)) != sizeof(n))
		fail("pipe");
	return n;
}

int main(int argc, char **argv)
{
	char word[32];
	long number;
	pthread_t thread;

	(void)argc;
	signal(SIGUSR1, linger);
	if (pipe(requests) != 0 || pipe(answers) != 0 || pthread_create(&thread, NULL, work, argv[1]) != 0 ||
	    read(answers[0], &number, sizeof(number)) != sizeof(number))
		fail("start");
	say_ready();
	while (next_line(word, &number)) {
		if (strcmp(word, "return") == 0)
			puts(ask(0) == 0 ? "returned" : "?");
		else
			printf("%ld\n", ask(strcmp(word, "blocks") == 0 ? -1 : number));
	}
	return 0;
}
