"""Where threads stand: the code they are in or return to, which must not be removed under their feet."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator

from dynacut.shared.coverage.coverage import Coverage, CoveredModule
from dynacut.shared.signal_frames import whole_stacks
from dynacut.shared.target import Target


def standing_of(target: Target, threads: Iterable[tuple[int, int]]) -> Coverage:
    """The code that threads are in, or that a word on their stacks points to: module offsets, each of one byte.

    threads: instruction pointer and stack pointer of each. A word may be old, or no return address at all: then a block
    is kept that could have gone. Interrupted stacks behind an alternate one are not followed.

    Raises:
        DynacutError: a stack cannot be read, or lies amid much other memory.
    """
    parts = sorted(
        (mapping.start, mapping.end, module) for module in target.modules for mapping in module.executable_mappings
    )
    starts = [start for start, _, _ in parts]
    found: dict[str, dict[int, int]] = {}
    for address in {word for rip, rsp in threads for word in (rip, *_stack(target, rsp))}:
        index = bisect_right(starts, address) - 1
        if index < 0 or address >= parts[index][1]:
            continue
        module = parts[index][2]
        found.setdefault(module.path, {})[address - module.base] = 1
    return Coverage(tuple(CoveredModule.of(path, blocks) for path, blocks in found.items()))


def _stack(target: Target, rsp: int) -> Iterator[int]:
    """The words of a stack, from the stack pointer on."""
    for stack in whole_stacks(target, rsp, ()):
        yield from array("Q", stack.contents)
