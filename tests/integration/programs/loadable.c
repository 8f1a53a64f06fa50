/* SPDX-License-Identifier: GPL-2.0-only
 *
 * A module that programs/loader.c loads and unloads.
 */
__attribute__((noipa, used)) long plug(long n)
{
	long sum = 3;

	for (long i = 0; i < n; i++)
		sum += (i + i) ^ n;
	return sum;
}
