/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Blocks in one large write to a pipe that is full, until its child is told to read: a stop would cut the write short.
 *
 *   (at once) -> ready
 *   read      -> wrote N of M     (N is M, unless something disturbed the write)
 *   feature 3 -> feature(3)       (from then on)
 */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "feature.h"

static char data[1 << 20];

/* Waits for a line on stdin, then reads the pipe until its end. */
static void drain(int file)
{
	char byte;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	while (read(STDIN_FILENO, &byte, 1) == 1 && byte != '\n')
		;
	while (read(file, data, sizeof(data)) > 0)
		;
	_exit(0);
}

int main(void)
{
	char word[32];
	long number;
	int files[2];

	if (pipe(files) != 0)
		fail("pipe");
	pid_t child = fork();
	if (child < 0)
		fail("fork");
	if (child == 0) {
		close(files[1]);
		drain(files[0]);
	}
	close(files[0]);
	say_ready();
	ssize_t written = write(files[1], data, sizeof(data));
	close(files[1]);
	waitpid(child, NULL, 0);
	printf("wrote %zd of %zu\n", written, sizeof(data));
	while (next_line(word, &number)) {
		if (strcmp(word, "feature") == 0)
			printf("%ld\n", feature(number));
		else
			puts("?");
	}
	return 0;
}
