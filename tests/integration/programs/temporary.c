/* SPDX-License-Identifier: GPL-2.0-only
 *
 * A thread that blocks every signal and waits in a system call that lets them through meanwhile: what /proc shows of
 * its mask then is the temporary one. Once awake it calls feature() with every signal blocked.
 *
 *   temporary ppoll|pselect|epoll_pwait|sigsuspend|sigwait
 *   feature 3 -> feature(3)           (called by that thread)
 *   mask      -> 1 if SIGTRAP is in that thread's mask, 0 if it is not
 */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <unistd.h>

#include "feature.h"

static const char *kind;
static int request[2], answer[2], epoll_file;
static pthread_t thread;

static void nothing(int number)
{
	(void)number;
}

/* Returns when there is a request. */
static void await(void)
{
	sigset_t all, none;
	struct pollfd file = { .fd = request[0], .events = POLLIN };
	struct epoll_event event;
	fd_set files;
	int number;

	sigfillset(&all);
	sigemptyset(&none);
	if (strcmp(kind, "ppoll") == 0) {
		if (ppoll(&file, 1, NULL, &none) != 1)
			fail("ppoll");
	} else if (strcmp(kind, "pselect") == 0) {
		FD_ZERO(&files);
		FD_SET(request[0], &files);
		if (pselect(request[0] + 1, &files, NULL, NULL, NULL, &none) != 1)
			fail("pselect");
	} else if (strcmp(kind, "epoll_pwait") == 0) {
		if (epoll_pwait(epoll_file, &event, 1, -1, &none) != 1)
			fail("epoll_pwait");
	} else if (strcmp(kind, "sigsuspend") == 0) {
		sigsuspend(&none);
	} else if (sigwait(&all, &number) != 0 || number != SIGUSR1) {
		fail("sigwait");
	}
}

static void *serve(void *unused)
{
	for (;;) {
		sigset_t now;
		long n, result;
		await();
		if (read(request[0], &n, sizeof(n)) != sizeof(n))
			fail("read");
		pthread_sigmask(SIG_SETMASK, NULL, &now);
		result = n < 0 ? sigismember(&now, SIGTRAP) : feature(n);
		if (write(answer[1], &result, sizeof(result)) != sizeof(result))
			fail("write");
	}
	return unused;
}

static long ask(long n)
{
	if (write(request[1], &n, sizeof(n)) != sizeof(n))
		fail("write");
	if (strncmp(kind, "sig", 3) == 0)
		pthread_kill(thread, SIGUSR1);
	if (read(answer[0], &n, sizeof(n)) != sizeof(n))
		fail("read");
	return n;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = nothing };
	struct epoll_event event = { .events = EPOLLIN };
	sigset_t all, none;
	char word[32];
	long number;

	kind = argc > 1 ? argv[1] : "ppoll";
	sigfillset(&all);
	sigemptyset(&none);
	epoll_file = epoll_create1(0);
	if (pipe(request) != 0 || pipe(answer) != 0 || epoll_file < 0 ||
	    epoll_ctl(epoll_file, EPOLL_CTL_ADD, request[0], &event) != 0)
		fail("files");
	sigaction(SIGUSR1, &action, NULL);
	pthread_sigmask(SIG_SETMASK, &all, NULL);
	if (pthread_create(&thread, NULL, serve, NULL) != 0)
		fail("pthread_create");
	pthread_sigmask(SIG_SETMASK, &none, NULL);
	say_ready();
	while (next_line(word, &number)) {
		if (strcmp(word, "feature") == 0)
			printf("%ld\n", ask(number));
		else if (strcmp(word, "mask") == 0)
			printf("%ld\n", ask(-1));
		else
			puts("?");
	}
	return 0;
}
