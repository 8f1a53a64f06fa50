"""The frame descriptions of .eh_frame: FDEs, one for each piece of code, and CIEs, what several have in common.

Layout: the LSB core specification, "Exception Frames", and DWARF 4 section 6.4. A walk of our own, because
pyelftools needs 0.48 s for redis.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from dynacut.shared.binary.elf import SHT_NOBITS, ElfFile
from dynacut.shared.errors import DynacutError

OMIT = 0xFF
"""DW_EH_PE_omit: in the place of a pointer's encoding, there is no pointer."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_PC_REL_SDATA4 = 0x1B
_FIXED = {0x00: "<Q", 0x02: "<H", 0x03: "<I", 0x04: "<Q", 0x0A: "<h", 0x0B: "<i", 0x0C: "<q"}
_FAST_RANGE = struct.Struct("<iI")


@dataclass(frozen=True)
class Cie:
    """What FDEs have in common. instructions: of the frame program that theirs follow upon."""

    pointer_encoding: int
    lsda_encoding: int
    has_length: bool
    is_signal_frame: bool
    code_factor: int
    data_factor: int
    instructions: bytes

    @cached_property
    def is_simple(self) -> bool:
        """Whether its FDEs are as C compilers write nearly all: a relative start, a size, and no more to know."""
        return self.pointer_encoding == _PC_REL_SDATA4 and self.lsda_encoding == OMIT and not self.is_signal_frame


class Fde(NamedTuple):
    """One function's. start, end, lsda: module offsets. rest: where in the section its augmentation data lie, and its
    instructions; limit: where they end."""

    start: int
    end: int
    lsda: int | None
    cie: Cie
    rest: int
    limit: int


class Reader:
    """A cursor over encoded data whose first byte has a vaddr."""

    def __init__(self, data: memoryview, address: int) -> None:
        self.data = data
        self.address = address

    def leb128(self, position: int, *, signed: bool = False) -> tuple[int, int]:
        """Return the number at position and the position after it; IndexError at the end of the data."""
        value = shift = 0
        while True:
            byte = self.data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
            if shift > 63:
                raise DynacutError("a LEB128 number has more than 64 bits")
        if signed and byte & 0x40:
            value -= 1 << shift
        return value, position

    def pointer(self, encoding: int, position: int) -> tuple[int, int]:
        """Return a DW_EH_PE_* pointer as a vaddr, and the position after it; 0 stays 0, as for unwinders."""
        form, application = encoding & 0x0F, encoding & 0x70
        if form in (0x01, 0x09):
            value, after = self.leb128(position, signed=form == 0x09)
        elif form in _FIXED:
            value = struct.unpack_from(_FIXED[form], self.data, position)[0]
            after = position + struct.calcsize(_FIXED[form])
        else:
            raise DynacutError(f"pointer encoding {encoding:#x} is unknown")
        if application == 0x10 and value:
            value += self.address + position
        elif application not in (0x00, 0x10):
            raise DynacutError(f"pointer encoding {encoding:#x} is not supported")
        return value & 0xFFFF_FFFF_FFFF_FFFF, after


def eh_frame(elf: ElfFile) -> tuple[memoryview, int, bool] | None:
    """Return .eh_frame's bytes, its vaddr, and whether it ends at the first zero, not at the data's end."""
    section = elf.section(".eh_frame")
    if section is not None:
        if not section.is_loaded or not section.size or section.kind == SHT_NOBITS:  # NOBITS: a debug file
            return None
        # The bytes that are mapped, wherever a hostile section header says they are in the file.
        return elf.view(section.address - elf.link_base, section.size), section.address, False
    header_at = elf.eh_frame_header
    if header_at is None or elf.sections:
        return None
    header = elf.view(header_at, 8)
    if header[0] != 1 or header[1] == OMIT:
        return None
    address, _ = Reader(header, header_at + elf.link_base).pointer(header[1], 4)
    segment = elf.segment_at(address - elf.link_base)
    if segment is None or address - elf.link_base >= segment.file_end:
        raise elf.malformed(".eh_frame_hdr points outside the file")
    offset = address - elf.link_base
    return elf.view(offset, segment.file_end - offset), address, True


