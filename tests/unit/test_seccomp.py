"""The interpreter of seccomp filters against the kernel's: the same filters, the same system calls."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import struct
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynacut.live.seccomp import Call, Filter, MalformedFilterError

Instruction = tuple[int, int, int, int]

ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
ARCH = 0xC000003E
GETPPID = 110
NR, ARCH_AT, POINTER, ARGUMENTS = 0, 4, 8, 16
LOAD, RETURN, RETURN_A, JUMP, EQUAL, BITS, AND = 0x20, 0x06, 0x16, 0x05, 0x15, 0x45, 0x54
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
ALU = [0x04, 0x14, 0x24, 0x34, 0x44, 0x54, 0x64, 0x74, 0xA4]
JUMPS = [0x15, 0x25, 0x35, 0x45]

_libc = ctypes.CDLL(None, use_errno=True)


def packed(program: Sequence[Instruction]) -> bytes:
    return b"".join(struct.pack("<HBBI", *each) for each in program)


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def kernels_verdicts(program: Sequence[Instruction], calls: Sequence[tuple[int, ...]]) -> list[int]:
    """What getppid with these arguments gives under a filter: its errno; 0 if it succeeds; -1 if the child ended by
    SIGSYS, and so for all calls behind it."""
    raw = packed(program)
    buffer = ctypes.create_string_buffer(raw, len(raw))
    given = _Program(len(program), ctypes.addressof(buffer))
    ours, its = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            unused = [ctypes.c_long(0)] * 2
            installed = _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 and (
                _libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(given), *unused) == 0
            )
            os.write(its, b"ok" if installed else b"no")
            for arguments in calls if installed else ():
                ctypes.set_errno(0)
                failed = _libc.syscall(GETPPID, *[ctypes.c_ulong(each) for each in arguments]) == -1
                os.write(its, struct.pack("<H", ctypes.get_errno() if failed else 0))
        finally:
            os._exit(0)
    os.close(its)
    with os.fdopen(ours, "rb") as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    assert said[:2] == b"ok", "the kernel does not take this filter"
    got = [number for (number,) in struct.iter_unpack("<H", said[2:])]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGSYS
        got += [-1] * (len(calls) - len(got))
    assert len(got) == len(calls)
    return got


def as_the_kernel_shows(verdict: int | None) -> int:
    """A verdict as kernels_verdicts() gives it."""
    assert verdict is not None
    action = verdict & 0xFFFF0000
    if action == ERRNO:
        return min(verdict & 0xFFFF, 4095)
    return 0 if action == ALLOW else -1


def random_body(chance: random.Random, size: int) -> Iterator[Instruction]:
    """A valid program: every memory word is written first, every jump leads on, the end is a return."""
    yield from ((0x02, 0, 0, word) for word in range(16))
    for left in range(size, 0, -1):
        match chance.randrange(9):
            case 0 | 1:
                yield LOAD, 0, 0, chance.choice([NR, ARCH_AT, *range(ARGUMENTS, 64, 4)])
            case 2:
                yield chance.choice([0x00, 0x01]), 0, 0, chance.choice([0, 1, 31, 0xFFFFFFFF, chance.getrandbits(32)])
            case 3:
                code = chance.choice(ALU)
                yield code | chance.choice([0, 8]), 0, 0, chance.randrange(1, 32)
            case 4:
                yield chance.choice([0x84, 0x07, 0x87, 0x80, 0x81]), 0, 0, 0
            case 5:
                yield chance.choice([0x02, 0x03, 0x60, 0x61]), 0, 0, chance.randrange(16)
            case 6 | 7:
                yes, no = (chance.randrange(min(left, 256)) for _ in range(2))
                yield (
                    chance.choice(JUMPS) | chance.choice([0, 8]),
                    yes,
                    no,
                    chance.choice([0, 7, chance.getrandbits(32)]),
                )
            case 8:
                yield JUMP, 0, 0, chance.randrange(left)
    # Whatever has been computed, as an errno.
    yield AND, 0, 0, 0x7FF
    yield 0x44, 0, 0, ERRNO
    yield RETURN_A, 0, 0, 0


def only_getppid(body: Sequence[Instruction]) -> list[Instruction]:
    """A program that allows everything else, or the child could not report."""
    return [(LOAD, 0, 0, NR), (EQUAL, 1, 0, GETPPID), (RETURN, 0, 0, ALLOW), *body]


@pytest.mark.parametrize("seed", range(60))
def test_random_programs_give_what_the_kernel_gives(seed: int) -> None:
    chance = random.Random(seed)
    program = only_getppid(list(random_body(chance, chance.randrange(1, 60))))
    calls = [tuple(chance.choice([0, 1, chance.getrandbits(64)]) for _ in range(6)) for _ in range(4)]
    ours = Filter(packed(program))
    foreseen = []
    for arguments in calls:
        (verdict,) = ours.verdicts(Call("getppid", GETPPID, arguments))
        foreseen.append(as_the_kernel_shows(verdict))
    if -1 in foreseen:  # the child ends there
        foreseen[foreseen.index(-1) :] = [-1] * (len(foreseen) - foreseen.index(-1))
    assert foreseen == kernels_verdicts(program, calls)
    # What is not known covers what it may be.
    masked = [tuple(None if chance.random() < 0.5 else each for each in arguments) for arguments in calls]
    for arguments, partly in zip(calls, masked, strict=True):
        verdicts = ours.verdicts(Call("getppid", GETPPID, partly))
        known = ours.verdicts(Call("getppid", GETPPID, arguments))
        assert known <= verdicts or None in verdicts


words = st.integers(0, 0xFFFFFFFF)
anything = st.tuples(st.integers(0, 0xFFFF), st.integers(0, 255), st.integers(0, 255), words)


@settings(deadline=None)  # the number of ways is what it is
@given(st.integers(0, 1 << 32), st.integers(1, 200), st.lists(st.none() | st.integers(0, (1 << 64) - 1), max_size=6))
def test_a_valid_program_always_has_a_verdict(seed: int, size: int, arguments: list[int | None]) -> None:
    program = only_getppid(list(random_body(random.Random(seed), size)))
    for number in (GETPPID, 9):
        call = Call("any", number, tuple(arguments))
        assert Filter(packed(program)).verdicts(call)
        Filter(packed(program)).objection(call)


@settings(deadline=None)
@given(st.lists(anything, max_size=20), words)
def test_any_bytes_are_a_program_or_refused(program: list[Instruction], end: int) -> None:
    try:
        checked = Filter(packed([*program, (RETURN, 0, 0, end)]))
    except MalformedFilterError:
        return
    assert checked.verdicts(Call("mmap", 9))


@pytest.mark.parametrize(
    "program",
    [
        [],
        [(LOAD, 0, 0, 0)],
        [(LOAD, 0, 0, 2), (RETURN, 0, 0, ALLOW)],
        [(LOAD, 0, 0, 64), (RETURN, 0, 0, ALLOW)],
        [(JUMP, 0, 0, 0xFFFFFFFF), (RETURN, 0, 0, ALLOW)],
        [(EQUAL, 1, 0, 0), (RETURN, 0, 0, ALLOW)],
        [(0x60, 0, 0, 16), (RETURN, 0, 0, ALLOW)],
        [(0x34, 0, 0, 0), (RETURN, 0, 0, ALLOW)],
        [(0x64, 0, 0, 32), (RETURN, 0, 0, ALLOW)],
        [(0x94, 0, 0, 3), (RETURN, 0, 0, ALLOW)],  # BPF_MOD, which seccomp does not take
        [(0x28, 0, 0, 0), (RETURN, 0, 0, ALLOW)],  # half a word
        [(RETURN, 0, 0, ALLOW)] * 4097,
    ],
)
def test_what_the_kernel_refuses_is_refused(program: list[Instruction]) -> None:
    with pytest.raises(MalformedFilterError):
        Filter(packed(program))


def test_half_an_instruction() -> None:
    with pytest.raises(MalformedFilterError):
        Filter(packed([(RETURN, 0, 0, ALLOW)]) + b"\0")


@pytest.mark.parametrize(
    ("verdict", "says"),
    [
        (ALLOW, None),
        (0x7FFC0000, None),
        (ALLOW | 0xFFFF, None),
        (ERRNO | 1, "gives an error"),
        (KILL, "ends the process"),
        (0, "ends the thread"),
        (0x00030000, "raises SIGSYS"),
        (0x7FC00000, "asks a supervisor"),
        (0x7FF00000, "asks a tracer"),
        (0x12340000, "ends the process"),
    ],
)
def test_what_is_no_permission(verdict: int, says: str | None) -> None:
    assert Filter(packed([(RETURN, 0, 0, verdict)])).objection(Call("mmap", 9)) == says


def writable_and_executable() -> Filter:
    """MemoryDenyWriteExecute= of systemd: mmap with both protections fails."""
    program = [(LOAD, 0, 0, NR), (EQUAL, 0, 4, 9), (LOAD, 0, 0, ARGUMENTS + 16), (AND, 0, 0, 6), (EQUAL, 0, 1, 6)]
    return Filter(packed([*program, (RETURN, 0, 0, ERRNO | 1), (RETURN, 0, 0, ALLOW)]))


def test_arguments_that_are_known_decide() -> None:
    both = writable_and_executable()
    assert both.objection(Call("mmap", 9, (None, None, 5))) is None
    assert both.objection(Call("mmap", 9, (None, None, 3))) is None
    assert both.objection(Call("mmap", 9, (None, None, 7))) == "gives an error"
    assert both.objection(Call("mmap", 9)) == "gives an error"  # it may
    assert both.objection(Call("munmap", 11)) is None


def test_where_a_call_is_made_from_is_not_known() -> None:
    program = [(LOAD, 0, 0, POINTER), (BITS, 0, 1, 1), (RETURN, 0, 0, KILL), (RETURN, 0, 0, ALLOW)]
    assert Filter(packed(program)).verdicts(Call("mmap", 9)) == {KILL, ALLOW}
    assert Filter(packed([(LOAD, 0, 0, POINTER), (RETURN_A, 0, 0, 0)])).objection(Call("mmap", 9)) is not None


def test_the_architecture_is_x86_64() -> None:
    program = [(LOAD, 0, 0, ARCH_AT), (EQUAL, 1, 0, ARCH), (RETURN, 0, 0, KILL), (RETURN, 0, 0, ALLOW)]
    assert Filter(packed(program)).verdicts(Call("mmap", 9)) == {ALLOW}


def test_too_many_ways_are_no_permission() -> None:
    """Each way leaves another sum in X: there are more of them with every unknown bit."""
    program: list[Instruction] = []
    for number in range(800):
        program += [(LOAD, 0, 0, POINTER), (BITS, 0, 3, 1), (0x87, 0, 0, 0), (0x04, 0, 0, number), (0x07, 0, 0, 0)]
    program += [(RETURN, 0, 0, ALLOW)]
    assert Filter(packed(program)).objection(Call("mmap", 9)) == "does something that cannot be foreseen"
