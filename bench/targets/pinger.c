/* SPDX-License-Identifier: GPL-2.0-only
 *
 * A client of redis that sends PING after PING; a gap is the time from a PING to its reply.
 *
 *   pinger CONTROL PORT CPU PAUSE     PAUSE: µs between a reply and the next PING
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "clock.h"
#include "control.h"

static const char ping[] = "*1\r\n$4\r\nPING\r\n";
static const char pong[] = "+PONG\r\n";

static int ask(int connection)
{
	char reply[sizeof(pong)];
	size_t length = 0;

	if (write(connection, ping, sizeof(ping) - 1) != sizeof(ping) - 1)
		return 0;
	while (length < sizeof(pong) - 1) {
		ssize_t part = read(connection, reply + length, sizeof(pong) - 1 - length);
		if (part <= 0)
			return 0;
		length += (size_t)part;
	}
	return memcmp(reply, pong, length) == 0;
}

int main(int argc, char **argv)
{
	if (argc != 5)
		return 2;
	struct timespec pause = { .tv_nsec = 1000 * atol(argv[4]) };
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	struct control *control = map_control(argv[1]);
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(atoi(argv[3]), &set);
	sched_setaffinity(0, sizeof(set), &set);

	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[2])) };
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	int connection = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
	setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	if (connect(connection, (struct sockaddr *)&address, sizeof(address)) != 0) {
		perror("connect");
		return 99;
	}
	control->thread = (uint64_t)getpid();
	struct switches counted = switches();
	for (;;) {
		starts_anew(control, &counted);
		uint64_t before = now();
		if (!ask(connection)) {
			fprintf(stderr, "pinger: no PONG\n");
			return 1;
		}
		count_gap(control, now() - before, &counted, 1);
		if (pause.tv_nsec)
			nanosleep(&pause, NULL);
	}
}
