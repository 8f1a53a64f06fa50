/* SPDX-License-Identifier: GPL-2.0-only
 *
 * A thread with a small stack and an alternate one for signals, which calls feature() on request.
 *
 *   altstack
 *   feature 3 -> feature(3), called by that thread
 *   deep 3    -> feature(3), called with so little stack left that a signal needs the alternate one
 *   main 3    -> feature(3), called by the first thread, which has no alternate stack
 */
#define _GNU_SOURCE
#include <alloca.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <unistd.h>

#include "feature.h"

#define STACK 16384
#define LEFT 1024 /* less than a signal frame of any x86-64: fxsave alone takes 512, its surroundings about 600 */

static int request[2], answer[2];

/* Negative numbers ask for the deep call: -1 - n. */
static NOIPA long call_deep(long n, char *lowest)
{
	volatile char *top = alloca((size_t)((char *)__builtin_frame_address(0) - lowest) - LEFT);

	*top = 1;
	return feature(n);
}

static void *serve(void *unused)
{
	size_t size = (size_t)sysconf(_SC_SIGSTKSZ), stack_size;
	stack_t alternate = { .ss_sp = malloc(size), .ss_size = size };
	pthread_attr_t attributes;
	void *lowest;

	(void)unused;
	if (alternate.ss_sp == NULL || sigaltstack(&alternate, NULL) != 0)
		fail("sigaltstack");
	if (pthread_getattr_np(pthread_self(), &attributes) != 0 ||
	    pthread_attr_getstack(&attributes, &lowest, &stack_size) != 0)
		fail("pthread_getattr_np");
	for (;;) {
		long n;
		if (read(request[0], &n, sizeof(n)) != sizeof(n))
			fail("read");
		long result = n >= 0 ? feature(n) : call_deep(-1 - n, lowest);
		if (write(answer[1], &result, sizeof(result)) != sizeof(result))
			fail("write");
	}
	return NULL;
}

static long ask(long n)
{
	long result;

	if (write(request[1], &n, sizeof(n)) != sizeof(n) || read(answer[0], &result, sizeof(result)) != sizeof(result))
		fail("ask");
	return result;
}

int main(void)
{
	pthread_attr_t attributes;
	pthread_t thread;
	char word[32];
	long number;

	pthread_attr_init(&attributes);
	if (pipe(request) != 0 || pipe(answer) != 0 || pthread_attr_setstacksize(&attributes, STACK) != 0 ||
	    pthread_create(&thread, &attributes, serve, NULL) != 0)
		fail("pthread_create");
	ask(0);
	say_ready();
	while (next_line(word, &number)) {
		if (strcmp(word, "feature") == 0)
			printf("%ld\n", ask(number));
		else if (strcmp(word, "deep") == 0)
			printf("%ld\n", ask(-1 - number));
		else if (strcmp(word, "main") == 0)
			printf("%ld\n", feature(number));
		else
			puts("?");
	}
	return 0;
}
