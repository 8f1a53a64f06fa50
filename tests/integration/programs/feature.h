/* SPDX-License-Identifier: GPL-2.0-only
 *
 * What the programs have in common: a feature to switch off, a function to redirect it to, and a line protocol on
 * stdin and stdout: `ready`, then one line of answer for each line.
 */
#ifndef FEATURE_H
#define FEATURE_H

#ifndef _GNU_SOURCE
#error "compile with -std=gnu11 -D_GNU_SOURCE, or define it first"
#endif

#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Neither inlined nor cloned, and callers assume nothing about it: what they get after a patch is what it returned. */
#define NOIPA __attribute__((noipa, used))
#define DENIED (-1L)
/* The exit status of a program that finds that the machine lacks what it is about. */
#define CANNOT_RUN 77

/* Several basic blocks, with a failure that returns from within. */
NOIPA long feature(long n)
{
	long sum = 7;

	if (n < 0)
		return -2;
	for (long i = 0; i < n; i++)
		sum += (i * i) ^ n;
	return sum;
}

/* Where feature() is redirected to. */
NOIPA long denied(long n)
{
	(void)n;
	return DENIED;
}

/* The same as feature(), never patched. */
static inline __attribute__((always_inline, unused)) long expected_feature(long n)
{
	long sum = 7;

	if (n < 0)
		return -2;
	for (long i = 0; i < n; i++)
		sum += (i * i) ^ n;
	return sum;
}

/* Counts one result of feature(n). */
struct tally {
	atomic_long right, denied, wrong;
};

static inline __attribute__((unused)) void count(struct tally *tally, long n, long result)
{
	atomic_long *counter = &tally->wrong;

	if (result == expected_feature(n))
		counter = &tally->right;
	else if (result == DENIED)
		counter = &tally->denied;
	atomic_fetch_add_explicit(counter, 1, memory_order_relaxed);
}

static inline __attribute__((unused)) void say_ready(void)
{
	setvbuf(stdout, NULL, _IOLBF, BUFSIZ);
	puts("ready");
}

/* Reads `word` or `word number`; false at the end of the input. */
static inline __attribute__((unused)) bool next_line(char word[32], long *number)
{
	char line[128];

	if (fgets(line, sizeof(line), stdin) == NULL)
		return false;
	word[0] = '\0';
	*number = 0;
	sscanf(line, "%31s %ld", word, number);
	return true;
}

static inline __attribute__((noreturn, unused)) void fail(const char *what)
{
	perror(what);
	exit(99);
}

#endif
