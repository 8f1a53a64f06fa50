/* SPDX-License-Identifier: GPL-2.0-only
 *
 * A program that waits in io_uring_enter(2) for its input, and nowhere else.
 *
 *   uring wait       submits the read first, and waits for it by another call
 *   uring together   does both by one call
 *   uring worker     as wait, the read being made by a thread of the kernel's own
 *   uring poll       a thread of the kernel's own looks for what is submitted
 *
 *   feature 3 -> feature(3)      report -> eintr N early N  (how often a wait has ended without what it was for)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "feature.h"

static struct io_uring_params ring;
static int file;
static char *submissions, *completions;
static struct io_uring_sqe *entries;
static long with_eintr, early;

static unsigned *at(char *start, unsigned offset)
{
	return (unsigned *)(start + offset);
}

static void *map(size_t size, off_t what)
{
	void *place = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, what);

	if (place == MAP_FAILED)
		fail("mmap");
	return place;
}

static void set_up(bool polls)
{
	if (polls) {
		ring.flags = IORING_SETUP_SQPOLL;
		ring.sq_thread_idle = 1000;
	}
	file = (int)syscall(SYS_io_uring_setup, 8, &ring);
	if (file < 0) {
		int error = errno;

		perror("io_uring_setup");
		exit(error == ENOSYS || error == EPERM ? CANNOT_RUN : 1);
	}
	submissions = map(ring.sq_off.array + ring.sq_entries * sizeof(unsigned), IORING_OFF_SQ_RING);
	completions = map(ring.cq_off.cqes + ring.cq_entries * sizeof(struct io_uring_cqe), IORING_OFF_CQ_RING);
	entries = map(ring.sq_entries * sizeof(*entries), IORING_OFF_SQES);
}

static bool has_completed(void)
{
	return *at(completions, ring.cq_off.head) !=
	       __atomic_load_n(at(completions, ring.cq_off.tail), __ATOMIC_ACQUIRE);
}

static void prepare_read(char *byte, bool by_worker)
{
	unsigned tail = *at(submissions, ring.sq_off.tail);
	unsigned index = tail & *at(submissions, ring.sq_off.ring_mask);
	struct io_uring_sqe *entry = &entries[index];

	memset(entry, 0, sizeof(*entry));
	entry->opcode = IORING_OP_READ;
	entry->addr = (unsigned long)byte;
	entry->len = 1;
	entry->off = (unsigned long)-1;
	entry->flags = by_worker ? IOSQE_ASYNC : 0;
	at(submissions, ring.sq_off.array)[index] = index;
	__atomic_store_n(at(submissions, ring.sq_off.tail), tail + 1, __ATOMIC_RELEASE);
}

/* Reads a byte from stdin; false at its end. */
static bool read_byte(char *byte, const char *way)
{
	bool polls = strcmp(way, "poll") == 0, together = strcmp(way, "together") == 0;
	unsigned flags = IORING_ENTER_GETEVENTS | (polls ? IORING_ENTER_SQ_WAKEUP : 0);

	prepare_read(byte, strcmp(way, "worker") == 0);
	if (!polls && !together)
		syscall(SYS_io_uring_enter, file, 1, 0, 0, NULL, 0);
	for (unsigned count = together; !has_completed(); count = 0) {
		if (syscall(SYS_io_uring_enter, file, count, 1, flags, NULL, 0) < 0 && errno == EINTR)
			with_eintr++;
		else if (!has_completed())
			early++;
	}
	unsigned *head = at(completions, ring.cq_off.head);
	struct io_uring_cqe *done = (struct io_uring_cqe *)at(completions, ring.cq_off.cqes);
	int result = done[*head & (ring.cq_entries - 1)].res;
	__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
	return result == 1;
}

int main(int count, char **arguments)
{
	const char *way = count > 1 ? arguments[1] : "wait";
	char line[64];
	size_t length = 0;

	set_up(strcmp(way, "poll") == 0);
	say_ready();
	while (length < sizeof(line) - 1 && read_byte(&line[length], way)) {
		if (line[length++] != '\n')
			continue;
		line[length] = '\0';
		length = 0;
		if (strncmp(line, "report", 6) == 0)
			printf("eintr %ld early %ld\n", with_eintr, early);
		else
			printf("%ld\n", feature(atol(line + strcspn(line, " "))));
	}
	return 0;
}
