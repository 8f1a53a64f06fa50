/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Has paths that trap: with nothing done about SIGTRAP, the first of them ends it. Each SIGUSR1 makes it walk all of
 * them; what it says goes to stdout, which should be a file.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

__attribute__((noinline)) static void first(int round)
{
	printf("first %d\n", round);
	__asm__ volatile("int3");
	printf("behind the first trap %d\n", round);
}

__attribute__((noinline)) static void second(int round)
{
	printf("second %d\n", round);
	__asm__ volatile("int3; int3");
	printf("behind the second trap %d\n", round);
}

__attribute__((noinline)) static void third(int round)
{
	printf("third %d\n", round);
	__asm__ volatile("int3; int3; int3; ud2");
	printf("behind the third trap %d\n", round);
}

int main(void)
{
	sigset_t usr1;
	int number;

	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	sigprocmask(SIG_BLOCK, &usr1, NULL);
	setvbuf(stdout, NULL, _IOLBF, 0);
	puts("ready");
	for (int round = 1; sigwait(&usr1, &number) == 0; round++) {
		first(round);
		second(round);
		third(round);
		printf("walked %d\n", round);
	}
	return 1;
}
