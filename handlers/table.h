/* SPDX-License-Identifier: GPL-2.0-only
 *
 * The table beside the handler: what is patched, what a hit does, and everything needed to put it back.
 *
 * It is mapped read-write right behind the handler's code, at DYNACUT_CODE_SIZE from its start. The patcher writes it
 * from outside while the target runs, so:
 *   - all that changes together lives twice, in two banks; the lowest bit of `generation`, one byte and therefore
 *     written at once, says which bank is in force;
 *   - hit counters and the heap of saved bytes are shared by both banks and only ever appended to while in use.
 * layout.py has the same layout; tests/unit/test_table.py compares the two with offsetof.
 */
#ifndef DYNACUT_TABLE_H
#define DYNACUT_TABLE_H

#include <stdint.h>

#define DYNACUT_CODE_SIZE 0x20000 /* handler in the first page, one-shot stubs in the others */
#define DYNACUT_VERSION 1
#define DYNACUT_SLOTS 124 /* (DYNACUT_CODE_SIZE - 4096) / 1024 */
#define DYNACUT_SIGNALS 64
#define DYNACUT_PATH 1024

enum dynacut_action {
	DYNACUT_TERMINATE = 1, /* argument: exit status, or -1: die by SIGTRAP at the site */
	DYNACUT_REDIRECT = 2, /* argument: absolute address to go on at */
	DYNACUT_RETURN = 3, /* argument: value for the caller; only at a function's entry */
	DYNACUT_SKIP = 4, /* argument: bytes to go on after the site */
	DYNACUT_LEARN = 5, /* put the original bytes back and go on; the counter tells the order of the hits */
	DYNACUT_HANDLER = 6, /* pass to the handler of the user's library */
	DYNACUT_EDIT = 7, /* plain byte edit: nothing is trapped */
	DYNACUT_UNMAP = 8, /* no site: `argument` bytes of whole pages from here on are unmapped; length 0 */
	DYNACUT_MAP = 9, /* no site: `argument` bytes from here on are mapped, with PROT_ bits `size`; length 0 */
};

/* struct kernel_sigaction of x86-64, as rt_sigaction(2) takes and gives it. */
struct dynacut_sigaction {
	uint64_t handler;
	uint64_t flags;
	uint64_t restorer;
	uint64_t mask;
};

struct dynacut_site {
	uint64_t address; /* absolute; sites ascend by it and do not overlap */
	uint64_t argument;
	uint32_t counter; /* index of its hit counter, from 1 on: counter 0 numbers the hits of all blocks that learn */
	uint32_t bytes; /* offset in the heap: `length` old bytes; for an edit `length` new ones follow */
	uint32_t feature; /* index of its feature's name */
	uint32_t length; /* how many bytes are patched */
	uint32_t size; /* of the basic block the site stands for */
	uint8_t action;
	uint8_t reserved[3];
};

struct dynacut_bank {
	uint32_t site_count;
	uint32_t feature_count;
	uint32_t heap_used;
	uint32_t counter_count;
};

struct dynacut_feature {
	char name[64]; /* UTF-8, zero-terminated */
};

/* What was changed so that SIGTRAP is never blocked, to be put back by an undo. */
struct dynacut_repair {
	uint32_t kind; /* 1: a thread's blocked mask; 2: the sa_mask of a signal */
	uint32_t id; /* thread id, or signal number */
	uint64_t start_time; /* of the thread, proc_pid_stat(5) field 22, so that a reused id is not mistaken */
	uint64_t mask; /* as it was before */
};

struct dynacut_table {
	char magic[8]; /* written by the stub that maps the table: a table without a version is mapped, not yet filled */
	uint32_t version;
	uint8_t generation;
	uint8_t reserved[3];
	uint64_t size; /* bytes mapped read-write from here on */
	uint32_t serial; /* grows when a fuller table moves to a larger place: the largest is in force */
	uint32_t site_capacity;
	uint32_t feature_capacity;
	uint32_t heap_capacity;
	uint32_t repair_capacity;
	uint32_t repair_count;
	uint32_t features; /* offsets from the table's start; one list of names for each bank, one behind the other */
	uint32_t repairs;
	uint32_t counters; /* uint64_t[site_capacity + 1]; at `size`: in shared memory behind the table, common to forks */
	uint32_t heap;
	uint32_t sites[2];
	struct dynacut_bank bank[2];
	struct dynacut_sigaction observed; /* SIGTRAP's action at the last installation, written by the kernel */
	struct dynacut_sigaction previous; /* the target's own action for SIGTRAP, to chain to and to put back */
	struct dynacut_sigaction input[DYNACUT_SIGNALS]; /* for remote rt_sigaction calls, by signal number - 1 */
	struct dynacut_sigaction output[DYNACUT_SIGNALS];
	uint8_t slot_done[DYNACUT_SLOTS]; /* set by a stub as its last act but restoring the registers */
	struct dynacut_sigaction user; /* the user's library's: for hits of DYNACUT_HANDLER and traps that are no hits */
	/* Where that library lies, and what it is. It stays mapped, and this recorded, when `user` is zero again. */
	uint64_t library;
	uint8_t library_digest[32]; /* SHA-256 of its file */
	char library_path[DYNACUT_PATH]; /* UTF-8, zero-terminated; shortened where it does not fit */
};

#endif
