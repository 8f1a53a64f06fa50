/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Maps memory of its own next to some that is there, as near as can be and of the same kind.
 *
 *   below A -> ok    maps code that ends at an address (in decimal digits)
 *   above A -> ok    maps data that begins there
 *   feature 3 -> feature(3)
 */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "feature.h"

#define SIZE 0x10000

static const char *map(long address, int protection)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;

	return mmap((void *)address, SIZE, protection, flags, -1, 0) == (void *)address ? "ok" : "no";
}

int main(void)
{
	char word[32];
	long n;

	say_ready();
	while (next_line(word, &n)) {
		if (strcmp(word, "below") == 0)
			puts(map(n - SIZE, PROT_READ | PROT_EXEC));
		else if (strcmp(word, "above") == 0)
			puts(map(n, PROT_READ | PROT_WRITE));
		else
			printf("%ld\n", feature(n));
	}
	return 0;
}
