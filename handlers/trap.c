/* SPDX-License-Identifier: GPL-2.0-only
 *
 * The SIGTRAP handler that dynacut maps into a target: freestanding and position-independent, without data of its own.
 * It finds the hit site in the table behind its code and does what the table says. Everything else that raises SIGTRAP
 * is passed on to the target's own action.
 *
 * It runs in a signal context of any thread, on any stack: no locks, no libc, no floating point, little stack.
 */
#include <stdint.h>

#include <asm/sigcontext.h>
#include <asm/siginfo.h>
#include <asm/signal.h>
#include <asm/ucontext.h>
#include <asm/unistd.h>
#include <linux/errno.h>
#include <linux/fcntl.h>
#include <linux/mman.h>
#include <linux/uio.h>
#include <stdbool.h>
#include <stddef.h>

#include "table.h"

#define INT3 0xcc

/* Placed by trap.ld. Hidden, or it would be addressed through a table of absolute addresses. */
extern struct dynacut_table dynacut_table __attribute__((visibility("hidden")));

_Static_assert(sizeof(struct dynacut_site) == 40, "layout.py has sites of 40 bytes");
_Static_assert(sizeof(struct dynacut_table) <= 8192, "layout.py reserves two pages for the header");

/* glibc's trampoline, byte for byte: unwinders know a signal frame by these instructions. */
__asm__(".section .text.restorer, \"ax\"\n"
	".globl dynacut_restorer\n"
	"dynacut_restorer:\n"
	"	movq $15, %rax\n" /* __NR_rt_sigreturn */
	"	syscall\n"
	".text\n");

static long system_call(long number, long a, long b, long c, long d)
{
	register long fourth __asm__("r10") = d;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth)
			 : "rcx", "r11", "memory");
	return result;
}

void dynacut_trap(int signal, struct siginfo *info, struct ucontext *context);

static uint8_t byte_at(uint64_t address)
{
	return *(const volatile uint8_t *)address;
}

static uint8_t generation(void)
{
	return __atomic_load_n(&dynacut_table.generation, __ATOMIC_ACQUIRE);
}

/* Finds the site whose patched bytes contain an address. The patcher may turn the banks meanwhile: then look again. */
static bool find_site(uint64_t address, struct dynacut_site *found)
{
	const char *table = (const char *)&dynacut_table;
	uint8_t before;
	bool hit;

	do {
		before = generation();
		unsigned active = before & 1;
		const struct dynacut_site *sites =
			(const struct dynacut_site *)(table + dynacut_table.sites[active]);
		uint32_t low = 0, high = dynacut_table.bank[active].site_count;

		/* The last site at or below the address. */
		while (low < high) {
			uint32_t middle = low + (high - low) / 2;
			if (sites[middle].address <= address)
				low = middle + 1;
			else
				high = middle;
		}
		hit = low > 0 && address - sites[low - 1].address < sites[low - 1].length &&
		      sites[low - 1].action != DYNACUT_EDIT;
		if (hit)
			*found = sites[low - 1];
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
	} while (generation() != before);
	return hit;
}

static void set_default_action(void)
{
	const struct dynacut_sigaction action = { 0, SA_RESTORER, 0, 0 };

	system_call(__NR_rt_sigaction, SIGTRAP, (long)&action, 0, sizeof(action.mask));
}

/* Ends the process by SIGTRAP right at the trap, so that a core dump shows where: the int3 is executed once more. */
static void die_at(struct ucontext *context, uint64_t address)
{
	set_default_action();
	context->uc_mcontext.rip = address;
}

/* Writes to the process's own memory by process_vm_writev(2); 0, or a negative errno. */
static long copy(uint64_t address, const uint8_t *bytes, uint64_t length)
{
	struct iovec from = { (void *)bytes, length }, to = { (void *)address, length };
	long process = system_call(__NR_getpid, 0, 0, 0, 0); /* before the registers below get their values */
	register long flags __asm__("r9") = 0;
	register long count __asm__("r8") = 1;
	register const struct iovec *remote __asm__("r10") = &to;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(__NR_process_vm_writev), "D"(process), "S"(&from), "d"(1),
			   "r"(remote), "r"(count), "r"(flags)
			 : "rcx", "r11", "memory");
	return result == (long)length ? 0 : result < 0 ? result : -EFAULT;
}

