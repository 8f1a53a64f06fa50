/* SPDX-License-Identifier: GPL-2.0-only
 *
 * unreaped FILE COUNT: leaves children that have ended with status 3 as zombies, until SIGUSR1; then it asks how they
 * ended, writes these statuses and feature(2) to FILE, and ends.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "feature.h"

int main(int count, char **words)
{
	sigset_t wanted;
	int number, status;

	sigemptyset(&wanted);
	sigaddset(&wanted, SIGUSR1);
	sigprocmask(SIG_BLOCK, &wanted, NULL);
	for (int i = count > 2 ? atoi(words[2]) : 0; i > 0; i--)
		if (fork() == 0)
			_exit(3);
	sigwait(&wanted, &number);
	FILE *file = fopen(words[1], "w");
	if (file == NULL)
		fail(words[1]);
	while (wait(&status) > 0)
		fprintf(file, "%d ", WIFEXITED(status) ? WEXITSTATUS(status) : -1);
	fprintf(file, "%ld\n", feature(2));
	return fclose(file);
}
