/* SPDX-License-Identifier: GPL-2.0-only
 *
 * One wait, in the system call that is named, which a signal handler ends with EINTR, or does not if that is restarted.
 *
 *   (SIGUSR1)  -> NAME returned R errno E handled N      when the wait is over
 *   feature 3  -> feature(3)
 *
 * ppoll and epoll_pwait let SIGUSR1 in only while they wait: a program that relies on that must not miss one.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#include "feature.h"

static volatile sig_atomic_t handled;

static void handle(int number)
{
	(void)number;
	handled++;
}

static long wait_in(const char *name)
{
	struct epoll_event event;
	struct timespec hour = { .tv_sec = 3600 };
	sigset_t all_others;
	char byte;

	sigfillset(&all_others);
	sigdelset(&all_others, SIGUSR1);
	if (strcmp(name, "ppoll") == 0)
		return ppoll(NULL, 0, NULL, &all_others);
	if (strcmp(name, "epoll_pwait") == 0)
		return epoll_pwait(epoll_create1(0), &event, 1, -1, &all_others);
	if (strcmp(name, "epoll_wait") == 0)
		return epoll_wait(epoll_create1(0), &event, 1, -1);
	if (strcmp(name, "nanosleep") == 0)
		return nanosleep(&hour, NULL);
	return read(STDIN_FILENO, &byte, 1);
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = handle };
	sigset_t set;
	char word[32];
	long number;

	if (argc != 3)
		return 2;
	action.sa_flags = strcmp(argv[2], "restart") == 0 ? SA_RESTART : 0;
	sigaction(SIGUSR1, &action, NULL);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	if (strcmp(argv[1], "ppoll") == 0 || strcmp(argv[1], "epoll_pwait") == 0)
		sigprocmask(SIG_BLOCK, &set, NULL);
	say_ready();
	long result = wait_in(argv[1]);
	printf("%s returned %ld errno %d handled %d\n", argv[1], result, result < 0 ? errno : 0, (int)handled);
	while (next_line(word, &number))
		if (strcmp(word, "feature") == 0)
			printf("%ld\n", feature(number));
	return 0;
}
