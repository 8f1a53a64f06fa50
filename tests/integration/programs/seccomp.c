/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Installs a seccomp filter (mode 2): for mmap and rt_sigaction, what a live patch needs in the target, it gives an
 * error (`errno`) or ends the process (`kill`); `allow` allows everything; `none` installs nothing; `strict` is mode 1.
 * Where a second kind is given, a second thread installs that for itself, and waits.
 *
 *   seccomp allow|errno|kill|none|strict [allow|errno|kill]
 *   feature 3 -> feature(3)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "feature.h"

static void install(unsigned action)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mmap, 1, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_rt_sigaction, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, action),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { .len = sizeof(code) / sizeof(code[0]), .filter = code };

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
	    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0) != 0)
		fail("seccomp");
}

static void install_kind(const char *kind)
{
	if (strcmp(kind, "errno") == 0)
		install(SECCOMP_RET_ERRNO | EPERM);
	else if (strcmp(kind, "kill") == 0)
		install(SECCOMP_RET_KILL_PROCESS);
	else if (strcmp(kind, "allow") == 0)
		install(SECCOMP_RET_ALLOW);
}

static pthread_barrier_t installed;

static void *second_thread(void *kind)
{
	install_kind(kind);
	pthread_barrier_wait(&installed);
	pause();
	return NULL;
}

int main(int argc, char **argv)
{
	const char *kind = argc > 1 ? argv[1] : "allow";
	static char input[BUFSIZ];
	char word[32];
	long number;

	setvbuf(stdin, input, _IOFBF, sizeof(input)); /* or stdio would mmap a buffer */
	if (argc > 2) {
		pthread_t thread;

		pthread_barrier_init(&installed, NULL, 2);
		if (pthread_create(&thread, NULL, second_thread, argv[2]) != 0)
			fail("pthread_create");
		pthread_barrier_wait(&installed);
	}
	install_kind(kind);
	say_ready();
	if (strcmp(kind, "strict") == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT, 0, 0, 0) != 0)
		fail("strict");
	while (next_line(word, &number)) {
		if (strcmp(word, "feature") == 0)
			printf("%ld\n", feature(number));
		else
			puts("?");
	}
	return 0;
}
