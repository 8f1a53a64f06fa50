/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Sits in vfork, where it cannot be stopped, until the child is told to end. With an argument: in waitpid, the child
 * having its memory all the same.
 *
 *   (at once) -> ready, then: child PID
 *   wake      -> resumed 0            (the child has ended, with this status)
 *   exec      -> resumed STATUS       (the child runs another program; once that has ended)
 *   feature 3 -> feature(3)           (once resumed)
 */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "feature.h"

/* In the child, on the parent's memory: only system calls. */
static int run_child(void *unused)
{
	char line[32] = "child ", digits[16], byte;
	size_t length = strlen(line);
	int used = 0;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (pid_t pid = getpid(); pid > 0; pid /= 10)
		digits[used++] = (char)('0' + pid % 10);
	while (used > 0)
		line[length++] = digits[--used];
	line[length++] = '\n';
	if (write(STDOUT_FILENO, line, length) != (ssize_t)length)
		_exit(1);
	for (used = 0; read(STDIN_FILENO, &byte, 1) == 1 && byte != '\n'; used++)
		digits[used % (int)sizeof(digits)] = byte;
	if (digits[0] == 'e')
		execlp("sleep", "sleep", "1000", (char *)NULL);
	_exit(0);
	return *(int *)unused;
}

int main(int count, char **arguments)
{
	static char stack[1 << 16] __attribute__((aligned(16)));
	char word[32];
	long number;
	int status;

	say_ready();
	pid_t child = count > 1 ? clone(run_child, stack + sizeof(stack), CLONE_VM | SIGCHLD, arguments) : vfork();
	if (child < 0)
		fail("vfork");
	if (child == 0)
		run_child(NULL);
	if (waitpid(child, &status, 0) != child)
		fail("waitpid");
	printf("resumed %d\n", status);
	while (next_line(word, &number)) {
		if (strcmp(word, "feature") == 0)
			printf("%ld\n", feature(number));
		else
			puts("?");
	}
	return 0;
}
