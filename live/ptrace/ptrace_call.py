"""ptrace(2) as quickly as Python can call it: while a thread is stopped, every microsecond counts.

python-ptrace, which starts programs under trace (live/tracing/spawn.py), is not used between stop and detachment: its
call converts and checks more than is needed here. Importing it, moreover, takes a tenth of a whole command, as it runs
ldconfig to find the C library that Python has loaded already.
"""

from __future__ import annotations

import ctypes
import os
import struct

# include/uapi/linux/ptrace.h
PTRACE_PEEKDATA = 2
PTRACE_GETREGS = 12
PTRACE_SETREGS = 13
PTRACE_DETACH = 17
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_PEEKSIGINFO = 0x4209
PTRACE_GETSIGMASK = 0x420A
PTRACE_SETSIGMASK = 0x420B
PTRACE_SECCOMP_GET_FILTER = 0x420C
PTRACE_GET_RSEQ_CONFIGURATION = 0x420F
PTRACE_PEEKSIGINFO_SHARED = 1
PTRACE_EVENT_STOP = 128

# fmt: off
REGISTER_NAMES = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
    "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
)
# fmt: on
"""The fields of struct user_regs_struct (arch/x86/include/asm/user_64.h), 8 bytes each."""
_REGISTERS = struct.Struct(f"<{len(REGISTER_NAMES)}Q")
_OFFSETS = {name: 8 * index for index, name in enumerate(REGISTER_NAMES)}
_WORD = struct.Struct("<Q")
_SIGNED_WORD = struct.Struct("<q")

_SIGINFO_SIZE = 128
_PEEKED = 32

# PyDLL keeps the interpreter's lock, which a call that does not wait need not give back.
_ptrace = ctypes.PyDLL(None, use_errno=True).ptrace
_ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_ptrace.restype = ctypes.c_long


def call(request: int, tid: int, address: int = 0, data: int = 0) -> int:
    """One request to the kernel; requests that give their result in memory take its address in data.

    Raises:
        OSError: as ptrace(2) says; ESRCH: the thread is gone, or not stopped.
    """
    result: int = _ptrace(request, tid, address, data)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def peek(tid: int, address: int) -> bytes:
    """The 8 bytes at an address of a stopped thread, in the memory that it has now.

    Raises:
        OSError: EIO, nothing is mapped there; ESRCH as for call().
    """
    ctypes.set_errno(0)
    word: int = _ptrace(PTRACE_PEEKDATA, tid, address, 0)  # by the C library, which returns the word itself
    if word == -1 and (number := ctypes.get_errno()) != 0:
        raise OSError(number, os.strerror(number))
    return _SIGNED_WORD.pack(word)


class _PeekArguments(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("flags", ctypes.c_uint32), ("nr", ctypes.c_int32))


class _RseqConfiguration(ctypes.Structure):
    _fields_ = (
        ("pointer", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("signature", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


# Everything between stop and detachment counts in microseconds: buffers are made beforehand.
_PEEKS = (_PeekArguments(0, 0, _PEEKED), _PeekArguments(0, PTRACE_PEEKSIGINFO_SHARED, _PEEKED))
_PEEK_ADDRESSES = tuple(map(ctypes.addressof, _PEEKS))
_RSEQ = _RseqConfiguration()
_RSEQ_SIZE, _RSEQ_ADDRESS = ctypes.sizeof(_RSEQ), ctypes.addressof(_RSEQ)
_SIGINFOS = ctypes.create_string_buffer(_SIGINFO_SIZE * _PEEKED)
_SIGINFOS_ADDRESS = ctypes.addressof(_SIGINFOS)
_SIGNAL_NUMBER = struct.Struct("<i")


def pending_signals(tid: int) -> int:
    """The signals that wait for a stopped thread or its process; bit N-1 for N.

    Raises:
        OSError: as call().
    """
    pending = 0
    for arguments in _PEEK_ADDRESSES:
        count = call(PTRACE_PEEKSIGINFO, tid, arguments, _SIGINFOS_ADDRESS)
        for start in range(0, count * _SIGINFO_SIZE, _SIGINFO_SIZE):
            pending |= 1 << (_SIGNAL_NUMBER.unpack_from(_SIGINFOS, start)[0] - 1)
    return pending


def rseq_area(tid: int) -> int:
    """The address of a stopped thread's struct rseq (rseq(2)); 0 if it has none or the kernel does not tell.

    Raises:
        ProcessLookupError: as call().
    """
    try:
        call(PTRACE_GET_RSEQ_CONFIGURATION, tid, _RSEQ_SIZE, _RSEQ_ADDRESS)
    except ProcessLookupError:
        raise
    except OSError:
        return 0
    return int(_RSEQ.pointer)


class Registers:
    """A buffer for a thread's general registers (struct user_regs_struct)."""

    def __init__(self) -> None:
        self._raw = ctypes.create_string_buffer(_REGISTERS.size)
        self._address = ctypes.addressof(self._raw)

    def read(self, tid: int) -> dict[str, int]:
        """A stopped thread's registers by their names, unsigned."""
        call(PTRACE_GETREGS, tid, 0, self._address)
        return dict(zip(REGISTER_NAMES, _REGISTERS.unpack(self._raw), strict=True))

    def write(self, tid: int, **changed: int) -> None:
        """Gives a thread the registers that were read, but for those given here, unsigned."""
        for name, value in changed.items():
            _WORD.pack_into(self._raw, _OFFSETS[name], value)
        call(PTRACE_SETREGS, tid, 0, self._address)
