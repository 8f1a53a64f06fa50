/* SPDX-License-Identifier: GPL-2.0-only
 *
 * 10,000 functions to patch, 64 bytes apart: together about as much text as a server's. Each returns its argument + 1.
 */
#ifndef SITES_H
#define SITES_H

#define SITES 10000
#define SITE_DISTANCE 64

extern const char sites[];

__asm__(".text\n"
	".globl sites\n"
	".type sites, @function\n"
	"	.p2align 12\n" /* the same number of pages in every build */
	"sites:\n"
	"	.rept 10000\n"
	"	.p2align 6\n"
	"	.cfi_startproc\n"
	"	leaq 1(%rdi), %rax\n"
	"	ret\n"
	"	.cfi_endproc\n"
	"	.endr\n"
	"	.p2align 12\n"
	".size sites, . - sites\n");

#endif
