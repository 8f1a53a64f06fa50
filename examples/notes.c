/* SPDX-License-Identifier: GPL-2.0-only
 *
 * notes: a little server that keeps notes in memory. It listens on 127.0.0.1, on the port that is its argument (0: any
 * free one), says which on stdout, and answers lines:
 *
 *   PING -> PONG      PUT key value -> OK      GET key -> value | ERR no such key      DEL key -> OK | ERR no such key
 *
 * One process, one thread, one epoll loop, one table of commands: what dynacut needs to know of it are the names of
 * its functions. cmd_denied stands in no table; it is where a switched-off command can be redirected to.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define NOTES 1024
#define LINE 1024

struct client {
	int socket;
	size_t used;
	char line[LINE];
};

static struct note {
	char *key, *value;
} notes[NOTES];

static void reply(struct client *client, const char *text)
{
	char line[LINE + 2];
	int length = snprintf(line, sizeof(line), "%s\n", text);

	if (send(client->socket, line, (size_t)length, MSG_NOSIGNAL) != length)
		shutdown(client->socket, SHUT_RDWR); /* a client that does not read: the loop closes it */
}

static struct note *find(const char *key)
{
	for (int i = 0; i < NOTES; i++)
		if (notes[i].key != NULL && strcmp(notes[i].key, key) == 0)
			return &notes[i];
	return NULL;
}

static void cmd_ping(struct client *client, char *key, char *value)
{
	(void)key;
	(void)value;
	reply(client, "PONG");
}

static void cmd_get(struct client *client, char *key, char *value)
{
	const struct note *note = find(key);

	(void)value;
	reply(client, note != NULL ? note->value : "ERR no such key");
}

static void cmd_put(struct client *client, char *key, char *value)
{
	struct note *note = find(key);

	for (int i = 0; note == NULL && i < NOTES; i++) {
		if (notes[i].key == NULL) {
			note = &notes[i];
			note->key = strdup(key);
		}
	}
	if (note == NULL) {
		reply(client, "ERR full");
		return;
	}
	free(note->value);
	note->value = strdup(value);
	reply(client, "OK");
}

static void cmd_del(struct client *client, char *key, char *value)
{
	struct note *note = find(key);

	(void)value;
	if (note == NULL) {
		reply(client, "ERR no such key");
		return;
	}
	free(note->key);
	free(note->value);
	note->key = note->value = NULL;
	reply(client, "OK");
}

/* For commands that are switched off: the same arguments, another answer. */
__attribute__((used)) static void cmd_denied(struct client *client, char *key, char *value)
{
	(void)key;
	(void)value;
	reply(client, "ERR command disabled");
}

static const struct command {
	const char *name;
	void (*function)(struct client *client, char *key, char *value);
} commands[] = {
	{ "PING", cmd_ping },
	{ "GET", cmd_get },
	{ "PUT", cmd_put },
	{ "DEL", cmd_del },
};

static void execute(struct client *client, char *line)
{
	char *name = strsep(&line, " "), *key = strsep(&line, " ");

	for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++) {
		if (strcmp(commands[i].name, name) == 0) {
			commands[i].function(client, key != NULL ? key : "", line != NULL ? line : "");
			return;
		}
	}
	reply(client, "ERR unknown command");
}

/* Reads what has come and executes each whole line; false when the client is to be closed. */
static bool serve(struct client *client)
{
	ssize_t size = read(client->socket, client->line + client->used, LINE - client->used);

	if (size <= 0)
		return size < 0 && (errno == EINTR || errno == EAGAIN);
	client->used += (size_t)size;

	char *line = client->line, *end;
	while ((end = memchr(line, '\n', client->used)) != NULL) {
		*end = '\0';
		client->used -= (size_t)(end + 1 - line);
		execute(client, line);
		line = end + 1;
	}
	memmove(client->line, line, client->used);
	return client->used < LINE;
}

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

int main(int argc, char **argv)
{
	struct sockaddr_in address = {
		.sin_family = AF_INET,
		.sin_port = htons((unsigned short)(argc > 1 ? atoi(argv[1]) : 0)),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
	socklen_t length = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM, 0), loop = epoll_create1(0), yes = 1;
	struct epoll_event event = { .events = EPOLLIN };

	if (listener < 0 || loop < 0)
		fail("notes");
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
	if (bind(listener, (struct sockaddr *)&address, length) != 0 || listen(listener, 64) != 0 ||
	    getsockname(listener, (struct sockaddr *)&address, &length) != 0 ||
	    epoll_ctl(loop, EPOLL_CTL_ADD, listener, &event) != 0)
		fail("notes");
	printf("notes: listening on 127.0.0.1:%d\n", ntohs(address.sin_port));
	fflush(stdout);

	for (;;) {
		int count = epoll_wait(loop, &event, 1, -1);
		if (count < 0 && errno != EINTR)
			fail("epoll_wait");
		if (count <= 0)
			continue;
		struct client *client = event.data.ptr;
		if (client == NULL) {
			int accepted = accept(listener, NULL, NULL);
			client = accepted >= 0 ? calloc(1, sizeof(*client)) : NULL;
			if (client == NULL) {
				close(accepted);
				continue;
			}
			client->socket = accepted;
			struct epoll_event readable = { .events = EPOLLIN, .data.ptr = client };
			if (epoll_ctl(loop, EPOLL_CTL_ADD, accepted, &readable) != 0)
				fail("epoll_ctl");
		} else if (!serve(client)) {
			close(client->socket);
			free(client);
		}
	}
}
