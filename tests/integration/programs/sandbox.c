/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Runs a program under seccomp filters as systemd makes them for a service: by SystemCallFilter=~NUMBER... (`deny`: they
 * fail with EPERM; `kill`: they end the process) and MemoryDenyWriteExecute=; or by SystemCallFilter=NUMBER...
 * (`only`: all others end the process).
 *
 *   sandbox deny|kill|only NUMBER... -- COMMAND ARGUMENT...
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MOST 200 /* a jump leads over 255 instructions at most */
#define AT(field) offsetof(struct seccomp_data, field)

static void install(struct sock_filter *code, unsigned short length)
{
	struct sock_fprog program = { .len = length, .filter = code };

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
	    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0) != 0) {
		perror("sandbox");
		exit(99);
	}
}

static void deny_writable_code(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, AT(nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mprotect, 4, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mmap, 0, 6),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, AT(args[2])),
		BPF_STMT(BPF_ALU | BPF_AND | BPF_K, PROT_WRITE | PROT_EXEC),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, PROT_WRITE | PROT_EXEC, 2, 3),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, AT(args[2])),
		BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, PROT_EXEC, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};

	install(code, sizeof(code) / sizeof(code[0]));
}

int main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "";
	unsigned listed = strcmp(mode, "deny") == 0   ? SECCOMP_RET_ERRNO | EPERM
			  : strcmp(mode, "kill") == 0 ? SECCOMP_RET_KILL_PROCESS
						      : SECCOMP_RET_ALLOW;
	unsigned others = strcmp(mode, "only") == 0 ? SECCOMP_RET_KILL_PROCESS : SECCOMP_RET_ALLOW;
	struct sock_filter code[MOST + 6];
	int count = 0, length = 0;

	while (2 + count < argc && strcmp(argv[2 + count], "--") != 0)
		count++;
	if (3 + count >= argc || count > MOST)
		return 2;
	code[length++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, AT(arch));
	code[length++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0);
	code[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
	code[length++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, AT(nr));
	for (int i = 0; i < count; i++)
		code[length++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K,
							      (unsigned)atoi(argv[2 + i]), count - i, 0);
	code[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, others);
	code[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, listed);
	if (strcmp(mode, "only") != 0)
		deny_writable_code();
	install(code, (unsigned short)length);
	execv(argv[3 + count], argv + 3 + count);
	perror(argv[3 + count]);
	return 1;
}
