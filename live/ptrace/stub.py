"""Machine code for one shot in a stopped thread: system calls, then every register as it was, then on as before.

A stub uses no stack and no flags: it must run anywhere, and the interrupted code must not notice. `syscall` clobbers
only rax, rcx and r11 and keeps the flags; checks are made with lea and jrcxz, which do not touch them either.

Where the stop has interrupted a system call, the stub has two entries. The thread is sent behind the first one as if
the system call had been there. So it is the kernel that decides, when the thread goes on, whether the call is made
again: then it steps back to the first entry, as it would to the call; else a signal handler is to run, which returns to
the second, and the call has failed with EINTR (arch_do_signal_or_restart in arch/x86/kernel/signal.c).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from dynacut.live.syscalls import O_RDONLY_CLOEXEC, Syscall

_MOV_R64_IMM64 = {  # opcode bytes of mov reg, imm64
    "rax": b"\x48\xb8",
    "rcx": b"\x48\xb9",
    "rdx": b"\x48\xba",
    "rsi": b"\x48\xbe",
    "rdi": b"\x48\xbf",
    "r8": b"\x49\xb8",
    "r9": b"\x49\xb9",
    "r10": b"\x49\xba",
    "r11": b"\x49\xbb",
}
_MOV_R32_IMM32 = {  # clears the upper half; mov r/m64, imm32 where the value is negative
    "rax": b"\xb8",
    "rcx": b"\xb9",
    "rdx": b"\xba",
    "rsi": b"\xbe",
    "rdi": b"\xbf",
    "r8": b"\x41\xb8",
    "r9": b"\x41\xb9",
    "r10": b"\x41\xba",
    "r11": b"\x41\xbb",
}
_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
_SYSCALL = b"\x0f\x05"
_MOV_R8_RAX = b"\x49\x89\xc0"
_MOV_RDI_R8 = b"\x4c\x89\xc7"
_LEA_RCX_RAX_RCX = b"\x48\x8d\x0c\x08"
_JRCXZ_OVER_JMP = b"\xe3\x05"
_JMP_REL32 = b"\xe9"
_MOV_AT_RCX_RAX = b"\x48\x89\x01"
_MOV_BYTE_AT_RCX_1 = b"\xc6\x01\x01"
_JMP_NEXT_QUAD = b"\xff\x25\x00\x00\x00\x00"
_MOV_RBX_IMM64 = b"\x48\xbb"
# jmp .+9; the second entry, SYSCALL_SIZE behind the first: mov ebx, 1; jmp .+7; here the jmp above leads: mov ebx, 0.
# What rbx holds passes through the stub's system calls to the choice of a tail.
_ENTRIES = b"\xeb\x07" + b"\xbb\x01\0\0\0" + b"\xeb\x05" + b"\xbb\0\0\0\0"
_MOV_RCX_RBX = b"\x48\x89\xd9"
_JRCXZ = b"\xe3"
# The restoring tail: a mov for every clobbered register, and the jump with its target behind it.
_TAIL = struct.Struct("<" + len(_MOV_R64_IMM64) * "2sQ" + f"{len(_JMP_NEXT_QUAD)}sQ")


def restoring_tail(registers: Mapping[str, int], rax: int, resume_at: int) -> bytes:
    """The end of a stub: the clobbered registers get their values back, rax this one, then a jump to an address."""
    values: list[bytes | int] = []
    for name, opcode in _MOV_R64_IMM64.items():
        values += (opcode, registers[name])
    values[1] = rax  # the first of them
    return _TAIL.pack(*values, _JMP_NEXT_QUAD, resume_at)


def restarting_stub(
    body: bytes, registers: Mapping[str, int], again: tuple[int, int], failed: tuple[int, int]
) -> bytes:
    """A whole stub for a thread in a system call. again, failed: rax and where to go on, by the first entry and by the
    second."""
    rbx = _MOV_RBX_IMM64 + struct.pack("<Q", registers["rbx"])
    when_failed = rbx + restoring_tail(registers, *failed)
    choice = _MOV_RCX_RBX + _JRCXZ + bytes([len(when_failed)])
    return _ENTRIES + body + choice + when_failed + rbx + restoring_tail(registers, *again)


class Stub:
    """Builds a stub's body."""

    def __init__(self) -> None:
        self._code = bytearray()
        self._exits: list[int] = []

    @property
    def size(self) -> int:
        """The size of the whole stub with its entries and tails, in bytes."""
        return len(_ENTRIES) + len(self._code) + len(_MOV_RCX_RBX) + 2 + 2 * (len(_MOV_RBX_IMM64) + 8 + _TAIL.size)

    def syscall(self, number: int, *arguments: int) -> None:
        """A system call with up to six arguments; its result is in rax."""
        self._load("rax", number)
        for register, argument in zip(_ARGUMENTS, arguments, strict=False):
            self._load(register, argument)
        self._code += _SYSCALL

    def map_opened(self, opened: int, start: int, size: int, protection: int, flags: int, offset: int) -> None:
        """Opens the file whose name is at an address, maps it as mmap(2) does, and closes it again."""
        self.syscall(Syscall.OPEN, opened, O_RDONLY_CLOEXEC)
        self._code += _MOV_R8_RAX  # the kernel keeps r8 through the next two calls
        for register, argument in zip(_ARGUMENTS, (start, size, protection, flags), strict=False):
            self._load(register, argument)
        self._load("r9", offset)
        self._load("rax", Syscall.MMAP)
        self._code += _SYSCALL + _MOV_RDI_R8
        self._load("rax", Syscall.CLOSE)
        self._code += _SYSCALL

    def require(self, value: int) -> None:
        """Goes on only if rax is just this value; else the rest of the body is left out."""
        self._code += _MOV_R64_IMM64["rcx"] + struct.pack("<Q", -value % (1 << 64))
        self._code += _LEA_RCX_RAX_RCX + _JRCXZ_OVER_JMP + _JMP_REL32
        self._exits.append(len(self._code))
        self._code += bytes(4)

    def otherwise(self, value: int, number: int, *arguments: int) -> None:
        """Makes a system call, unless rax is just this value; what follows sees its result in rax then."""
        call = Stub()
        call.syscall(number, *arguments)
        self._code += _MOV_R64_IMM64["rcx"] + struct.pack("<Q", -value % (1 << 64))
        self._code += _LEA_RCX_RAX_RCX + _JRCXZ + bytes([len(call._code)]) + call._code

    def store(self, address: int, value: int) -> None:
        """Writes 8 bytes at an absolute address."""
        self._load("rcx", address)
        self._code += _MOV_R64_IMM64["rax"] + struct.pack("<Q", value) + _MOV_AT_RCX_RAX

    def set_byte(self, address: int) -> None:
        """Writes a byte 1 at an absolute address."""
        self._load("rcx", address)
        self._code += _MOV_BYTE_AT_RCX_1

    def body(self) -> bytes:
        """The machine code up to the tail; restoring_tail() must follow it directly."""
        code = bytearray(self._code)
        for position in self._exits:
            struct.pack_into("<i", code, position, len(code) - position - 4)
        return bytes(code)

    def _load(self, register: str, value: int) -> None:
        if 0 <= value < 1 << 32:
            self._code += _MOV_R32_IMM32[register] + struct.pack("<I", value)
        else:
            self._code += _MOV_R64_IMM64[register] + struct.pack("<Q", value % (1 << 64))
