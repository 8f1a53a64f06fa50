/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Forks children that call feature().
 *
 *   feature 3 -> feature(3)
 *   fork 3  -> exit 0 result R | signal S       (a child that calls feature(3) and ends)
 *   spawn   -> PID                              (a child that stays)
 *   exec    -> PID                              (a child that runs another program)
 *   each 3  -> R0 R1 ...                        (feature(3) of each child that stays, `gone` for one that ended)
 */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "feature.h"

#define MOST 16
static struct {
	int request, answer;
} kept[MOST];
static int kept_count;

static void fork_once(long n)
{
	int answer[2], status;
	long result = 0;

	if (pipe(answer) != 0)
		fail("pipe");
	pid_t child = fork();
	if (child < 0)
		fail("fork");
	if (child == 0) {
		result = feature(n);
		_exit(write(answer[1], &result, sizeof(result)) == sizeof(result) ? 0 : 1);
	}
	close(answer[1]);
	ssize_t size = read(answer[0], &result, sizeof(result));
	close(answer[0]);
	if (waitpid(child, &status, 0) != child)
		fail("waitpid");
	if (WIFSIGNALED(status))
		printf("signal %d\n", WTERMSIG(status));
	else if (size == sizeof(result))
		printf("exit %d result %ld\n", WEXITSTATUS(status), result);
	else
		printf("exit %d\n", WEXITSTATUS(status));
}

static void spawn(void)
{
	int request[2], answer[2];
	pid_t parent = getpid();

	if (kept_count == MOST || pipe(request) != 0 || pipe(answer) != 0)
		fail("spawn");
	pid_t child = fork();
	if (child < 0)
		fail("fork");
	if (child == 0) {
		long n, result;
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != parent)
			_exit(1);
		close(request[1]);
		close(answer[0]);
		while (read(request[0], &n, sizeof(n)) == sizeof(n)) {
			result = feature(n);
			if (write(answer[1], &result, sizeof(result)) != sizeof(result))
				break;
		}
		_exit(0);
	}
	close(request[0]);
	close(answer[1]);
	kept[kept_count].request = request[1];
	kept[kept_count].answer = answer[0];
	kept_count++;
	printf("%d\n", (int)child);
}

static void execute(void)
{
	pid_t child = vfork(); /* back when the other program runs */

	if (child < 0)
		fail("vfork");
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		execlp("sleep", "sleep", "1000", (char *)NULL);
		_exit(1);
	}
	printf("%d\n", (int)child);
}

static void each(long n)
{
	for (int i = 0; i < kept_count; i++) {
		long result;
		const char *gap = i ? " " : "";
		if (write(kept[i].request, &n, sizeof(n)) == sizeof(n) &&
		    read(kept[i].answer, &result, sizeof(result)) == sizeof(result))
			printf("%s%ld", gap, result);
		else
			printf("%sgone", gap);
	}
	putchar('\n');
}

int main(void)
{
	char word[32];
	long number;

	signal(SIGPIPE, SIG_IGN);
	say_ready();
	while (next_line(word, &number)) {
		if (strcmp(word, "feature") == 0)
			printf("%ld\n", feature(number));
		else if (strcmp(word, "fork") == 0)
			fork_once(number);
		else if (strcmp(word, "spawn") == 0)
			spawn();
		else if (strcmp(word, "exec") == 0)
			execute();
		else if (strcmp(word, "each") == 0)
			each(number);
		else
			puts("?");
	}
	return 0;
}
