"""Signal frames on the stacks of threads: found, and the masks in them that a thread gets back when a handler returns.

Source: struct rt_sigframe and struct ucontext (arch/x86/include/asm/sigframe.h, include/uapi/asm/ucontext.h), as
setup_rt_frame writes them: the mask is there twice, and only the second one, uc_sigmask, is read by rt_sigreturn.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from dynacut.shared.errors import DynacutError
from dynacut.shared.target import SIGTRAP_BIT, Target, Writable

_CONTEXT = 8
"""Of the ucontext, behind the trampoline's address."""
_LINK, _RSP, _RIP, _SEGMENTS, _OLD_MASK, _MASK = 8, 160, 168, 184, 208, 296
"""Of uc_link, rsp, rip, the selectors, oldmask and uc_sigmask in the ucontext."""
_SIZE = _CONTEXT + _MASK + 8
RIP_IN_FRAME = _CONTEXT + _RIP
_USER_SELECTORS = (0x33, 0x2B)
_WORD = struct.Struct("<Q")
_SELECTORS = struct.Struct("<HHHH")
_SEARCHED_FOR_MASKS = 8 << 20
"""Bytes of one stack; threads of a runtime's own making may have theirs amid gigabytes of heap."""

_LARGEST = 32 << 20
"""Bytes from a stack pointer to the end of its mapping: the threads stand still while they are searched."""


@dataclass(frozen=True)
class SignalFrames:
    """How signal frames are recognised on a stack: by the trampoline that their handler returns by."""

    restorers: frozenset[int]
    """Of the program's own handlers."""
    own: int
    """Of dynacut's handler. A thread in there has hit an int3; it goes on elsewhere than its frame says."""


NO_FRAMES = SignalFrames(frozenset(), 0)


class Stack(NamedTuple):
    """A stack from its pointer on. start: the address of its first aligned word."""

    start: int
    contents: bytes
    frames: list[tuple[int, int]]
    """Where what may be a signal frame begins in the contents, and by which trampoline its handler returns."""


def stacks(target: Target, stack_pointer: int, restorers: Collection[int], most: int | None = None) -> Iterator[Stack]:
    """The stacks of a thread: the present one, and those that a signal handler on an alternate one has interrupted.

    restorers: the trampolines by which handlers return. most: how many bytes of each are looked at. Nothing comes where
    the pointer leads to no mapping known of.

    Raises:
        DynacutError: a stack cannot be read.
    """
    scanned: set[int] = set()
    pending = [stack_pointer]
    while pending:
        pointer = pending.pop()
        mapping = next((part for part in target.mappings if part.start <= pointer < part.end), None)
        if mapping is None or mapping.start in scanned:
            continue
        scanned.add(mapping.start)
        first = pointer & ~7
        size = mapping.end - first
        contents = target.read(first, size if most is None else min(size, most))
        frames = [
            (position, restorer)
            for restorer in {*restorers} - {0}  # 0, for none, is all over a stack
            for position in aligned_words(contents, _WORD.pack(restorer), 0)
            if position + _SIZE <= len(contents)
        ]
        pending += [_word(contents, position, _RSP) for position, _ in frames]
        yield Stack(first, contents, frames)


def whole_stacks(target: Target, stack_pointer: int, restorers: Collection[int]) -> Iterator[Stack]:
    """The stacks of a thread as stacks() gives them, to their ends.

    Raises:
        DynacutError: one has no end that is near: it lies amid other memory, and nobody can wait for a search of that.
    """
    for stack in stacks(target, stack_pointer, restorers, _LARGEST):
        if len(stack.contents) >= _LARGEST:
            raise DynacutError(
                f"a thread of {target.label} has its stack amid other memory, at {stack.start:#x}: where it may "
                "return to cannot be told in a short time",
                "use --scope entry, which needs not know it",
            )
        yield stack


@dataclass(frozen=True)
class SavedMask:
    """A mask in a signal frame. address: of uc_sigmask; original: as the kernel saved it; mask: as it is now."""

    address: int
    original: int
    mask: int


def blocking_masks(target: Target, stack_pointer: int, restorers: Collection[int]) -> list[SavedMask]:
    """The masks in the signal frames of a thread that block SIGTRAP, as the kernel saved them.

    Raises:
        DynacutError: a stack cannot be read.
    """
    saved = _saved_masks(target, stack_pointer, restorers)
    return [each for each in saved if each.mask & SIGTRAP_BIT and each.mask == each.original]


def clear_masks(target: Writable, masks: Collection[SavedMask]) -> None:
    """Clears SIGTRAP from masks that wait in signal frames."""
    for each in masks:
        target.write(each.address, _WORD.pack(each.mask & ~SIGTRAP_BIT))


def put_masks_back(target: Writable, stack_pointer: int, restorers: Collection[int], before: Collection[int]) -> None:
    """Puts those masks back in the signal frames of a thread that were cleared. before: what is on record.

    Raises:
        DynacutError: a stack cannot be read.
    """
    for each in _saved_masks(target, stack_pointer, restorers):
        if each.original in before and each.original & ~SIGTRAP_BIT == each.mask:
            target.write(each.address, _WORD.pack(each.original))


def _saved_masks(target: Target, stack_pointer: int, restorers: Collection[int]) -> list[SavedMask]:
    if not restorers:
        return []  # without handlers there are no frames
    return [
        SavedMask(
            stack.start + position + _CONTEXT + _MASK,
            _word(stack.contents, position, _OLD_MASK),
            _word(stack.contents, position, _MASK),
        )
        for stack in stacks(target, stack_pointer, restorers, _SEARCHED_FOR_MASKS)
        for position, _ in stack.frames
        if _has_the_shape(stack.contents, position)
    ]


def _has_the_shape(stack: bytes, position: int) -> bool:
    """Whether it is a frame, of which much is known: it is going to be written to."""
    code, _, _, data = _SELECTORS.unpack_from(stack, position + _CONTEXT + _SEGMENTS)
    return (code, data) == _USER_SELECTORS and _word(stack, position, _LINK) == 0


def _word(stack: bytes, position: int, place: int) -> int:
    return int(_WORD.unpack_from(stack, position + _CONTEXT + place)[0])


def aligned_words(stack: bytes, pattern: bytes, shift: int) -> Iterator[int]:
    """The positions in a stack of aligned words of which a pattern is the part from byte `shift` on."""
    position = stack.find(pattern)
    while position >= 0:
        if position % 8 == shift:
            yield position - shift
        position = stack.find(pattern, position + 1)
