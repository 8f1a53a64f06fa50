/* SPDX-License-Identifier: GPL-2.0-only
 *
 * A restartable sequence (rseq(2)), whose abort handler gives another result.
 *
 *   sequence 3 -> 8, or -7 if the sequence was aborted
 *   feature 3  -> feature(3)
 */
#define _GNU_SOURCE
#include <linux/rseq.h>
#include <stddef.h>

#include "feature.h"

extern const ptrdiff_t __rseq_offset;
extern const unsigned int __rseq_size;

NOIPA long sequence(long n)
{
	struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);

	__asm__ volatile(".pushsection .data.rel.ro,\"aw\"\n"
			 "	.balign 32\n"
			 "9:	.long 0, 0\n"
			 "	.quad 1f, 2f - 1f, 4f\n"
			 "	.popsection\n"
			 "	lea 9b(%%rip), %%rax\n"
			 "	mov %%rax, %1\n"
			 "1:\n"
			 "	.globl in_sequence\n"
			 "in_sequence:\n"
			 "	add $5, %0\n"
			 "	nop\n"
			 "2:	jmp 5f\n"
			 "	.long 0x53053053\n"
			 "4:	mov $-7, %0\n"
			 "5:\n"
			 : "+r"(n), "=m"(area->rseq_cs)
			 :
			 : "rax", "memory");
	return n;
}

int main(void)
{
	char word[32];
	long number;

	if (__rseq_size == 0)
		return CANNOT_RUN;
	say_ready();
	while (next_line(word, &number))
		printf("%ld\n", strcmp(word, "sequence") == 0 ? sequence(number) : feature(number));
	return 0;
}
