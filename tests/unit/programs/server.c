/* A target for unit tests: never run, only mapped into a dictionary. Its code is written out, so that each offset is known. */

__asm__(".text\n"
	".globl alpha\n.type alpha, @function\nalpha:\n.cfi_startproc\n"
	"	pushq %rbp\n" /* +0: 55 */
	"	movq %rsp, %rbp\n" /* +1: 48 89 e5 */
	"	movl $1, %eax\n" /* +4: b8 01 00 00 00 */
	"	testl %edi, %edi\n" /* +9: 85 ff */
	"	je 1f\n" /* +11: 74 05 */
	"	movl $2, %eax\n" /* +13: b8 02 00 00 00 */
	"1:	popq %rbp\n" /* +18: 5d */
	"	ret\n" /* +19: c3 */
	".cfi_endproc\n.size alpha, .-alpha\n"
	".globl beta\n.type beta, @function\nbeta:\n.cfi_startproc\n"
	"	movl $5, %eax\n" /* +0: b8 05 00 00 00 */
	"	ret\n" /* +5 */
	".cfi_endproc\n.size beta, .-beta\n"
	".globl stopping\n.type stopping, @function\nstopping:\n.cfi_startproc\n"
	"	nop\n"
	"	int3\n" /* +1 */
	"	ret\n"
	".cfi_endproc\n.size stopping, .-stopping\n"
	/* In no function that .eh_frame describes. */
	".globl undescribed\n.type undescribed, @function\nundescribed:\n"
	"	nop\n"
	"	ret\n"
	".size undescribed, .-undescribed\n");

int counter = 4711;

static __attribute__((noinline, used)) int twice(int value)
{
	return 2 * value + counter;
}

int main(int count, char **arguments)
{
	(void)arguments;
	return twice(count); /* the line with the call */
}