/* Whether an open file is the process's own memory. In a chroot, anything may lie where /proc should. */
static bool is_own_memory(long file)
{
	const uint8_t one = 1;
	volatile uint8_t mark = 0;

	system_call(__NR_pwrite64, file, (long)&one, 1, (long)&mark);
	return mark == 1;
}

/* Writes over the target's own code. /proc/self/mem leaves the protection as it is; where there is no /proc, or it
 * belongs to somebody else (a process that changed its uid), the page is made writable for a moment. */
static bool write_text(uint64_t address, const uint8_t *bytes, uint32_t length)
{
	/* On the stack, as the blob's constants are addressed relative to rip anyway: no relocation either way. */
	const char path[] = "/proc/self/mem";
	long file = system_call(__NR_open, (long)path, O_RDWR | O_CLOEXEC, 0, 0);

	if (file >= 0) {
		/* The head last: whoever enters meanwhile still traps there, and waits in here. */
		bool written = (length == 1 || system_call(__NR_pwrite64, file, (long)(bytes + 1), length - 1,
							  (long)(address + 1)) == (long)length - 1) &&
			       system_call(__NR_pwrite64, file, (long)bytes, 1, (long)address) == 1;
		/* Still int3: the patcher has just armed it again, or nothing was written here. */
		if (written && byte_at(address) == INT3)
			written = is_own_memory(file);
		system_call(__NR_close, file, 0, 0, 0);
		if (written)
			return true;
	}
	uint64_t first = address & ~4095ul;
	uint64_t size = ((address + length + 4095) & ~4095ul) - first;

	for (int tries = 0; tries < 1000; tries++) {
		if (system_call(__NR_mprotect, (long)first, (long)size, PROT_READ | PROT_WRITE | PROT_EXEC, 0) != 0)
			return false;
		/* By the kernel: it fails, instead of crashing, where another thread in here has just made the page
		 * read-only again. */
		long failed = length == 1 ? 0 : copy(address + 1, bytes + 1, length - 1);
		if (failed == 0)
			failed = copy(address, bytes, 1);
		system_call(__NR_mprotect, (long)first, (long)size, PROT_READ | PROT_EXEC, 0);
		if (failed != -EFAULT)
			return failed == 0;
	}
	return false;
}

/* Calls a handler as the kernel would have. Our own frame blocks nothing (SA_NODEFER); the return from it restores the
 * interrupted mask. */
static void call(struct dynacut_sigaction *action, uint64_t address, int signal, struct siginfo *info,
		 struct ucontext *context)
{
	uint64_t mask = action->mask | (action->flags & SA_NODEFER ? 0 : 1ul << (SIGTRAP - 1));
	void (*handler)(int, struct siginfo *, struct ucontext *) =
		(void (*)(int, struct siginfo *, struct ucontext *))address;

	system_call(__NR_rt_sigprocmask, SIG_BLOCK, (long)&mask, 0, sizeof(mask));
	if (action->flags & SA_RESETHAND)
		action->handler = 0;
	handler(signal, info, context);
}

/* Gives a trap to the user's library, if there is one. The patcher may take it away at any moment: its address is read
 * once. */
static bool pass_to_user(int signal, struct siginfo *info, struct ucontext *context)
{
	uint64_t address = __atomic_load_n(&dynacut_table.user.handler, __ATOMIC_ACQUIRE);

	if (address == 0)
		return false;
	call(&dynacut_table.user, address, signal, info, context);
	return true;
}

/* Does for a SIGTRAP that is not ours what the user's library says, or else what the kernel would have done without
 * us. */
