/* Runs a stub in its own process: sets registers and flags, jumps to it, and prints what they are where it resumes. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define AREA 0x300000000000

__asm__(".text\n"
	".globl run_stub\nrun_stub:\n"
	"	pushq %rbx; pushq %rbp; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
	"	movq %rdi, target(%rip)\n"
	"	movq %rsp, before_rsp(%rip)\n"
	/* What the stub must leave alone, and what its tail must set. */
	"	movq $0x1111, %rbx; movq $0x2222, %rbp; movq $0x3333, %r12\n"
	"	movq $0x4444, %r13; movq $0x5555, %r14; movq $0x6666, %r15\n"
	"	movq $-1, %rax; movq $-1, %rcx; movq $-1, %rdx; movq $-1, %rdi; movq $-1, %r8; movq $-1, %r9\n"
	"	movq $-1, %r10; movq $-1, %r11\n"
	"	pushq %rsi; popfq\n"
	"	movq $-1, %rsi\n"
	/* The red zone: nothing may be written below the stack pointer. */
	"	movq $0x7777, -8(%rsp); movq $0x8888, -128(%rsp)\n"
	"	jmp *target(%rip)\n"
	".globl resumed\nresumed:\n"
	"	movq %rax, registers+0(%rip); movq %rcx, registers+8(%rip); movq %rdx, registers+16(%rip)\n"
	"	movq %rsi, registers+24(%rip); movq %rdi, registers+32(%rip); movq %r8, registers+40(%rip)\n"
	"	movq %r9, registers+48(%rip); movq %r10, registers+56(%rip); movq %r11, registers+64(%rip)\n"
	"	movq %rbx, registers+72(%rip); movq %rbp, registers+80(%rip); movq %r12, registers+88(%rip)\n"
	"	movq %r13, registers+96(%rip); movq %r14, registers+104(%rip); movq %r15, registers+112(%rip)\n"
	"	movq %rsp, after_rsp(%rip)\n"
	"	movq -8(%rsp), %rax; movq %rax, registers+120(%rip)\n"
	"	movq -128(%rsp), %rax; movq %rax, registers+128(%rip)\n"
	"	movq before_rsp(%rip), %rsp\n"
	"	pushfq; popq registers+136(%rip)\n"
	"	cld\n"
	"	popq %r15; popq %r14; popq %r13; popq %r12; popq %rbp; popq %rbx\n"
	"	ret\n");
extern void run_stub(void *code, uint64_t flags);
extern char resumed[];
uint64_t target, before_rsp, after_rsp, registers[18];
static const char *const names[] = { "rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "rbx", "rbp",
				     "r12", "r13", "r14", "r15", "redzone8", "redzone128", "flags" };

int main(int count, char **arguments)
{
	static unsigned char code[65536];
	FILE *file = count == 3 ? fopen(arguments[1], "rb") : NULL;
	uint64_t *area = mmap((void *)AREA, 4096, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

	if (file == NULL || area != (uint64_t *)AREA)
		return 99;
	size_t size = fread(code, 1, sizeof(code), file);
	void *stub = mmap(NULL, sizeof(code), PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memcpy(stub, code, size);
	run_stub(stub, strtoul(arguments[2], NULL, 16));
	for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++)
		printf("%s %lx\n", names[i], registers[i]);
	printf("rsp %d\n", before_rsp == after_rsp);
	printf("area0 %lx\narea1 %lx\n", area[0], area[1]);
	return 0;
}
