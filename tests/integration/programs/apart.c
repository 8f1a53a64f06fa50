/* SPDX-License-Identifier: GPL-2.0-only
 *
 * A function of which gcc puts a part elsewhere: apart.cold is reached with the frame of apart() on the stack.
 *
 *   feature 3 -> feature(3)      apart 3 -> a number (of 5: by way of apart.cold)
 */
#define _GNU_SOURCE
#include "feature.h"

NOIPA __attribute__((cold)) void complain(const char *what, long n)
{
	fprintf(stderr, "%s %ld\n", what, n);
}

NOIPA long apart(long n, const long *factors)
{
	long products[8], sum = 0;

	for (int i = 0; i < 8; i++)
		products[i] = n * i + factors[i];
	if (n == 5) {
		complain("five", n);
		for (int i = 0; i < 8; i++)
			complain("product", products[i]);
		return DENIED;
	}
	for (int i = 0; i < 8; i++)
		sum += products[i] * factors[i & 3];
	return sum;
}

int main(void)
{
	const long factors[8] = { 1, 2, 3, 4, 5, 6, 7, 8 };
	char word[32];
	long number;

	say_ready();
	while (next_line(word, &number))
		printf("%ld\n", strcmp(word, "apart") == 0 ? apart(number, factors) : feature(number));
	return 0;
}
