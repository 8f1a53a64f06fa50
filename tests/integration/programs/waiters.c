/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Threads in further system calls (see eintr.c) that return early, or with EINTR, once something disturbs them.
 *
 *   report    -> blocked N        or: NAME returned R errno E, ...
 *   feature 3 -> feature(3)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "feature.h"

static int quiet[2], pair[2], epoll_file, semaphores;
static const struct timespec hour = { .tv_sec = 3600 };
static sigset_t usr1;

static long wait_ppoll(void)
{
	struct pollfd file = { .fd = quiet[0], .events = POLLIN };
	return ppoll(&file, 1, &hour, &usr1);
}

static long wait_pselect(void)
{
	fd_set files;
	FD_ZERO(&files);
	FD_SET(quiet[0], &files);
	return pselect(quiet[0] + 1, &files, NULL, NULL, &hour, &usr1);
}

static long wait_epoll_pwait(void)
{
	struct epoll_event event;
	return epoll_pwait(epoll_file, &event, 1, 3600000, &usr1);
}

static long wait_recv(void)
{
	char byte;
	return recv(pair[0], &byte, 1, 0); /* with SO_RCVTIMEO */
}

static long wait_sigtimedwait(void)
{
	return sigtimedwait(&usr1, NULL, &hour);
}

static long wait_semtimedop(void)
{
	struct sembuf operation = { .sem_op = -1 };
	return semtimedop(semaphores, &operation, 1, &hour);
}

static long wait_clock_nanosleep(void)
{
	return -clock_nanosleep(CLOCK_MONOTONIC, 0, &hour, NULL);
}

static long wait_condition(void)
{
	pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
	pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
	struct timespec until;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += 3600;
	pthread_mutex_lock(&mutex);
	return -pthread_cond_timedwait(&condition, &mutex, &until);
}

static long wait_sigsuspend(void)
{
	sigset_t all;
	sigfillset(&all);
	return sigsuspend(&all);
}

static struct wait {
	const char *name;
	long (*call)(void);
	pid_t thread;
	long result;
	int error;
	atomic_bool returned;
} waits[] = {
	{ .name = "ppoll", .call = wait_ppoll },
	{ .name = "pselect", .call = wait_pselect },
	{ .name = "epoll_pwait", .call = wait_epoll_pwait },
	{ .name = "recv", .call = wait_recv },
	{ .name = "sigtimedwait", .call = wait_sigtimedwait },
	{ .name = "semtimedop", .call = wait_semtimedop },
	{ .name = "clock_nanosleep", .call = wait_clock_nanosleep },
	{ .name = "pthread_cond_timedwait", .call = wait_condition },
	{ .name = "sigsuspend", .call = wait_sigsuspend },
};
#define WAITS ((int)(sizeof(waits) / sizeof(waits[0])))

static void *run(void *argument)
{
	struct wait *wait = argument;

	__atomic_store_n(&wait->thread, gettid(), __ATOMIC_RELEASE);
	wait->result = wait->call();
	wait->error = errno;
	atomic_store(&wait->returned, true);
	return NULL;
}

/* Whether a thread sleeps, by its state in /proc (proc_pid_stat(5), field 3). */
static bool is_sleeping(pid_t thread)
{
	char path[64], line[256], *end;
	bool sleeping = false;

	snprintf(path, sizeof(path), "/proc/self/task/%d/stat", (int)thread);
	FILE *file = fopen(path, "r");
	if (file == NULL)
		return false;
	if (fgets(line, sizeof(line), file) != NULL && (end = strrchr(line, ')')) != NULL)
		sleeping = end[2] == 'S';
	fclose(file);
	return sleeping;
}

static void report(void)
{
	int returned = 0;

	for (int i = 0; i < WAITS; i++)
		if (waits[i].returned)
			printf("%s%s returned %ld errno %d", returned++ ? ", " : "", waits[i].name, waits[i].result,
			       waits[i].error);
	if (returned == 0)
		printf("blocked %d", WAITS);
	putchar('\n');
}

int main(void)
{
	struct timeval timeout = { .tv_sec = 3600 };
	struct epoll_event event = { .events = EPOLLIN };
	char word[32];
	long number;

	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &usr1, NULL);
	epoll_file = epoll_create1(0);
	semaphores = semget(IPC_PRIVATE, 1, 0600);
	if (pipe(quiet) != 0 || epoll_file < 0 || epoll_ctl(epoll_file, EPOLL_CTL_ADD, quiet[0], &event) != 0 ||
	    socketpair(AF_UNIX, SOCK_STREAM, 0, pair) != 0 || semaphores < 0 ||
	    setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout)) != 0)
		fail("files");
	for (int i = 0; i < WAITS; i++) {
		pthread_t thread;
		if (pthread_create(&thread, NULL, run, &waits[i]) != 0)
			fail("pthread_create");
	}
	for (int i = 0; i < WAITS; i++)
		while (__atomic_load_n(&waits[i].thread, __ATOMIC_ACQUIRE) == 0 || !is_sleeping(waits[i].thread))
			usleep(1000);
	say_ready();
	while (next_line(word, &number)) {
		if (strcmp(word, "report") == 0)
			report();
		else if (strcmp(word, "feature") == 0)
			printf("%ld\n", feature(number));
		else
			puts("?");
	}
	semctl(semaphores, 0, IPC_RMID);
	return 0;
}
