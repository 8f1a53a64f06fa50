"""Runs a small program with an int3 at every block, each restored at its first hit: what it executed, in order.

And with a redirect: what it does when a hit of one block goes on at another. ptrace(2) of one's own child needs no
privilege.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from dynacut.shared.binary.blocks import BlockMap

_TRACEME, _CONT, _GETREGS, _SETREGS, _SETOPTIONS = 0, 7, 12, 13, 0x4200
_EXITKILL = 0x100000
_RIP = 16  # the index of rip among the 27 words of user_regs_struct (sys/user.h)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def _ptrace(request: int, pid: int, data: int = 0) -> None:
    if _libc.ptrace(request, pid, None, data) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def run(
    program: Path, blocks: BlockMap, arguments: Iterable[str], redirect: tuple[int, int] | None = None
) -> tuple[int, dict[int, int]]:
    """Runs it; gives its exit status (negative: the signal) and the executed blocks, in the order of their first hits.

    redirect: module offsets; a hit of the former goes on at the latter.
    """
    process = subprocess.Popen(
        [program, *arguments], preexec_fn=lambda: _libc.ptrace(_TRACEME, 0, None, None), stdout=subprocess.DEVNULL
    )
    found: dict[int, int] = {}
    try:
        if not os.WIFSTOPPED(os.waitpid(process.pid, 0)[1]):
            pytest.skip("this process may not trace its children")
        _ptrace(_SETOPTIONS, process.pid, _EXITKILL)
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        base = min(int(line.partition("-")[0], 16) for line in maps if line.endswith(str(program)))
        memory = os.open(f"/proc/{process.pid}/mem", os.O_RDWR)
        try:
            for offset in blocks.block_starts:
                os.pwrite(memory, b"\xcc", base + offset)
            _ptrace(_CONT, process.pid)
            registers = (ctypes.c_uint64 * 27)()
            while os.WIFSTOPPED(status := os.waitpid(process.pid, 0)[1]):
                number = os.WSTOPSIG(status)
                _ptrace(_GETREGS, process.pid, ctypes.addressof(registers))
                offset = registers[_RIP] - 1 - base
                block = blocks.block_at(offset)
                if number == signal.SIGTRAP and block is not None and block.start == offset:
                    found.setdefault(offset, block.size)
                    if redirect is not None and offset == redirect[0]:
                        registers[_RIP] = base + redirect[1]
                    else:
                        os.pwrite(memory, blocks.elf.read(offset, 1), base + offset)
                        registers[_RIP] -= 1
                    _ptrace(_SETREGS, process.pid, ctypes.addressof(registers))
                    number = 0
                _ptrace(_CONT, process.pid, number)
        finally:
            os.close(memory)
    finally:
        process.returncode = 0  # reaped above; should that have failed, the child dies with the tracer (EXITKILL)
    return os.waitstatus_to_exitcode(status), found