def fdes(elf: ElfFile) -> Iterator[Fde]:
    """Yield the FDEs in their order in the section; DynacutError if it is malformed."""
    place = None
    try:
        place = eh_frame(elf)
        if place is not None:
            yield from _walk(*place, elf.link_base)
    except (struct.error, IndexError, DynacutError) as error:
        raise elf.malformed(f".eh_frame: {error}") from error


def _walk(data: memoryview, address: int, stops_at_zero: bool, link_base: int) -> Iterator[Fde]:
    reader = Reader(data, address)
    cies: dict[int, Cie] = {}
    position, size = 0, len(data)
    while position + 4 <= size:
        entry = position
        length = _U32.unpack_from(data, position)[0]
        position += 4
        if length == 0:
            if stops_at_zero:
                return
            continue
        if length == 0xFFFF_FFFF:
            length = _U64.unpack_from(data, position)[0]
            position += 8
        end = position + length
        if end > size:
            raise DynacutError(f"an entry at {entry:#x} is longer than the section")
        # In .eh_frame this field has 4 bytes even when the length has 8 (unlike .debug_frame).
        cie_distance = _U32.unpack_from(data, position)[0]
        if cie_distance:
            cie_at = position - cie_distance
            cie = cies.get(cie_at)
            if cie is None:
                cie = cies[cie_at] = _parse_cie(data, address, cie_at)
            if cie.is_simple and length >= 12:
                distance, code_size = _FAST_RANGE.unpack_from(data, position + 4)
                start = address - link_base + position + 4 + distance
                yield Fde(start, start + code_size, None, cie, position + 12, end)
                position = end
                continue
            yield _parse_fde(reader, cie, position + 4, end, link_base)
        position = end


def _parse_cie(data: memoryview, address: int, entry: int) -> Cie:
    if entry < 0:
        raise DynacutError("an FDE refers to a CIE before the section")
    length = _U32.unpack_from(data, entry)[0]
    position = entry + 4
    if length == 0xFFFF_FFFF:
        length = _U64.unpack_from(data, position)[0]
        position += 8
    end = position + length
    if end > len(data) or _U32.unpack_from(data, position)[0] != 0:
        raise DynacutError(f"no CIE at {entry:#x}")
    reader = Reader(data[:end], address)
    version = data[position + 4]
    position += 5
    augmentation = bytes(data[position : min(end, position + 32)]).partition(b"\0")[0].decode("latin-1")
    position += len(augmentation) + 1
    if version not in (1, 3) or (augmentation and augmentation[0] != "z"):
        raise DynacutError(f"CIE version {version} with augmentation {augmentation!r} is not supported")
    code_factor, position = reader.leb128(position)
    data_factor, position = reader.leb128(position, signed=True)
    position = position + 1 if version == 1 else reader.leb128(position)[1]
    pointer_encoding, lsda_encoding = 0, OMIT
    instructions = position
    if augmentation:
        size, position = reader.leb128(position)
        instructions = position + size
    for letter in augmentation[1:]:
        if letter == "R":
            pointer_encoding, position = reader.data[position], position + 1
        elif letter == "L":
            lsda_encoding, position = reader.data[position], position + 1
        elif letter == "P":
            _, position = reader.pointer(reader.data[position] & 0x7F, position + 1)
        elif letter != "S":
            raise DynacutError(f"CIE augmentation {augmentation!r} is not supported")
    if pointer_encoding & 0x80:
        raise DynacutError(f"pointer encoding {pointer_encoding:#x} is not supported")
    return Cie(
        pointer_encoding,
        lsda_encoding,
        bool(augmentation),
        "S" in augmentation,
        code_factor,
        data_factor,
        bytes(data[instructions:end]),
    )


def _parse_fde(reader: Reader, cie: Cie, position: int, end: int, link_base: int) -> Fde:
    start, position = reader.pointer(cie.pointer_encoding, position)
    size, position = reader.pointer(cie.pointer_encoding & 0x07, position)
    lsda, rest = None, position
    if cie.has_length and cie.lsda_encoding != OMIT:
        _, position = reader.leb128(position)
        lsda, position = reader.pointer(cie.lsda_encoding & 0x7F, position)
    if position > end:
        raise DynacutError("an FDE is shorter than its fields")
    first = start - link_base
    return Fde(first, first + size, lsda - link_base if lsda else None, cie, rest, end)
