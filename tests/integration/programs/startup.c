/* SPDX-License-Identifier: GPL-2.0-only
 *
 * A server with start-up code: `startup PORT` answers the lines of one TCP connection after the other.
 *
 * `work N` is answered by feature(N), `again` by the checksum of the table that start-up has made, made anew: what a plan
 * removes that does not know of it. SIGINT has a handler that start-up itself runs once, so that it counts as start-up
 * code; SIGTERM ends the program gracefully.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "feature.h"

static volatile sig_atomic_t interrupts, ended;
static volatile uint32_t table[256];


NOIPA static void on_interrupt(int number)
{
	(void)number;
	interrupts++;
}

NOIPA static void on_end(int number)
{
	(void)number;
	ended = 1;
}

/* The table of CRC-32, as start-up code makes such things. */
NOIPA static uint32_t prepare(void)
{
	uint32_t sum = 0;

	for (uint32_t i = 0; i < 256; i++) {
		uint32_t value = i;
		for (int bit = 0; bit < 8; bit++)
			value = value & 1 ? (value >> 1) ^ 0xedb88320u : value >> 1;
		table[i] = value;
		sum += value;
	}
	return sum;
}

NOIPA static int listen_on(int port)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port) };
	int server = socket(AF_INET, SOCK_STREAM, 0), one = 1;

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (server < 0 || bind(server, (struct sockaddr *)&address, sizeof(address)) != 0 || listen(server, 64) != 0) {
		perror("listen");
		exit(1);
	}
	return server;
}

NOIPA static void handle_signals(void)
{
	struct sigaction interrupt = { .sa_handler = on_interrupt, .sa_flags = SA_RESTART };
	struct sigaction end = { .sa_handler = on_end };

	sigaction(SIGINT, &interrupt, NULL);
	sigaction(SIGTERM, &end, NULL);
	raise(SIGINT);
}

static void answer(int client)
{
	FILE *stream = fdopen(client, "r+");
	char line[64];

	while (stream && fgets(line, sizeof(line), stream)) {
		if (strncmp(line, "work ", 5) == 0)
			fprintf(stream, "%ld\n", feature(atol(line + 5)));
		else if (strcmp(line, "again\n") == 0)
			fprintf(stream, "%u\n", prepare());
		else
			fputs("what?\n", stream);
		fflush(stream);
	}
	if (stream)
		fclose(stream);
}

int main(int count, char **arguments)
{
	int server = listen_on(count > 1 ? atoi(arguments[1]) : 0);

	handle_signals();
	prepare();
	puts("ready");
	fflush(stdout);
	while (!ended) {
		int client = accept(server, NULL, NULL);
		if (client >= 0)
			answer(client);
	}
	printf("ended after %d interrupts\n", (int)interrupts);
	return 0;
}
