/* SPDX-License-Identifier: GPL-2.0-only
 *
 * `getter PORT PATH SECONDS`: how many requests a web server on 127.0.0.1 answers in that time.
 *
 * A few kept connections, each with one request on its way. Each response must be as long as the first one. Prints
 * requests per second; ends with 1 if a connection or a response fails.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CONNECTIONS = 8, BUFFER = 65536 };

static char buffer[BUFFER + 1];

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static int connect_to(int port)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((unsigned short)port) };
	int client = socket(AF_INET, SOCK_STREAM, 0), one = 1;

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (client < 0 || connect(client, (struct sockaddr *)&address, sizeof(address)) != 0)
		fail("connect");
	setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	return client;
}

/* Reads one response; its length. */
static long read_response(int client)
{
	long length = 0, whole = 0;

	while (whole == 0 || length < whole) {
		ssize_t got = recv(client, buffer + length, (size_t)(BUFFER - length), 0);
		if (got <= 0)
			fail("recv");
		length += got;
		buffer[length] = '\0';
		char *end = strstr(buffer, "\r\n\r\n"), *field = strcasestr(buffer, "content-length:");
		if (end && field && field < end)
			whole = end + 4 - buffer + atol(field + strlen("content-length:"));
		if (whole > BUFFER || (length == BUFFER && whole == 0)) {
			fputs("a response is too long, or has no length\n", stderr);
			exit(1);
		}
	}
	return length;
}

int main(int count, char **arguments)
{
	int clients[CONNECTIONS];
	char request[512];
	long expected = 0, answered = 0;

	if (count != 4)
		return 2;
	int size = snprintf(request, sizeof(request), "GET %s HTTP/1.1\r\nHost: bench\r\n\r\n", arguments[2]);
	for (int i = 0; i < CONNECTIONS; i++) {
		clients[i] = connect_to(atoi(arguments[1]));
		if (send(clients[i], request, (size_t)size, 0) != size)
			fail("send");
	}
	double began = now(), seconds = atof(arguments[3]);
	while (now() - began < seconds) {
		for (int i = 0; i < CONNECTIONS; i++, answered++) {
			long length = read_response(clients[i]);
			if (expected == 0)
				expected = length;
			if (length != expected) {
				fputs("a response has another length\n", stderr);
				return 1;
			}
			if (send(clients[i], request, (size_t)size, 0) != size)
				fail("send");
		}
	}
	printf("%.1f\n", (double)answered / (now() - began));
	return 0;
}
