/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Has made itself undumpable: its files in /proc belong to root, and only root may trace it.
 *
 *   feature 3 -> feature(3)
 */
#define _GNU_SOURCE
#include <sys/prctl.h>

#include "feature.h"

int main(void)
{
	char word[32];
	long number;

	if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0)
		fail("prctl");
	say_ready();
	while (next_line(word, &number)) {
		if (strcmp(word, "feature") == 0)
			printf("%ld\n", feature(number));
		else
			puts("?");
	}
	return 0;
}
