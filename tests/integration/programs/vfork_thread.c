/* SPDX-License-Identifier: GPL-2.0-only
 *
 * A thread sits in vfork, where it cannot be stopped, and another one in epoll_wait, which ends with EINTR after a stop.
 *
 *   report    -> blocked | returned R errno E     (epoll_wait)
 *   wake      -> the same, once the vfork child has ended
 *   feature 3 -> feature(3)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "feature.h"

static int started[2], end[2], epoll_file;
static atomic_bool returned;
static long result;
static int error;

static void *wait_for_child(void *unused)
{
	char byte = 0;
	pid_t child = vfork();

	if (child == 0) { /* on the parent's memory: only system calls */
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (write(started[1], &byte, 1) != 1 || read(end[0], &byte, 1) != 1)
			_exit(1);
		_exit(0);
	}
	if (child < 0 || waitpid(child, NULL, 0) != child || write(started[1], &byte, 1) != 1)
		fail("vfork");
	for (;;)
		pause();
	return unused;
}

static void *wait_for_event(void *unused)
{
	struct epoll_event event;

	result = epoll_wait(epoll_file, &event, 1, -1);
	error = errno;
	returned = true;
	return unused;
}

int main(void)
{
	pthread_t threads[2];
	char word[32], byte = 0;
	long number;

	epoll_file = epoll_create1(0);
	if (epoll_file < 0 || pipe(started) != 0 || pipe(end) != 0 ||
	    pthread_create(&threads[0], NULL, wait_for_event, NULL) != 0 ||
	    pthread_create(&threads[1], NULL, wait_for_child, NULL) != 0 || read(started[0], &byte, 1) != 1)
		fail("start");
	say_ready();
	while (next_line(word, &number)) {
		if (strcmp(word, "wake") == 0 && (write(end[1], &byte, 1) != 1 || read(started[0], &byte, 1) != 1))
			fail("wake");
		if (strcmp(word, "feature") == 0)
			printf("%ld\n", feature(number));
		else if (returned)
			printf("returned %ld errno %d\n", result, error);
		else
			puts("blocked");
	}
	return 0;
}
