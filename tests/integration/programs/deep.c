/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Needs as much stack as it is told to.
 *
 *   deep 400 -> 400 (MiB)        feature 3 -> feature(3)
 */
#define _GNU_SOURCE
#include "feature.h"

NOIPA long deep(long frames)
{
	volatile char frame[1 << 16];

	for (size_t place = 0; place < sizeof(frame); place += 4096)
		frame[place] = 1;
	return frames > 1 ? deep(frames - 1) + frame[0] : frame[0];
}

int main(void)
{
	char word[32];
	long n;

	say_ready();
	while (next_line(word, &n))
		printf("%ld\n", strcmp(word, "deep") == 0 ? deep(16 * n) / 16 : feature(n));
	return 0;
}
