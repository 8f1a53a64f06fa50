/* SPDX-License-Identifier: GPL-2.0-only
 *
 * One thread that never waits: it calls feature() all the time, and reads where nothing may be read, from which its
 * handler lets it go on.
 *
 *   report -> right N denied N wrong N   (wrong: of feature(), and faults at another place than that of the read)
 */
#define _GNU_SOURCE
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "feature.h"

static struct tally tally;

void read_forbidden(const char *place);
extern const char the_read[], behind_the_read[];
__asm__(".text\n"
	".globl read_forbidden\n"
	".type read_forbidden, @function\n"
	"read_forbidden:\n"
	"	.cfi_startproc\n"
	"the_read:\n"
	"	movb (%rdi), %al\n"
	"behind_the_read:\n"
	"	ret\n"
	"	.cfi_endproc\n"
	"	.size read_forbidden, . - read_forbidden\n");

static void on_fault(int number, siginfo_t *info, void *context)
{
	greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;

	(void)number;
	(void)info;
	if (registers[REG_RIP] != (greg_t)(uintptr_t)the_read)
		atomic_fetch_add(&tally.wrong, 1);
	registers[REG_RIP] = (greg_t)(uintptr_t)behind_the_read;
}

/* Another function to switch off: what is done for it meets the hits of feature(). */
NOIPA long other(long n)
{
	return n + 1;
}

int main(void)
{
	struct sigaction action = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO };
	struct pollfd input = { .fd = 0, .events = POLLIN };
	char *forbidden = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char line[64];

	if (forbidden == MAP_FAILED || sigaction(SIGSEGV, &action, NULL) != 0)
		fail("busy");
	say_ready();
	for (;;) {
		for (long i = 0; i < 20000; i++) {
			count(&tally, i & 1, feature(i & 1));
			read_forbidden(forbidden);
		}
		if (poll(&input, 1, 0) == 0)
			continue;
		if (read(0, line, sizeof(line)) <= 0)
			return 0;
		printf("right %ld denied %ld wrong %ld\n", tally.right, tally.denied, tally.wrong);
	}
}
