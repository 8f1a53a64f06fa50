/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Calls functions that may be disabled, and says how long a call takes.
 *
 *   one I COUNT      -> NS SUM      COUNT calls of site I
 *   shuffled COUNT   -> NS SUM      COUNT calls of all sites, in an order as good as random
 *   where            -> ADDRESS     of site 0
 *   int3 COUNT       -> NS SUM      COUNT calls of a function with an int3 of its own
 *
 * NS: for all calls together. SUM: of what they returned.
 * `hit floor` has a SIGTRAP handler of its own that does nothing but return 0 from the function it was hit in.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <ucontext.h>

#include "clock.h"
#include "sites.h"

typedef long (*function)(long);

static unsigned order[SITES];

static function site(unsigned index)
{
	return (function)(sites + (size_t)index * SITE_DISTANCE);
}

/* Where sites are redirected to. */
__attribute__((noipa, used)) long denied(long n)
{
	(void)n;
	return -1;
}

long trapping(long n);
__asm__(".text\n"
	".globl trapping\n"
	".type trapping, @function\n"
	"trapping:\n"
	"	int3\n"
	"	leaq 1(%rdi), %rax\n"
	"	ret\n"
	".size trapping, . - trapping\n");

static void leave(int signal, siginfo_t *information, void *argument)
{
	greg_t *registers = ((ucontext_t *)argument)->uc_mcontext.gregs;

	(void)signal;
	(void)information;
	registers[REG_RAX] = 0;
	registers[REG_RIP] = *(greg_t *)registers[REG_RSP];
	registers[REG_RSP] += 8;
}

static void shuffle(void)
{
	uint64_t seed = 88172645463325252u; /* xorshift64: the same order each time */

	for (unsigned i = 0; i < SITES; i++)
		order[i] = i;
	for (unsigned i = SITES - 1; i > 0; i--) {
		seed ^= seed << 13;
		seed ^= seed >> 7;
		seed ^= seed << 17;
		unsigned j = (unsigned)(seed % (i + 1)), kept = order[i];
		order[i] = order[j];
		order[j] = kept;
	}
}

int main(int argc, char **argv)
{
	char line[128];

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	setvbuf(stdout, NULL, _IOLBF, BUFSIZ);
	if (argc > 1 && strcmp(argv[1], "floor") == 0) {
		struct sigaction action = { .sa_sigaction = leave, .sa_flags = SA_SIGINFO | SA_NODEFER };
		sigaction(SIGTRAP, &action, NULL);
	}
	shuffle();
	printf("ready\n");
	while (fgets(line, sizeof(line), stdin) != NULL) {
		unsigned index = 0;
		long count = 0, sum = 0;
		uint64_t before = now();
		if (strcmp(line, "where\n") == 0) {
			printf("%p\n", (const void *)sites);
			continue;
		} else if (sscanf(line, "one %u %ld", &index, &count) == 2 && index < SITES) {
			function called = site(index);
			for (long i = 0; i < count; i++)
				sum += called(i);
		} else if (sscanf(line, "shuffled %ld", &count) == 1) {
			for (long i = 0; i < count; i++)
				sum += site(order[i % SITES])(i);
		} else if (sscanf(line, "int3 %ld", &count) == 1) {
			for (long i = 0; i < count; i++)
				sum += trapping(i);
		}
		printf("%lu %ld\n", (unsigned long)(now() - before), sum);
	}
	return 0;
}
