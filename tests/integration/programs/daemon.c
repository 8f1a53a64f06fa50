/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Puts itself into the background: daemon PID_FILE WORK_FILE. The first process ends at once. What it leaves writes its
 * pid to PID_FILE, works when WORK_FILE appears (and removes it), and ends when PID_FILE is removed.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <unistd.h>

#include "feature.h"

__attribute__((noinline)) static long work(long n)
{
	return feature(n) ^ (n & 1 ? 3 : 5);
}

int main(int count, char **arguments)
{
	char unfinished[4096];

	if (count != 3)
		return 2;
	if (fork() != 0)
		return 0;
	setsid();
	snprintf(unfinished, sizeof(unfinished), "%s.new", arguments[1]);
	FILE *file = fopen(unfinished, "w");
	if (file == NULL)
		return 1;
	fprintf(file, "%d\n", (int)getpid());
	fclose(file);
	if (rename(unfinished, arguments[1]) != 0)
		return 1;
	puts("in the background");
	fflush(stdout);
	int nothing = open("/dev/null", O_RDWR);
	for (int standard = 0; standard < 3; standard++)
		dup2(nothing, standard);
	while (access(arguments[1], F_OK) == 0) {
		if (access(arguments[2], F_OK) == 0) {
			if (work(getpid()) == 0)
				return 1;
			unlink(arguments[2]);
		}
		usleep(2000);
	}
	return 0;
}