static void pass_on(int signal, struct siginfo *info, struct ucontext *context)
{
	struct dynacut_sigaction *next = &dynacut_table.observed;

	if (pass_to_user(signal, info, context))
		return;
	if (next->handler == (uint64_t)&dynacut_trap)
		next = &dynacut_table.previous;

	if (next->handler <= 1) { /* SIG_DFL or SIG_IGN */
		bool forced = info->si_code > 0; /* by the kernel: kills even where the signal is ignored */
		if (next->handler == 1 && !forced)
			return;
		uint64_t trap = context->uc_mcontext.rip - 1;
		set_default_action();
		if (info->si_code == SI_KERNEL && byte_at(trap) == INT3) {
			context->uc_mcontext.rip = trap;
			return;
		}
		long process = system_call(__NR_getpid, 0, 0, 0, 0);
		system_call(__NR_tgkill, process, system_call(__NR_gettid, 0, 0, 0, 0), SIGTRAP, 0);
		return;
	}
	call(next, next->handler, signal, info, context);
}

/* Whether the kernel has aborted a restartable sequence after the int3 in it: rip is the abort handler's then, behind
 * the signature that rseq(2) wants there. */
static bool has_aborted(uint64_t last)
{
	return (last & 4095) >= 3 && byte_at(last) == 0x53 && byte_at(last - 1) == 0x05 && byte_at(last - 2) == 0x30 &&
	       byte_at(last - 3) == 0x53;
}

__attribute__((section(".text.entry"))) void dynacut_trap(int signal, struct siginfo *info, struct ucontext *context)
{
	struct sigcontext *registers = &context->uc_mcontext;
	uint64_t trap = registers->rip - 1; /* int3 leaves rip behind itself */
	struct dynacut_site site = { 0 };

	if (info->si_code != SI_KERNEL) { /* what an int3 gives (arch/x86/kernel/traps.c); not a user's kill */
		pass_on(signal, info, context);
		return;
	}
	bool known = find_site(trap, &site);
	if (byte_at(trap) != INT3) {
		/* Put back between the trap and now: go on as if nothing had been there. Only int $3, the long form, looks
		 * the same, and is the target's own. */
		if (!known && byte_at(trap) == 0x03 && byte_at(trap - 1) == 0xcd)
			pass_on(signal, info, context);
		else if (known || !has_aborted(trap))
			registers->rip = trap;
		return;
	}
	if (!known && !find_site(trap, &site)) { /* looked for again: the int3 may have come back meanwhile */
		pass_on(signal, info, context);
		return;
	}

	char *table = (char *)&dynacut_table;
	uint64_t *counters = (uint64_t *)(table + dynacut_table.counters);
	if (site.action == DYNACUT_LEARN) /* a hit for each time the block is patched; what counts is their order */
		__atomic_store_n(&counters[site.counter], __atomic_add_fetch(&counters[0], 1, __ATOMIC_RELAXED),
				 __ATOMIC_RELAXED);
	else
		__atomic_fetch_add(&counters[site.counter], 1, __ATOMIC_RELAXED);

	/* In the midst of a wiped block no action fits but those that do not depend on where in the function we are; a
	 * library sees that for itself. */
	if (trap != site.address && site.action != DYNACUT_LEARN && site.action != DYNACUT_TERMINATE &&
	    site.action != DYNACUT_HANDLER) {
		die_at(context, trap);
		return;
	}
	switch (site.action) {
	case DYNACUT_REDIRECT:
		registers->rip = site.argument;
		return;
	case DYNACUT_RETURN:
		registers->rax = site.argument;
		registers->rip = *(const uint64_t *)registers->rsp;
		registers->rsp += sizeof(uint64_t);
		return;
	case DYNACUT_SKIP:
		registers->rip = site.address + site.argument;
		return;
	case DYNACUT_LEARN:
		if (write_text(site.address, (const uint8_t *)table + dynacut_table.heap + site.bytes, site.length))
			registers->rip = trap;
		else
			die_at(context, trap);
		return;
	case DYNACUT_TERMINATE:
		if (site.argument != UINT64_MAX)
			system_call(__NR_exit_group, (long)site.argument, 0, 0, 0);
		die_at(context, trap);
		return;
	case DYNACUT_HANDLER:
		if (!pass_to_user(signal, info, context))
			die_at(context, trap);
		return;
	default:
		die_at(context, trap);
	}
}
