"""Unused executable bytes of a process, for the first stub: later ones lie in the region that the first one maps."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from dynacut.live.refusal import NeedsCheckpointError
from dynacut.shared.target import PAGE_SIZE, Mapping, Target

_ALIGNMENT = 16
_PT_LOAD = 1
_PF_X = 1


def find_slack(process: Target, size: int) -> int:
    """The address of size zero bytes that no segment claims: the tail of the vDSO, else of a module's text.

    A slot that an earlier stub lies in is not zero and so passed over: a thread may still be in it.

    Raises:
        NeedsCheckpointError: there are none left.
    """
    for start, end in _tails(process):
        data = process.read(start, end - start)
        free = len(data.rstrip(b"\0"))
        address = -(-(start + free) // _ALIGNMENT) * _ALIGNMENT
        if address + size <= end:
            return address
    raise NeedsCheckpointError(
        f"{process.label} has no {size} unused bytes of executable memory left for a first system call"
    )


def _tails(process: Target) -> Iterator[tuple[int, int]]:
    """The parts of executable mappings behind their segment's end. The vDSO first: it belongs to no file."""
    for mapping in process.mappings:
        if mapping.path == "[vdso]":
            yield from _tail(process, mapping, mapping.start)
    for module in process.modules:
        for mapping in module.executable_mappings:
            if mapping.private and not mapping.writable:
                yield from _tail(process, mapping, module.base)


def _tail(process: Target, mapping: Mapping, base: int) -> Iterator[tuple[int, int]]:
    header = process.read(base, 64)
    (table_offset,) = struct.unpack_from("<Q", header, 32)
    entry_size, count = struct.unpack_from("<HH", header, 54)
    if header[:5] != b"\x7fELF\x02" or entry_size != 56 or table_offset + entry_size * count > PAGE_SIZE:
        return
    table = process.read(base + table_offset, entry_size * count)
    segments = [struct.unpack_from("<IIQQQQQQ", table, index * entry_size) for index in range(count)]
    loads = [segment for segment in segments if segment[0] == _PT_LOAD]
    if not loads:
        return
    # p_vaddr of the first segment tells the link base of a program that is not position-independent.
    bias = base - (loads[0][3] & ~(PAGE_SIZE - 1))
    for _, flags, _, vaddr, _, file_size, memory_size, _ in loads:
        end = bias + vaddr + max(file_size, memory_size)
        if flags & _PF_X and mapping.start < end < mapping.end and mapping.end - end < PAGE_SIZE:
            yield end, mapping.end
