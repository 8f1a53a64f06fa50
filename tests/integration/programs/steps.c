/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Functions whose every instruction is known, for actions amid a function and for plain edits.
 *
 *   steps 3   -> 3 + 1 + 10 + 100
 *   choose 0  -> 2          choose 3 -> 1       (a conditional jump of two bytes)
 *   feature 3 -> feature(3)
 */
#define _GNU_SOURCE
#include "feature.h"

long steps(long n);
long choose(long n);
__asm__(".text\n"
	".macro begin name\n"
	".globl \\name\n"
	".type \\name, @function\n"
	"\\name:\n"
	".cfi_startproc\n"
	".endm\n"
	".macro finish name\n"
	"ret\n"
	".cfi_endproc\n"
	".size \\name, . - \\name\n"
	".endm\n"
	"begin steps\n"
	"	leaq 1(%rdi), %rax\n" /* 4 bytes: steps + 0 */
	"	addq $10, %rax\n" /* 4 bytes: steps + 4 */
	"	addq $100, %rax\n" /* 4 bytes: steps + 8 */
	"finish steps\n" /* steps + 12 */
	"begin choose\n"
	"	testq %rdi, %rdi\n" /* 3 bytes: choose + 0 */
	"	je 1f\n" /* 2 bytes: choose + 3 */
	"	movl $1, %eax\n" /* 5 bytes: choose + 5 */
	"	ret\n" /* choose + 10 */
	"1:	movl $2, %eax\n" /* 5 bytes: choose + 11 */
	"finish choose\n"); /* choose + 16 */

int main(void)
{
	char word[32];
	long number;

	say_ready();
	while (next_line(word, &number)) {
		if (strcmp(word, "steps") == 0)
			printf("%ld\n", steps(number));
		else if (strcmp(word, "choose") == 0)
			printf("%ld\n", choose(number));
		else if (strcmp(word, "feature") == 0)
			printf("%ld\n", feature(number));
		else
			puts("?");
	}
	return 0;
}
