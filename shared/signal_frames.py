"""Signal masks that a thread gets back when a handler returns: they wait in the handler's frame on its stack.

Source: struct rt_sigframe and struct ucontext (arch/x86/include/asm/sigframe.h, include/uapi/asm/ucontext.h), as
setup_rt_frame writes them: the mask is there twice, and only the second one, uc_sigmask, is read by rt_sigreturn.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from dynacut.shared.occupancy import aligned_words
from dynacut.shared.target import Target

_CONTEXT = 8
"""Of the ucontext, behind the trampoline's address."""
_LINK, _RSP, _SEGMENTS, _OLD_MASK, _MASK = 8, 160, 184, 208, 296
"""Of uc_link, rsp, the selectors, oldmask and uc_sigmask in the ucontext."""
_SIZE = _CONTEXT + _MASK + 8
_USER_SELECTORS = (0x33, 0x2B)
_WORD = struct.Struct("<Q")
_SELECTORS = struct.Struct("<HHHH")


@dataclass(frozen=True)
class SavedMask:
    """A mask in a signal frame. address: of uc_sigmask; original: as the kernel saved it; mask: as it is now."""

    address: int
    original: int
    mask: int


def saved_masks(target: Target, stack_pointer: int, restorers: Collection[int]) -> list[SavedMask]:
    """The masks in the signal frames on a thread's stack, and on those that an alternate one has interrupted.

    restorers: the trampolines by which the program's handlers return.
    """
    found = []
    scanned: set[int] = set()
    pending = [stack_pointer]
    while pending:
        pointer = pending.pop()
        mapping = next((part for part in target.mappings if part.start <= pointer < part.end), None)
        if mapping is None or mapping.start in scanned:
            continue
        scanned.add(mapping.start)
        first = pointer & ~7
        stack = target.read(first, mapping.end - first)
        for position, frame in _frames(stack, restorers):
            original, mask = _word(frame, _OLD_MASK), _word(frame, _MASK)
            found.append(SavedMask(first + position + _CONTEXT + _MASK, original, mask))
            pending.append(_word(frame, _RSP))
    return found


def _frames(stack: bytes, restorers: Collection[int]) -> Iterator[tuple[int, bytes]]:
    """What has the shape of a frame, of which much is known: it is going to be written to."""
    for restorer in {*restorers} - {0}:
        for position in aligned_words(stack, _WORD.pack(restorer), 0):
            frame = stack[position : position + _SIZE]
            if len(frame) < _SIZE:
                continue
            code, _, _, data = _SELECTORS.unpack_from(frame, _CONTEXT + _SEGMENTS)
            if (code, data) == _USER_SELECTORS and _word(frame, _LINK) == 0:
                yield position, frame


def _word(frame: bytes, place: int) -> int:
    return int(_WORD.unpack_from(frame, _CONTEXT + place)[0])
