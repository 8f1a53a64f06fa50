/* SPDX-License-Identifier: GPL-2.0-only
 *
 * A program whose stack lies amid a gigabyte of other memory, as those of coroutines do.
 */
#define _GNU_SOURCE
#include <sys/mman.h>
#include <ucontext.h>

#include "feature.h"

#define SIZE ((size_t)1 << 30)
#define STACK ((size_t)1 << 17)

static ucontext_t first, second;

static void serve(void)
{
	char word[32];
	long n;

	say_ready();
	while (next_line(word, &n))
		printf("%ld\n", feature(n));
	exit(0);
}

int main(void)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
	char *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, flags, -1, 0);

	if (memory == MAP_FAILED || getcontext(&second) != 0)
		fail("amid");
	second.uc_stack.ss_sp = memory;
	second.uc_stack.ss_size = STACK;
	makecontext(&second, serve, 0);
	swapcontext(&first, &second);
	return 1;
}
