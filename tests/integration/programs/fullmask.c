/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Calls feature() where SIGTRAP is blocked: in a signal handler with a full sa_mask, in a thread that blocks
 * everything, and in a thread that waits in ppoll with SIGTRAP in the temporary mask.
 *
 *   signal 3, blocked 3, ppoll 3 -> feature(3), called there
 *   feature 3 -> feature(3), called where nothing is blocked
 *   masks -> handler M thread M      (whether SIGTRAP is in the handler's sa_mask, and in the thread's mask)
 */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include "feature.h"

static volatile sig_atomic_t wanted;
static volatile long result;

/* One request and one answer at a time, by pipes: waiting for them blocks in read or ppoll. */
struct channel {
	int request[2], answer[2];
	bool temporary;
};

struct answer {
	long result;
	int blocked;
};

static void on_signal(int number)
{
	(void)number;
	result = feature(wanted);
}

static void *serve(void *argument)
{
	struct channel *channel = argument;
	sigset_t all, none, now;

	sigfillset(&all);
	sigemptyset(&none);
	pthread_sigmask(SIG_SETMASK, channel->temporary ? &none : &all, NULL);
	for (;;) {
		struct pollfd wait = { .fd = channel->request[0], .events = POLLIN };
		struct answer answer;
		long n;
		if (channel->temporary && ppoll(&wait, 1, NULL, &all) != 1)
			fail("ppoll");
		if (read(channel->request[0], &n, sizeof(n)) != sizeof(n))
			fail("read");
		pthread_sigmask(SIG_SETMASK, NULL, &now);
		answer.blocked = sigismember(&now, SIGTRAP);
		answer.result = n == -1 ? 0 : feature(n);
		if (write(channel->answer[1], &answer, sizeof(answer)) != sizeof(answer))
			fail("write");
	}
	return NULL;
}

static struct answer ask(struct channel *channel, long n)
{
	struct answer answer;

	if (write(channel->request[1], &n, sizeof(n)) != sizeof(n) ||
	    read(channel->answer[0], &answer, sizeof(answer)) != sizeof(answer))
		fail("ask");
	return answer;
}

int main(void)
{
	static struct channel blocked, temporary = { .temporary = true };
	struct channel *channels[] = { &blocked, &temporary };
	struct sigaction action = { .sa_handler = on_signal };
	char word[32];
	long number;

	sigfillset(&action.sa_mask);
	if (sigaction(SIGUSR1, &action, NULL) != 0)
		fail("sigaction");
	for (int i = 0; i < 2; i++) {
		pthread_t thread;
		if (pipe(channels[i]->request) != 0 || pipe(channels[i]->answer) != 0 ||
		    pthread_create(&thread, NULL, serve, channels[i]) != 0)
			fail("pthread_create");
		ask(channels[i], 1); /* the thread has its mask from now on */
	}
	say_ready();
	while (next_line(word, &number)) {
		if (strcmp(word, "signal") == 0) {
			wanted = (sig_atomic_t)number;
			pthread_kill(pthread_self(), SIGUSR1);
			printf("%ld\n", result);
		} else if (strcmp(word, "blocked") == 0) {
			printf("%ld\n", ask(&blocked, number).result);
		} else if (strcmp(word, "ppoll") == 0) {
			printf("%ld\n", ask(&temporary, number).result);
		} else if (strcmp(word, "feature") == 0) {
			printf("%ld\n", feature(number));
		} else if (strcmp(word, "masks") == 0) {
			sigaction(SIGUSR1, NULL, &action);
			printf("handler %d thread %d\n", sigismember(&action.sa_mask, SIGTRAP),
			       ask(&blocked, -1).blocked);
		} else {
			puts("?");
		}
	}
	return 0;
}
