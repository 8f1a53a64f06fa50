/* SPDX-License-Identifier: GPL-2.0-only
 *
 * A handler library in DynaCut's manner: it knows by a table where a program traps, and goes on behind the trap.
 *
 *   gcc -shared -fPIC -DTRAPS='"traps.h"' -o skip_traps.so skip_traps.c
 *   dynacut live --pid P --handler ./skip_traps.so
 *
 * traps.h has a line `{OFFSET, LENGTH},` for each run of int3 instructions: the module offset of its first one (as
 * `objdump -d` of a PIE shows it), and how many bytes to go on from there.
 *
 * It is an ordinary shared object that calls the C library. Mind that it runs as a signal handler: what it calls must
 * not be what the program was in the midst of when it trapped.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

/* A program's base is a multiple of this, so the lower bits of an address are those of the offset. */
#define PAGE 0x1000ul

static const struct {
	unsigned long offset, length;
} traps[] = {
#include TRAPS
};

static unsigned count;

void trap_handler(int signal, siginfo_t *info, void *context)
{
	greg_t *rip = &((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
	unsigned long trap = (unsigned long)*rip - 1; /* the kernel leaves rip behind the int3 */
	char line[80];

	(void)info;
	for (size_t i = 0; i < sizeof(traps) / sizeof(traps[0]); i++) {
		if ((trap - traps[i].offset) % PAGE)
			continue;
		*rip = (greg_t)(trap + traps[i].length);
		printf("signal %d: trap %u skipped, %lu bytes\n", signal, ++count, traps[i].length);
		fflush(stdout);
		break;
	}
	int file = open("traps.log", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
	if (file < 0)
		return;
	snprintf(line, sizeof(line), "%#lx\n", trap);
	if (write(file, line, strlen(line)) < 0)
		perror("traps.log");
	close(file);
}
