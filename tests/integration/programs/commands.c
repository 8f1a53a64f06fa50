/* SPDX-License-Identifier: GPL-2.0-only
 *
 * A server with a table of commands, and its client.
 *
 *   commands PORT            serves on 127.0.0.1: a line is a command, its answer a line that begins with + or -
 *   commands PORT WORD …     sends a command; exit status 0 if the answer begins with +
 *
 * What would be tried first in the place of `store` is `leave`: all it does sounds like a refusal. But it ends the server.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include "feature.h"

static char stored[64] = "nothing";
static volatile int may_write = 1;

NOIPA static void say(int client, const char *text)
{
	dprintf(client, "%s\n", text);
}

NOIPA static void leave(int client, const char *word)
{
	(void)word;
	say(client, "-ERR refused, the server is shut down");
	exit(3);
}

NOIPA static void store(int client, const char *word)
{
	if (strlen(word) >= sizeof(stored)) {
		say(client, "-ERR too long");
		return;
	}
	strcpy(stored, word);
	for (char *letter = stored; *letter; letter++)
		if (*letter == '\t')
			*letter = ' ';
	say(client, "+stored");
}

NOIPA static void lock(int client, const char *word)
{
	if (!may_write || *word) {
		say(client, "-ERR lock is not supported here");
		return;
	}
	say(client, "+locked");
}

NOIPA static void get(int client, const char *word)
{
	(void)word;
	dprintf(client, "+%s\n", stored);
}

NOIPA static void ping(int client, const char *word)
{
	say(client, *word ? "-ERR ping takes no argument" : "+pong");
}

struct command {
	const char *name;
	void (*run)(int client, const char *word);
};

static const struct command commands[] = {
	{ "get", get }, { "leave", leave }, { "lock", lock }, { "ping", ping }, { "store", store },
};

NOIPA static void serve(int client)
{
	char line[256];
	ssize_t size = read(client, line, sizeof(line) - 1);

	if (size <= 0)
		return;
	line[size] = '\0';
	line[strcspn(line, "\n")] = '\0';
	char *word = strchr(line, ' ');
	if (word)
		*word++ = '\0';
	for (size_t index = 0; index < sizeof(commands) / sizeof(commands[0]); index++) {
		if (strcmp(commands[index].name, line) == 0) {
			commands[index].run(client, word ? word : "");
			return;
		}
	}
	say(client, "-ERR unknown command");
}

static int ask(int server, int count, char **words)
{
	char line[256] = "", answer[256];

	for (int index = 0; index < count; index++) {
		strncat(line, words[index], sizeof(line) - strlen(line) - 2);
		strcat(line, index + 1 < count ? " " : "\n");
	}
	if (write(server, line, strlen(line)) < 0)
		return 1;
	return read(server, answer, sizeof(answer)) > 0 && answer[0] == '+' ? 0 : 1;
}

int main(int count, char **arguments)
{
	int yes = 1, server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };

	if (count < 2 || server < 0)
		return 2;
	address.sin_port = htons(atoi(arguments[1]));
	if (count > 2) {
		if (connect(server, (struct sockaddr *)&address, sizeof(address)) != 0)
			return 1;
		return ask(server, count - 2, arguments + 2);
	}
	setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
	if (bind(server, (struct sockaddr *)&address, sizeof(address)) != 0 || listen(server, 16) != 0)
		fail("listen");
	for (;;) {
		int client = accept(server, NULL, NULL);
		if (client < 0)
			continue;
		serve(client);
		close(client);
	}
}
