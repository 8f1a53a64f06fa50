/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Threads that keep values in the floating-point and vector registers and check them all the time: half of them across
 * calls of feature(), which a patch makes trap, half of them without any call.
 *
 *   crunch [N]           N threads of each kind, 1 unless told
 *   feature 3 -> feature(3)
 *   report    -> calls C denied D rounds R wrong W       (calls with all registers checked; rounds without calls)
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>

#include "feature.h"

static atomic_long calls, refused, rounds, wrong;

/* Fills 16 vector registers, calls feature(3), stores the registers. The stack pointer is moved past the red zone,
 * which the compiler may be using. feature() and denied() use integer registers only. */
#define CALL_WITH(load, store)                                                                                        \
	__asm__ volatile(load "\n"                                                                                    \
			 "movq %%rsp, %%rbx\n"                                                                        \
			 "leaq -128(%%rsp), %%rsp\n"                                                                  \
			 "andq $-64, %%rsp\n"                                                                         \
			 "movl $3, %%edi\n"                                                                           \
			 "call feature\n"                                                                             \
			 "movq %%rbx, %%rsp\n"                                                                        \
			 store "\n"                                                                                   \
			 : "=a"(result)                                                                               \
			 : "r"(in), "r"(out)                                                                          \
			 : "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "memory", "cc", "xmm0",       \
			   "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",  \
			   "xmm12", "xmm13", "xmm14", "xmm15")

#define FOR_ALL(body)                                                                                                 \
	".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15\n" body "\n.endr"

static NOIPA long call_sse(const uint8_t *values, uint8_t *stored)
{
	register const uint8_t *in __asm__("r12") = values;
	register uint8_t *out __asm__("r13") = stored;
	long result;

	CALL_WITH(FOR_ALL("movdqu 32*\\n(%%r12), %%xmm\\n"), FOR_ALL("movdqu %%xmm\\n, 32*\\n(%%r13)"));
	return result;
}

__attribute__((target("avx"))) static NOIPA long call_avx(const uint8_t *values, uint8_t *stored)
{
	register const uint8_t *in __asm__("r12") = values;
	register uint8_t *out __asm__("r13") = stored;
	long result;

	CALL_WITH(FOR_ALL("vmovdqu 32*\\n(%%r12), %%ymm\\n"), FOR_ALL("vmovdqu %%ymm\\n, 32*\\n(%%r13)"));
	__asm__ volatile("vzeroupper" ::: "xmm0");
	return result;
}

static uint32_t control_words(void)
{
	uint32_t mxcsr;
	uint16_t x87;

	__asm__ volatile("stmxcsr %0" : "=m"(mxcsr));
	__asm__ volatile("fnstcw %0" : "=m"(x87));
	return (mxcsr & 0xffc0) << 16 | x87; /* the control bits; the others are sticky flags */
}

static void *call(void *unused)
{
	uint8_t in[16][32], out[16][32];
	bool avx = __builtin_cpu_supports("avx");
	uint32_t seed = 1, control = control_words();

	(void)unused;
	memset(out, 0, sizeof(out));
	for (;;) {
		for (int i = 0; i < 16; i++)
			for (int j = 0; j < 32; j++)
				in[i][j] = (uint8_t)((seed = seed * 1664525u + 1013904223u) >> 24);
		long result = avx ? call_avx(in[0], out[0]) : call_sse(in[0], out[0]);
		bool same = control_words() == control;
		for (int i = 0; i < 16; i++)
			same = same && memcmp(in[i], out[i], avx ? 32 : 16) == 0;
		if (!same || (result != expected_feature(3) && result != DENIED))
			atomic_fetch_add(&wrong, 1);
		if (result == DENIED)
			atomic_fetch_add(&refused, 1);
		atomic_fetch_add(&calls, 1);
	}
	return NULL;
}

/* A chaotic sequence: one wrong bit at any step gives another end. The x87 and the vector unit each do one. */
static __attribute__((noinline)) void sequence(double ends[5])
{
	typedef double vector __attribute__((vector_size(32)));
	vector x = { 0.1, 0.2, 0.3, 0.4 };
	long double y = 0.7L;

	for (int i = 0; i < 2000; i++) {
		x = x * (1.0 - x) * 3.9;
		y = 3.9L * y * (1.0L - y);
	}
	for (int i = 0; i < 4; i++)
		ends[i] = x[i];
	ends[4] = (double)y;
}

static void *compute(void *unused)
{
	double first[5], ends[5];

	(void)unused;
	sequence(first);
	for (;;) {
		sequence(ends);
		if (memcmp(first, ends, sizeof(ends)) != 0)
			atomic_fetch_add(&wrong, 1);
		atomic_fetch_add(&rounds, 1);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	int threads = argc > 1 ? atoi(argv[1]) : 1;
	char word[32];
	long number;

	for (int i = 0; i < 2 * threads; i++) {
		pthread_t thread;
		if (pthread_create(&thread, NULL, i % 2 ? compute : call, NULL) != 0)
			fail("pthread_create");
	}
	say_ready();
	while (next_line(word, &number)) {
		if (strcmp(word, "feature") == 0)
			printf("%ld\n", feature(number));
		else if (strcmp(word, "report") == 0)
			printf("calls %ld denied %ld rounds %ld wrong %ld\n", calls, refused, rounds, wrong);
		else
			puts("?");
	}
	return 0;
}
