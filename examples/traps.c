/* SPDX-License-Identifier: GPL-2.0-only
 *
 * A program whose paths trap: the first int3 would end it. It waits for SIGUSR1 and then walks them all. See
 * skip_traps.sh.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>

#define TRAPPED(number)                                         \
	do {                                                    \
		puts("to trap " #number);                       \
		__asm__ volatile("int3");                       \
		puts("behind trap " #number ", never printed"); \
	} while (0)

int main(void)
{
	sigset_t usr1;
	int signal;

	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	sigprocmask(SIG_BLOCK, &usr1, NULL);
	setvbuf(stdout, NULL, _IOLBF, 0);
	puts("waiting");
	sigwait(&usr1, &signal);
	TRAPPED(1);
	TRAPPED(2);
	TRAPPED(3);
	puts("done");
	return 0;
}
