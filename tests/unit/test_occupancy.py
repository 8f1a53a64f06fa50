"""Whether a thread is amid bytes that change: where it is, and where its stack says that it returns to."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import cast

from test_sites import BASE, new_target

from dynacut.shared.occupancy import Occupancy
from dynacut.shared.patch_set import ByteEdit
from dynacut.shared.signal_frames import NO_FRAMES
from dynacut.shared.target import Mapping, Target

EDIT = ByteEdit(BASE + 0x1100, bytes(8), bytes(range(8)))
GOING = ByteEdit(BASE + 0x1100, bytes(8), bytes(8))
"""Bytes that stay as they are until they are taken away."""


def test_the_first_byte_of_an_edit_is_no_place_but_of_what_goes_it_is() -> None:
    assert not Occupancy([EDIT], NO_FRAMES).contains(EDIT.address)
    assert Occupancy([GOING], NO_FRAMES).contains(GOING.address)
    for edit in (EDIT, GOING):
        assert Occupancy([edit], NO_FRAMES).contains(edit.end - 1)
        assert not Occupancy([edit], NO_FRAMES).contains(edit.end)


def test_a_return_address_is_found_wherever_it_leads_in_a_large_range() -> None:
    target = new_target()
    stack = next(part for part in target.mappings if part.writable)
    large = ByteEdit(0x1234 << 32, bytes(1 << 25), bytes(1 << 25))
    occupancy = Occupancy([large], NO_FRAMES)
    for offset in (0, 1 << 24, (1 << 25) - 1):
        target.write(stack.start + 16, struct.pack("<Q", large.address + offset))
        assert occupancy.on_stacks(target, stack.start) == large.address + offset
    target.write(stack.start + 16, struct.pack("<Q", large.end))
    assert occupancy.on_stacks(target, stack.start) is None


class Stack:
    """A target that is a stack of zeros alone. looks: how often its mappings were asked for."""

    label = "process 4711"

    def __init__(self) -> None:
        self.looks = 0

    @property
    def mappings(self) -> Sequence[Mapping]:
        self.looks += 1
        return [Mapping(0x1000, 0x1000 + (1 << 16), True, True, False, True, 0, "[stack]", 0)]

    def read(self, address: int, size: int) -> bytes:
        assert address >= 0x1000
        return bytes(size)


def test_zeros_on_a_stack_are_no_signal_frames() -> None:
    """Else every zero word would be followed, with all threads of the process stopped meanwhile."""
    stack = Stack()
    assert Occupancy([EDIT], NO_FRAMES).on_stacks(cast(Target, stack), 0x1000) is None
    assert stack.looks == 1
