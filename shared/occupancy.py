"""Whether a thread is amid bytes that are to change, or will return there: what must be known before they do."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence

from dynacut.handlers.records import INT3
from dynacut.shared.patch_set import ByteEdit
from dynacut.shared.signal_frames import RIP_IN_FRAME, SignalFrames, aligned_words, whole_stacks
from dynacut.shared.target import Target


class Occupancy:
    """The places that no thread may be at, or return to: behind the first byte of each edit.

    Where an edit changes nothing, its bytes are to be taken away, and the first one is such a place as well.
    """

    def __init__(self, edits: Sequence[ByteEdit], frames: SignalFrames) -> None:
        self._frames = frames
        # Where int3 bytes go away nobody is inside: who has hit one is in the handler, and goes on at the old bytes.
        ranges = sorted(
            (edit.address + (edit.old != edit.new), edit.end)
            for edit in edits
            if len(edit.old) > 1 and not (edit.old[:1] == INT3 and edit.new[:1] != INT3)
        )
        self._starts = [start for start, _ in ranges]
        self._ends = [end for _, end in ranges]
        # Memory is searched for the upper five bytes of the addresses at the speed of memchr; few patterns suffice.
        upper = {part for start, end in ranges for part in range(start >> 24, (end - 1 >> 24) + 1)}
        self._patterns = {struct.pack("<Q", part)[:5] for part in upper}

    @property
    def is_free(self) -> bool:
        """Whether there is no such place: every edit is of one byte, or takes int3 bytes away."""
        return not self._starts

    def contains(self, address: int) -> bool:
        """Whether an address is one of the places."""
        return self._index(address) is not None

    def is_behind_first(self, address: int) -> bool:
        """Whether an address is right behind the first byte of an edit, where a thread is that has hit an int3."""
        index = self._index(address)
        return index is not None and address == self._starts[index]

    def _index(self, address: int) -> int | None:
        index = bisect_right(self._starts, address) - 1
        return index if index >= 0 and address < self._ends[index] else None

    def on_stacks(self, target: Target, stack_pointer: int) -> int | None:
        """An aligned word of the thread's stacks that points amid an edit: a return address, or what looks like one.

        Stacks: the present one, and those that a signal handler on an alternate stack has interrupted. The stack
        pointer itself if it points to no mapping known of: then there is no telling.

        Raises:
            DynacutError: a stack has no end that is near: it lies amid other memory, which nobody can wait for.
        """
        is_known = False
        for stack in whole_stacks(target, stack_pointer, {*self._frames.restorers, self._frames.own}):
            is_known = True
            passing = {position + RIP_IN_FRAME for position, restorer in stack.frames if restorer == self._frames.own}
            for pattern in self._patterns:
                for position in aligned_words(stack.contents, pattern, 3):
                    (word,) = struct.unpack_from("<Q", stack.contents, position)
                    if self._index(word) is not None and position not in passing:
                        return int(word)
        return None if is_known else stack_pointer
