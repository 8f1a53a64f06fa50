"""Where threads stand: instruction pointers and what their stacks point to, as module offsets."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from test_sites import BASE, LIBRARY_BASE, MemoryTarget, new_target

from dynacut.shared.coverage.standing import standing_of
from dynacut.shared.target import Mapping

STACK = 0x7FFF_FFFD_E000


class WithStack:
    """The target of test_sites with a stack of these words."""

    def __init__(self, *words: int) -> None:
        self.target: MemoryTarget = new_target()
        self.stack = struct.pack(f"<{len(words)}Q", *words).ljust(4096, b"\0")
        self.label, self.exe, self.has_shadow_stack = self.target.label, self.target.exe, False
        self.modules = self.target.modules

    @property
    def mappings(self) -> Sequence[Mapping]:
        stack = Mapping(STACK, STACK + 4096, True, True, False, True, 0, "[stack]", 0)
        return [*self.target.mappings, stack]

    def private_pages(self, mapping: Mapping) -> Sequence[int]:
        return self.target.private_pages(mapping)

    def read(self, address: int, size: int) -> bytes:
        if STACK <= address < STACK + 4096:
            return self.stack[address - STACK :][:size]
        return self.target.read(address, size)


def offsets(target: WithStack, *threads: tuple[int, int]) -> dict[str, set[int]]:
    return {module.name: set(module.blocks) for module in standing_of(target, threads).modules}


def test_instruction_pointers_and_return_addresses_of_all_threads() -> None:
    probe = new_target()
    alpha, beta, extra = (probe.address(name) for name in ("alpha", "beta", "extra"))
    target = WithStack(0, alpha + 4, 17, extra, beta)
    assert offsets(target, (beta + 1, STACK)) == {
        "server": {alpha + 4 - BASE, beta - BASE, beta + 1 - BASE},
        "libextra.so.1": {extra - LIBRARY_BASE},
    }
    assert offsets(target, (extra, STACK + 32), (extra + 1, STACK + 40)) == {
        "server": {beta - BASE},
        "libextra.so.1": {extra - LIBRARY_BASE, extra + 1 - LIBRARY_BASE},
    }


def test_what_lies_behind_the_stack_pointer_is_over() -> None:
    alpha = new_target().address("alpha")
    assert offsets(WithStack(alpha), (0, STACK + 8)) == {}
    assert offsets(WithStack(alpha), (0, STACK + 7)) == {"server": {alpha - BASE}}, "an unaligned pointer: its word"


def test_a_stack_pointer_to_nowhere_and_pointers_to_data_are_no_code() -> None:
    target = WithStack(STACK, 0x1234)
    assert offsets(target, (0, 0x10), (STACK, STACK)) == {}
