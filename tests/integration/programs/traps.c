/* SPDX-License-Identifier: GPL-2.0-only
 *
 * What it does with SIGTRAP is said at its start: `ignore` it, `default`, or `count` it, with SA_RESTART.
 *
 *   traps ignore|default|count
 *   feature 3 -> feature(3)
 *   action    -> ignore|default|count|other flags F mask M traps T    (F and M in hexadecimal; T: how many were counted)
 */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "feature.h"

static atomic_long traps;

static void on_trap(int number)
{
	(void)number;
	traps++;
}

struct kernel_sigaction {
	void (*handler)(int);
	unsigned long flags;
	void (*restorer)(void);
	unsigned long mask;
};

static void say(void)
{
	struct kernel_sigaction action;
	const char *name = "other";

	if (syscall(SYS_rt_sigaction, SIGTRAP, NULL, &action, sizeof(action.mask)) != 0)
		fail("rt_sigaction");
	if (action.handler == SIG_IGN)
		name = "ignore";
	else if (action.handler == SIG_DFL)
		name = "default";
	else if (action.handler == on_trap)
		name = "count";
	printf("%s flags %lx mask %lx traps %ld\n", name, action.flags, action.mask, traps);
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = on_trap, .sa_flags = SA_RESTART };
	char word[32];
	long number;

	if (argc > 1 && strcmp(argv[1], "ignore") == 0)
		action.sa_handler = SIG_IGN;
	if (argc > 1 && strcmp(argv[1], "default") == 0)
		action.sa_handler = SIG_DFL;
	sigaddset(&action.sa_mask, SIGUSR2);
	if (sigaction(SIGTRAP, &action, NULL) != 0)
		fail("sigaction");
	say_ready();
	while (next_line(word, &number)) {
		if (strcmp(word, "feature") == 0)
			printf("%ld\n", feature(number));
		else if (strcmp(word, "action") == 0)
			say();
		else
			puts("?");
	}
	return 0;
}
