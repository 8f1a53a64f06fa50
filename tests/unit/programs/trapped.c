/* Runs the handler blob in its own process, without ptrace: maps a region file as dynacut maps it into a target, and does
 * what it reads on stdin, one command a line, one answer a line. Linked for a fixed address, so that nm tells where the
 * functions are. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define CODE_SIZE 0x20000
#define OBSERVED 104
#define MAX_THREADS 8
#define MAX_VALUES 16

/* The code that is patched: each function computes something from its argument, in known bytes. */
__asm__(".text\n"
	".balign 4096\n"
	".globl plain\nplain:\n"
	"	leaq 1(%rdi), %rax\n"
	"	ret\n"
	".balign 16\n"
	".globl other\nother:\n"
	"	leaq 2(%rdi), %rax\n"
	"	ret\n"
	".balign 16\n"
	".globl steps\nsteps:\n"
	"	movq %rdi, %rax\n" /* +0 */
	"	addq $1, %rax\n" /* +3 */
	"	addq $2, %rax\n" /* +7 */
	"	addq $4, %rax\n" /* +11 */
	"	ret\n" /* +15 */
	".balign 16\n"
	".globl redzone\nredzone:\n"
	"	movq %rdi, -8(%rsp)\n" /* +0 */
	"	nop\n" /* +5 */
	"	movq -8(%rsp), %rax\n"
	"	ret\n"
	".balign 16\n"
	".globl breakpoint\nbreakpoint:\n"
	"	leaq 7(%rdi), %rax\n"
	"	int3\n" /* +4 */
	"	ret\n"
	".balign 16\n"
	".globl software\nsoftware:\n"
	"	leaq 8(%rdi), %rax\n"
	"	.byte 0xcd, 0x03\n" /* int $3 */
	"	ret\n"
	".balign 16\n"
	".globl lookalike\nlookalike:\n"
	"	movl $0xcd000000, %eax\n" /* ends in cd */
	"	.byte 0x03, 0xc7\n" /* +5: add %edi, %eax */
	"	ret\n"
	".balign 4096\n"
	/* Calls an address with one value in both rdi and rax, so that blocks can be entered in their midst. */
	".globl enter\nenter:\n"
	"	movq %rdi, %rdx\n"
	"	movq %rsi, %rdi\n"
	"	movq %rsi, %rax\n"
	"	jmp *%rdx\n");
extern uint64_t enter(uint64_t address, uint64_t value);

static char *region;
static int memory;
static volatile int handled, handled_code;
static volatile uint64_t handled_mask;

static uint64_t blocked(void)
{
	uint64_t mask = 0;
	syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &mask, 8);
	return mask;
}

static void own_handler(int number, siginfo_t *info, void *context)
{
	(void)number, (void)context;
	handled++;
	handled_code = info->si_code;
	handled_mask = blocked();
}

/* As of a user's library: goes on `user_step` bytes after the trap. */
static volatile int user_calls;
static volatile long user_step;
static volatile uint64_t user_mask;

