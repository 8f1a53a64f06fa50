"""What a seccomp filter says of a system call of which not everything is known, such as where memory will be mapped.

A filter is a program in classic BPF (seccomp(2); kernel/seccomp.c and net/core/filter.c). It jumps forward only, so it
ends. Where what it does depends on something unknown, both ways are followed: its verdicts are all that it may give.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

_WORD = 0xFFFFFFFF
_ARCH_X86_64 = 0xC000003E  # AUDIT_ARCH_X86_64 in include/uapi/linux/audit.h
_DATA_SIZE = 64  # struct seccomp_data
_MEMORY_WORDS = 16
_MAX_INSTRUCTIONS = 4096
_MAX_STEPS = 1 << 18
_INSTRUCTION = struct.Struct("<HBBI")  # struct sock_filter

# include/uapi/linux/seccomp.h: the upper half of a verdict.
_ACTION = 0xFFFF0000
_ALLOWED = frozenset({0x7FFF0000, 0x7FFC0000})  # ALLOW; LOG, which allows as well
_MEANINGS = {
    0x80000000: "ends the process",
    0x00000000: "ends the thread",
    0x00030000: "raises SIGSYS",
    0x00050000: "gives an error",
    0x7FC00000: "asks a supervisor",
    0x7FF00000: "asks a tracer",
}

_LOAD_WORD, _LOAD_SIZE, _LOADX_SIZE = 0x20, 0x80, 0x81
_LOAD, _LOADX, _LOAD_MEMORY, _LOADX_MEMORY = 0x00, 0x01, 0x60, 0x61
_STORE, _STOREX, _TO_X, _FROM_X, _NEGATE = 0x02, 0x03, 0x07, 0x87, 0x84
_RETURN, _RETURN_A, _JUMP = 0x06, 0x16, 0x05
_BY_X = 0x08
_CLASS, _ARITHMETIC, _JUMPS = 0x07, 0x04, 0x05
_DIVIDE, _SHIFTS = 0x34, (0x64, 0x74)
_OPERATIONS: dict[int, Callable[[int, int], int]] = {
    0x04: operator.add,
    0x14: operator.sub,
    0x24: operator.mul,
    _DIVIDE: operator.floordiv,
    0x44: operator.or_,
    0x54: operator.and_,
    0x64: lambda a, by: a << (by & 31),  # as x86 shifts
    0x74: lambda a, by: a >> (by & 31),
    0xA4: operator.xor,
}
_CONDITIONS: dict[int, Callable[[int, int], bool]] = {
    0x15: operator.eq,
    0x25: operator.gt,
    0x35: operator.ge,
    0x45: lambda a, bits: a & bits != 0,
}
_MEMORY_CODES = (_LOAD_MEMORY, _LOADX_MEMORY, _STORE, _STOREX)
_PLAIN_CODES = {_LOAD_SIZE, _LOADX_SIZE, _LOAD, _LOADX, _TO_X, _FROM_X, _NEGATE, _RETURN, _RETURN_A}

Value = int | None
"""A word of 32 bits; None where it is not known."""


@dataclass(frozen=True)
class Call:
    """A system call, and its arguments as far as they are known; those left out at the end are not."""

    name: str
    number: int
    arguments: tuple[Value, ...] = ()

    def data(self) -> list[Value]:
        """The words of struct seccomp_data. From where the call is made is not known."""
        words: list[Value] = [self.number, _ARCH_X86_64, None, None]
        for argument in (*self.arguments, *[None] * 6)[:6]:
            words += (None, None) if argument is None else (argument & _WORD, argument >> 32 & _WORD)
        return words


class MalformedFilterError(Exception):
    """The bytes are no filter that the kernel would take."""


class _Instruction(NamedTuple):
    code: int
    if_true: int
    if_false: int
    k: int


class _State(NamedTuple):
    at: int
    a: Value = 0  # the kernel clears both registers
    x: Value = 0
    memory: tuple[Value, ...] = (None,) * _MEMORY_WORDS


class Filter:
    """One filter."""

    def __init__(self, raw: bytes) -> None:
        """raw: struct sock_filter, one behind the other, as the program gave them to the kernel.

        Raises:
            MalformedFilterError: it has an instruction that seccomp does not take, or leads out of itself.
        """
        if not 0 < len(raw) <= _MAX_INSTRUCTIONS * _INSTRUCTION.size or len(raw) % _INSTRUCTION.size:
            raise MalformedFilterError(f"{len(raw)} bytes")
        self._program = [_Instruction(*fields) for fields in _INSTRUCTION.iter_unpack(raw)]
        for number, instruction in enumerate(self._program):
            if not _is_valid(instruction, len(self._program) - number - 1):
                raise MalformedFilterError(f"instruction {number}: {instruction}")
        if self._program[-1].code not in (_RETURN, _RETURN_A):
            raise MalformedFilterError("it has no end")

    def verdicts(self, call: Call) -> frozenset[Value]:
        """All that the filter may return for a call; with None if that cannot be told."""
        data = call.data()
        found: set[Value] = set()
        states = [_State(0)]
        seen: set[_State] = set()
        for _ in range(_MAX_STEPS):
            if not states:
                return frozenset(found)
            state = states.pop()
            instruction = self._program[state.at]
            if instruction.code == _RETURN:
                found.add(instruction.k)
            elif instruction.code == _RETURN_A:
                found.add(state.a)
            elif instruction.code & _CLASS == _JUMPS:
                ways = _jump(instruction, state)
                new = ways if len(ways) == 1 else [way for way in ways if way not in seen]
                seen.update(new if len(ways) > 1 else ())
                states += new
            else:
                if instruction.code == _DIVIDE | _BY_X and not state.x:
                    found.add(0)  # what the kernel returns at once where it would divide by 0
                    if state.x == 0:
                        continue
                states.append(_step(instruction, state, data))
        return frozenset({None})

    def objection(self, call: Call) -> str | None:
        """What the filter may do other than allow a call, in a few words; None if it allows it in any case."""
        for verdict in self.verdicts(call):
            if verdict is None:
                return "does something that cannot be foreseen"
            if verdict & _ACTION not in _ALLOWED:
                return _MEANINGS.get(verdict & _ACTION, "ends the process")  # for what the kernel does not know
        return None


def _is_valid(instruction: _Instruction, left: int) -> bool:
    """As seccomp_check_filter and bpf_check_classic say. left: how many instructions come behind."""
    code, if_true, if_false, k = instruction
    if code == _LOAD_WORD:
        return k < _DATA_SIZE and k % 4 == 0
    if code in _MEMORY_CODES:
        return k < _MEMORY_WORDS
    if code == _JUMP:
        return k < left
    if code & ~_BY_X in _CONDITIONS:
        return max(if_true, if_false) < left
    if code == _DIVIDE:
        return k != 0
    if code in _SHIFTS:
        return k < 32
    return code in _PLAIN_CODES or code & ~_BY_X in _OPERATIONS


def _jump(instruction: _Instruction, state: _State) -> list[_State]:
    """Where a jump may lead."""
    behind = state.at + 1
    if instruction.code == _JUMP:
        return [state._replace(at=behind + instruction.k)]
    ways = [state._replace(at=behind + instruction.if_true), state._replace(at=behind + instruction.if_false)]
    other = state.x if instruction.code & _BY_X else instruction.k
    if state.a is None or other is None:
        return ways
    return [ways[0] if _CONDITIONS[instruction.code & ~_BY_X](state.a, other) else ways[1]]


def _step(instruction: _Instruction, state: _State, data: list[Value]) -> _State:
    """The state behind an instruction that neither jumps nor returns."""
    code, _, _, k = instruction
    at, a, x, memory = state
    if code & _CLASS == _ARITHMETIC:
        a = _calculated(code, a, x if code & _BY_X else k)
    elif code in (_STORE, _STOREX):
        memory = (*memory[:k], a if code == _STORE else x, *memory[k + 1 :])
    elif code == _TO_X:
        x = a
    elif code == _FROM_X:
        a = x
    else:
        loaded: Value = k
        if code == _LOAD_WORD:
            loaded = data[k // 4]
        elif code in (_LOAD_SIZE, _LOADX_SIZE):
            loaded = _DATA_SIZE
        elif code in (_LOAD_MEMORY, _LOADX_MEMORY):
            loaded = memory[k]
        a, x = (a, loaded) if code & _CLASS == _LOADX else (loaded, x)
    return _State(at + 1, a, x, memory)


def _calculated(code: int, a: Value, by: Value) -> Value:
    if code == _NEGATE:
        return None if a is None else -a & _WORD
    if a is None or by is None:
        return None
    return _OPERATIONS[code & ~_BY_X](a, by) & _WORD
