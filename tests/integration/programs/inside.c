/* SPDX-License-Identifier: GPL-2.0-only
 *
 * A thread that sits in a call that feature-like code makes: outer() is one run of instructions with a call in it.
 *
 *   outer 3   -> 2 * 3 + 1    (called by the first thread; waits for nothing)
 *   enter 3   -> ok           (the other thread calls outer(3) and waits in there)
 *   signal    -> ok           (a handler on the other thread's alternate stack interrupts that, and waits as well)
 *   leave     -> outer(3)     (both waits end; what the other thread's call returned)
 *   feature 3 -> feature(3)
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include "feature.h"

long outer(long n);
__asm__(".text\n"
	".globl outer\n"
	".type outer, @function\n"
	"outer:\n"
	"	.cfi_startproc\n"
	"	pushq %rbx\n"
	"	.cfi_def_cfa_offset 16\n"
	"	.cfi_offset rbx, -16\n"
	"	movq %rdi, %rbx\n"
	"	call wait_inside\n"
	"	leaq 1(%rbx,%rbx), %rax\n"
	"	popq %rbx\n"
	"	.cfi_def_cfa_offset 8\n"
	"	ret\n"
	"	.cfi_endproc\n"
	"	.size outer, . - outer\n");

static int start[2], result[2], inside[2], leave[2], handled[2], unhandled[2];
static pthread_t other;

static void get(int file, void *to, size_t size)
{
	if (read(file, to, size) != (ssize_t)size)
		fail("read");
}

static void put(int file, const void *from, size_t size)
{
	if (write(file, from, size) != (ssize_t)size)
		fail("write");
}

NOIPA void wait_inside(void)
{
	char byte = 0;

	if (!pthread_equal(pthread_self(), other))
		return;
	put(inside[1], &byte, 1);
	get(leave[0], &byte, 1);
}

static void on_signal(int number)
{
	char byte = (char)number;

	put(handled[1], &byte, 1);
	get(unhandled[0], &byte, 1);
}

static void *serve(void *unused)
{
	static char alternate[65536];
	stack_t stack = { .ss_sp = alternate, .ss_size = sizeof(alternate) };

	if (sigaltstack(&stack, NULL) != 0)
		fail("sigaltstack");
	put(result[1], &stack.ss_size, sizeof(long)); /* it runs, with its own signal mask */
	for (;;) {
		long n;
		get(start[0], &n, sizeof(n));
		n = outer(n);
		put(result[1], &n, sizeof(n));
	}
	return unused;
}

int main(void)
{
	struct sigaction action = { .sa_handler = on_signal, .sa_flags = SA_ONSTACK | SA_RESTART };
	int *all[] = { start, result, inside, leave, handled, unhandled };
	bool in_handler = false;
	char word[32], byte = 0;
	long number;

	for (int i = 0; i < 6; i++)
		if (pipe(all[i]) != 0)
			fail("pipe");
	if (sigaction(SIGUSR1, &action, NULL) != 0 || pthread_create(&other, NULL, serve, NULL) != 0)
		fail("start");
	get(result[0], &number, sizeof(number));
	say_ready();
	while (next_line(word, &number)) {
		if (strcmp(word, "outer") == 0) {
			printf("%ld\n", outer(number));
		} else if (strcmp(word, "enter") == 0) {
			put(start[1], &number, sizeof(number));
			get(inside[0], &byte, 1);
			puts("ok");
		} else if (strcmp(word, "signal") == 0) {
			pthread_kill(other, SIGUSR1);
			get(handled[0], &byte, 1);
			in_handler = true;
			puts("ok");
		} else if (strcmp(word, "leave") == 0) {
			put(leave[1], &byte, 1);
			if (in_handler)
				put(unhandled[1], &byte, 1);
			in_handler = false;
			get(result[0], &number, sizeof(number));
			printf("%ld\n", number);
		} else if (strcmp(word, "feature") == 0) {
			printf("%ld\n", feature(number));
		} else {
			puts("?");
		}
	}
	return 0;
}