void user_handler(int number, siginfo_t *info, void *context)
{
	(void)number, (void)info;
	user_calls++;
	user_mask = blocked();
	((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] += user_step - 1;
}

static void poke(uint64_t address, const char *hex)
{
	unsigned char bytes[4096];
	size_t count = 0;
	for (unsigned byte; sscanf(hex + 2 * count, "%2x", &byte) == 1; count++)
		bytes[count] = byte;
	if (pwrite(memory, bytes, count, address) != (ssize_t)count)
		abort();
}

struct hammer {
	pthread_t thread;
	uint64_t address, values[MAX_VALUES];
	_Atomic uint64_t calls;
	int count;
};
static struct hammer hammers[MAX_THREADS];
static int hammer_count;
static atomic_int stop;

static void *hammer(void *argument)
{
	struct hammer *own = argument;
	while (!atomic_load(&stop)) {
		uint64_t value = enter(own->address, 0);
		int index = 0;
		while (index < own->count && own->values[index] != value)
			index++;
		if (index == own->count && own->count < MAX_VALUES)
			own->values[own->count++] = value;
		own->calls++;
	}
	return NULL;
}

static void run(char *line)
{
	uint64_t a = 0, b = 0;
	char word[32] = "", hex[8200] = "";

	if (sscanf(line, "call %lx %ld", &a, &b) == 2) {
		uint64_t value = enter(a, b);
		printf("%ld %lx\n", value, blocked());
	} else if (sscanf(line, "poke %lx %8199s", &a, hex) == 2) {
		poke(a, hex);
		puts("ok");
	} else if (sscanf(line, "peek %lx %ld", &a, &b) == 2) {
		for (uint64_t i = 0; i < b; i++)
			printf("%02x", *(unsigned char *)(a + i));
		puts("");
	} else if (strncmp(line, "install", 7) == 0) {
		struct { uint64_t handler, flags, restorer, mask; } action = { (uint64_t)region, 0, (uint64_t)region, 0 };
		if (sscanf(line, "install %lx %lx %lx", &a, &action.flags, &b) != 3)
			abort();
		action.handler += a;
		action.restorer += b;
		printf("%ld\n", syscall(SYS_rt_sigaction, SIGTRAP, &action, region + CODE_SIZE + OBSERVED, 8));
	} else if (sscanf(line, "own %31s %lx", word, &a) == 2) {
		/* The program's own action for SIGTRAP; a: its flags. */
		struct sigaction action = { .sa_flags = a };
		sigaddset(&action.sa_mask, SIGUSR1);
		if (strcmp(word, "handler") == 0)
			action.sa_sigaction = own_handler;
		else
			action.sa_handler = strcmp(word, "ignore") == 0 ? SIG_IGN : SIG_DFL;
		sigaction(SIGTRAP, &action, NULL);
		puts("ok");
	} else if (strcmp(line, "handled") == 0) {
		printf("%d %d %lx\n", handled, handled_code, handled_mask);
	} else if (sscanf(line, "step %ld", &a) == 1) {
		user_step = (long)a;
		puts("ok");
	} else if (strcmp(line, "used") == 0) {
		printf("%d %lx\n", user_calls, user_mask);
	} else if (strcmp(line, "kill") == 0) {
		kill(getpid(), SIGTRAP);
		puts("alive");
	} else if (strcmp(line, "nofile") == 0) {
		struct rlimit none = { 0, 0 };
		setrlimit(RLIMIT_NOFILE, &none);
		puts("ok");
	} else if (sscanf(line, "jail %4095s", hex) == 1) {
		if (geteuid() != 0 && unshare(CLONE_NEWUSER) != 0)
			puts("denied");
		else
			puts(chroot(hex) == 0 ? "ok" : "denied");
	} else if (sscanf(line, "direct %lx %ld", &a, &b) == 2) {
		/* The handler, called with the context of a trap that lies back: rip and si_code as told. */
		static uint64_t stack[2] = { 0x1234, 0x5678 };
		siginfo_t info = { .si_signo = SIGTRAP, .si_code = (int)b };
		static ucontext_t context;
		context.uc_mcontext.gregs[REG_RIP] = a;
		context.uc_mcontext.gregs[REG_RAX] = 0x77;
		context.uc_mcontext.gregs[REG_RSP] = (long long)stack;
		((void (*)(int, siginfo_t *, void *))(region + 16))(SIGTRAP, &info, &context);
		printf("%llx %llx %lld\n", context.uc_mcontext.gregs[REG_RIP], context.uc_mcontext.gregs[REG_RAX],
		       context.uc_mcontext.gregs[REG_RSP] - (long long)stack);
	} else if (sscanf(line, "hammer %lx", &a) == 1) {
		memset(&hammers[hammer_count], 0, sizeof(struct hammer));
		hammers[hammer_count].address = a;
		if (pthread_create(&hammers[hammer_count].thread, NULL, hammer, &hammers[hammer_count]) != 0)
			abort();
		while (hammers[hammer_count].calls == 0)
			sched_yield();
		hammer_count++;
		puts("ok");
	} else if (sscanf(line, "toggle %ld %lx %31s %8199s", &b, &a, word, hex) == 4) {
		for (uint64_t i = 0; i < b; i++) {
			poke(a, word);
			sched_yield();
			poke(a, hex);
			sched_yield();
		}
		puts("ok");
	} else if (strncmp(line, "plant ", 6) == 0) {
		uint64_t c = 0, rounds = 0;
		if (sscanf(line, "plant %ld %lx %lx %lx", &rounds, &a, &b, &c) != 4)
			abort();
		for (; rounds > 0; rounds--) {
			poke(a, "cc");
			poke(b, "cc");
			poke(c, "cc");
		}
		puts("ok");
	} else if (strcmp(line, "stop") == 0) {
		atomic_store(&stop, 1);
		for (int i = 0; i < hammer_count; i++) {
			pthread_join(hammers[i].thread, NULL);
			printf("%ld:", hammers[i].calls);
			for (int k = 0; k < hammers[i].count; k++)
				printf("%s%ld", k ? "," : "", hammers[i].values[k]);
			fputs(i + 1 < hammer_count ? " " : "", stdout);
		}
		hammer_count = 0;
		atomic_store(&stop, 0);
		puts("");
	} else {
		fprintf(stderr, "not understood: %s\n", line);
		abort();
	}
}

int main(int count, char **arguments)
{
	if (count != 4)
		return 99;
	uint64_t address = strtoul(arguments[2], NULL, 16), size = strtoul(arguments[3], NULL, 16);
	int file = open(arguments[1], O_RDWR);

	region = mmap((void *)address, CODE_SIZE, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED_NOREPLACE, file, 0);
	if (region != (char *)address ||
	    mmap(region + CODE_SIZE, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, file, CODE_SIZE) !=
		    region + CODE_SIZE)
		return 98;
	close(file);
	memory = open("/proc/self/mem", O_RDWR);
	alarm(60); /* a test that hangs must end */
	setrlimit(RLIMIT_CORE, &(struct rlimit){ 0, 0 });
	setvbuf(stdout, NULL, _IOLBF, 0);
	puts("ready");
	for (char line[9000]; fgets(line, sizeof(line), stdin);) {
		line[strcspn(line, "\n")] = 0;
		run(line);
	}
	return 0;
}
