"""Where a module's functions are, from .eh_frame: it is there in stripped binaries too.

Measured on redis, nginx and lighttpd: the ranges cover 97-98 % of .text.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dynacut.shared.binary.eh_frame import OMIT, Reader, fdes
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.errors import DynacutError

PLT_SECTIONS = frozenset({".plt", ".plt.got", ".plt.sec", ".plt.bnd", ".iplt"})
"""Sections of stubs: they have FDEs (one for the whole section), but hold no function."""

# What a signal trampoline starts with: mov $15,%rax and mov $15,%eax (__NR_rt_sigreturn).
_SIGRETURN = (b"\x48\xc7\xc0\x0f\0\0\0", b"\xb8\x0f\0\0\0")


class FunctionRange(NamedTuple):
    """The code that one FDE describes, as module offsets; end is exclusive. A .cold part has its own."""

    start: int
    end: int


def function_ranges(elf: ElfFile) -> tuple[FunctionRange, ...]:
    """Return the code ranges that .eh_frame describes, ascending and not overlapping.

    Empty if the file has no .eh_frame. Left out: PLT stubs, ranges that are not in the file-backed part of an
    executable segment (functions the linker dropped), and signal frames that are no sigreturn trampoline.
    Where ranges overlap, the former ends where the latter begins, and what then belongs to none is not code
    we know anything about. DynacutError if the section is malformed.
    """
    stubs = [
        (section.address - elf.link_base, section.address - elf.link_base + section.size)
        for section in elf.sections
        if section.name in PLT_SECTIONS
    ]
    first_stub = min((first for first, _ in stubs), default=0)
    last_stub = max((last for _, last in stubs), default=0)
    executable = [(s.offset, s.file_end) for s in elf.segments if s.executable]
    low = high = 0  # the segment of the range before: nearly always this one's too
    found: dict[int, int] = {}
    for start, end, _, cie, _, _ in fdes(elf):
        if start >= end:
            continue
        if first_stub <= start < last_stub and any(first <= start < last for first, last in stubs):
            continue
        if not (low <= start and end <= high):
            place = next((place for place in executable if place[0] <= start and end <= place[1]), None)
            if place is None:
                continue
            low, high = place
        if not elf.sections and _is_stub(elf.read(start, min(12, end - start))):
            continue
        if cie.is_signal_frame:
            adjusted = _signal_frame_start(elf, start, end)
            if adjusted is None:
                continue
            start = adjusted
        found[start] = max(end, found.get(start, 0))
    ordered = sorted(found.items())
    limits = (*(start for start, _ in ordered[1:]), 1 << 64)
    return tuple(
        FunctionRange(start, end if end < limit else limit)
        for (start, end), limit in zip(ordered, limits, strict=False)
    )


def function_at(ranges: Sequence[FunctionRange], offset: int) -> FunctionRange | None:
    """Return the range that holds a module offset, or None; ranges as function_ranges gives them."""
    index = bisect_right(ranges, (offset, 1 << 64)) - 1  # without a key function, ten times as quick
    if index >= 0 and offset < ranges[index].end:
        return ranges[index]
    return None


def landing_pads(elf: ElfFile) -> tuple[int, ...]:
    """Return where C++ and Rust unwinding enters functions (module offsets): no branch leads there.

    From the call-site tables that the FDEs name (.gcc_except_table; Itanium C++ ABI, "Exception Handling
    Tables"). DynacutError if a table is malformed.
    """
    pads: set[int] = set()
    budget = len(elf.data)  # hostile FDEs could all name one large table
    for fde in fdes(elf):
        if fde.lsda is None:
            continue
        segment = elf.segment_at(fde.lsda)
        if segment is None or fde.lsda >= segment.file_end:
            raise elf.malformed(f"an exception table at {fde.lsda:#x}")
        data = elf.view(fde.lsda, segment.file_end - fde.lsda)
        try:
            for pad in _pads_of(Reader(data, fde.lsda + elf.link_base), fde.start + elf.link_base):
                budget -= 1
                if budget < 0:
                    raise DynacutError("more call sites than bytes")
                if pad is not None:
                    pads.add(pad)
        except (struct.error, IndexError, DynacutError) as error:
            raise elf.malformed(f"the exception table at {fde.lsda:#x}: {error}") from error
    return tuple(sorted(pad - elf.link_base for pad in pads))


def _pads_of(table: Reader, function_start: int) -> Iterator[int | None]:
    """Yield the landing pad of each call site, None where it has none."""
    encoding, position = table.data[0], 1
    pads_base = function_start
    if encoding != OMIT:
        pads_base, position = table.pointer(encoding, position)
    encoding, position = table.data[position], position + 1
    if encoding != OMIT:
        _, position = table.leb128(position)
    encoding, position = table.data[position], position + 1
    size, position = table.leb128(position)
    end = position + size
    while position < end:
        _, position = table.pointer(encoding & 0x0F, position)
        _, position = table.pointer(encoding & 0x0F, position)
        pad, position = table.pointer(encoding & 0x0F, position)
        _, position = table.leb128(position)
        yield pads_base + pad if pad else None


def _is_stub(code: bytes) -> bool:
    """Whether code starts like a PLT: jmp or push of slot(%rip). For files without section names."""
    code = code.removeprefix(b"\xf3\x0f\x1e\xfa").removeprefix(b"\xf2")
    return code[:2] in (b"\xff\x25", b"\xff\x35")


def _signal_frame_start(elf: ElfFile, start: int, end: int) -> int | None:
    """Return where the trampoline begins: glibc's FDE starts a byte before, as unwinders look up pc - 1."""
    code = elf.read(start, min(8, end - start))
    for shift in (0, 1):
        if code[shift:].startswith(_SIGRETURN):
            return start + shift
    return None
