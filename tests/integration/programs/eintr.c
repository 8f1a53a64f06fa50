/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Threads that block in system calls, each of which would show by EINTR, or by an early return, that it was disturbed.
 *
 *   report    -> blocked N            or: NAME returned R errno E, ...
 *   wake      -> woken N              (ends all waits but nanosleep's in the regular way; N were right)
 *   feature 3 -> feature(3)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "feature.h"

static int pipes[3][2], epoll_file, semaphores, listener;
static unsigned futex_word;

static long wait_epoll(void)
{
	struct epoll_event event;
	return epoll_wait(epoll_file, &event, 1, -1);
}

static long wait_read(void)
{
	char byte;
	return read(pipes[1][0], &byte, 1);
}

static long wait_poll(void)
{
	struct pollfd file = { .fd = pipes[2][0], .events = POLLIN };
	return poll(&file, 1, -1);
}

static long wait_nanosleep(void)
{
	struct timespec time = { .tv_sec = 3600 };
	return syscall(SYS_nanosleep, &time, NULL);
}

static long wait_futex(void)
{
	return syscall(SYS_futex, &futex_word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0) == 0 ? 1 : -1;
}

static long wait_semop(void)
{
	struct sembuf operation = { .sem_op = -1 };
	return semop(semaphores, &operation, 1) == 0 ? 1 : -1;
}

static long wait_accept(void)
{
	return accept(listener, NULL, NULL) >= 0 ? 1 : -1;
}

static struct wait {
	const char *name;
	long (*call)(void);
	pid_t thread;
	long result;
	int error;
	atomic_bool returned;
} waits[] = {
	{ .name = "epoll_wait", .call = wait_epoll }, { .name = "read", .call = wait_read },
	{ .name = "poll", .call = wait_poll },	      { .name = "nanosleep", .call = wait_nanosleep },
	{ .name = "futex", .call = wait_futex },      { .name = "semop", .call = wait_semop },
	{ .name = "accept", .call = wait_accept },
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

static void pause_shortly(void)
{
	struct timespec time = { .tv_nsec = 1000000 };
	nanosleep(&time, NULL);
}

static void prepare(void)
{
	struct epoll_event event = { .events = EPOLLIN };
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };

	for (int i = 0; i < 3; i++)
		if (pipe(pipes[i]) != 0)
			fail("pipe");
	epoll_file = epoll_create1(0);
	if (epoll_file < 0 || epoll_ctl(epoll_file, EPOLL_CTL_ADD, pipes[0][0], &event) != 0)
		fail("epoll");
	semaphores = semget(IPC_PRIVATE, 1, 0600);
	if (semaphores < 0)
		fail("semget");
	listener = socket(AF_INET, SOCK_STREAM, 0);
	if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof(address)) != 0 || listen(listener, 1) != 0)
		fail("listen");
}

static void report(void)
{
	int blocked = 0;

	for (int i = 0; i < WAITS; i++)
		blocked += !waits[i].returned;
	if (blocked == WAITS) {
		printf("blocked %d\n", blocked);
		return;
	}
	for (int i = 0, shown = 0; i < WAITS; i++)
		if (waits[i].returned)
			printf("%s%s returned %ld errno %d", shown++ ? ", " : "", waits[i].name, waits[i].result,
			       waits[i].result < 0 ? waits[i].error : 0);
	putchar('\n');
}

static void wake(void)
{
	struct sockaddr_in address;
	socklen_t length = sizeof(address);
	struct sembuf operation = { .sem_op = 1 };
	int right = 0, client = socket(AF_INET, SOCK_STREAM, 0);

	for (int i = 0; i < 3; i++)
		if (write(pipes[i][1], "x", 1) != 1)
			fail("write");
	if (semop(semaphores, &operation, 1) != 0)
		fail("semop");
	if (getsockname(listener, (struct sockaddr *)&address, &length) != 0 ||
	    connect(client, (struct sockaddr *)&address, length) != 0)
		fail("connect");
	for (int i = 0; i < WAITS; i++) {
		if (waits[i].call == wait_nanosleep)
			continue;
		for (int tries = 0; tries < 5000 && !waits[i].returned; tries++) {
			if (waits[i].call == wait_futex)
				syscall(SYS_futex, &futex_word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
			pause_shortly();
		}
		right += waits[i].returned && waits[i].result == 1;
	}
	printf("woken %d\n", right);
}

int main(void)
{
	char word[32];
	long number;

	prepare();
	for (int i = 0; i < WAITS; i++) {
		pthread_t thread;
		if (pthread_create(&thread, NULL, run, &waits[i]) != 0)
			fail("pthread_create");
	}
	for (int i = 0; i < WAITS; i++)
		while (__atomic_load_n(&waits[i].thread, __ATOMIC_ACQUIRE) == 0 || !is_sleeping(waits[i].thread))
			pause_shortly();
	say_ready();
	while (next_line(word, &number)) {
		if (strcmp(word, "report") == 0)
			report();
		else if (strcmp(word, "wake") == 0)
			wake();
		else if (strcmp(word, "feature") == 0)
			printf("%ld\n", feature(number));
		else
			puts("?");
	}
	semctl(semaphores, 0, IPC_RMID);
	return 0;
}
