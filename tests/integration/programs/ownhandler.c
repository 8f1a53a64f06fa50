/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Has a SIGTRAP handler of its own, for traps of its own.
 *
 *   feature 3 -> feature(3)
 *   int3, int 3 (two bytes), raise -> hits H code C      (what its handler saw last)
 *   hits   -> hits H code C
 *   own    -> 1 if the kernel calls this program's handler for SIGTRAP, 0 if somebody else's
 *   again  -> ok       (installs its handler once more)
 */
#define _GNU_SOURCE
#include <signal.h>

#include "feature.h"

static volatile sig_atomic_t hits, code;

static void on_trap(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	hits++;
	code = info->si_code;
}

static void install(void)
{
	struct sigaction action = { .sa_sigaction = on_trap, .sa_flags = SA_SIGINFO | SA_RESTART };

	sigaddset(&action.sa_mask, SIGUSR1);
	if (sigaction(SIGTRAP, &action, NULL) != 0)
		fail("sigaction");
}

int main(void)
{
	char word[32];
	long number;

	install();
	say_ready();
	while (next_line(word, &number)) {
		if (strcmp(word, "feature") == 0) {
			printf("%ld\n", feature(number));
			continue;
		}
		if (strcmp(word, "own") == 0) {
			struct sigaction action;
			sigaction(SIGTRAP, NULL, &action);
			printf("%d\n", action.sa_sigaction == on_trap);
			continue;
		}
		if (strcmp(word, "again") == 0) {
			install();
			puts("ok");
			continue;
		}
		if (strcmp(word, "int3") == 0)
			__asm__ volatile("int3");
		else if (strcmp(word, "int") == 0)
			__asm__ volatile(".byte 0xcd, 0x03");
		else if (strcmp(word, "raise") == 0)
			raise(SIGTRAP);
		printf("hits %d code %d\n", (int)hits, (int)code);
	}
	return 0;
}
