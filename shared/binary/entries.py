"""Whether code begins as a function does that was just called: with the return address on top of the stack.

Not all that has an FDE does. Compilers put the unlikely parts of a function elsewhere, with an FDE of their own
(``work.cold``); these begin amid the function, with its frame on the stack. Their FDEs say so in their first row.

Source: DWARF 5 section 6.4.2, and for DW_CFA_GNU_* the LSB core specification, "DWARF Extensions".
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dynacut.shared.binary.eh_frame import Cie, Reader, eh_frame, fdes
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.errors import DynacutError

_RSP, _RETURN_ADDRESS = 7, 16  # System V ABI for x86-64, figure 3.36
_ADVANCES = frozenset({0x01, 0x02, 0x03, 0x04})
_U, _S, _BLOCK = "u", "s", "b"
# The operands of the instructions; those with one in the lower bits of the opcode are seen to by themselves.
_OPERANDS = {
    0x00: "",  # nop
    0x05: _U + _U,  # offset_extended
    0x06: _U,  # restore_extended
    0x07: _U,  # undefined
    0x08: _U,  # same_value
    0x09: _U + _U,  # register
    0x0A: "",  # remember_state
    0x0B: "",  # restore_state
    0x0C: _U + _U,  # def_cfa
    0x0D: _U,  # def_cfa_register
    0x0E: _U,  # def_cfa_offset
    0x0F: _BLOCK,  # def_cfa_expression
    0x10: _U + _BLOCK,  # expression
    0x11: _U + _S,  # offset_extended_sf
    0x12: _U + _S,  # def_cfa_sf
    0x13: _S,  # def_cfa_offset_sf
    0x14: _U + _U,  # val_offset
    0x15: _U + _S,  # val_offset_sf
    0x16: _U + _BLOCK,  # val_expression
    0x2E: _U,  # GNU_args_size
}


@dataclass
class _Row:
    """Where the caller's frame is, and what is saved in this one. cfa: a register and a distance."""

    cfa: tuple[int, int] = (-1, 0)
    saved: dict[int, int | None] = field(default_factory=dict)
    """Register to its distance from the CFA; None: it is had in some other way."""

    @property
    def is_of_a_call(self) -> bool:
        return self.cfa == (_RSP, 8) and self.saved == {_RETURN_ADDRESS: -8}


class Entries:
    """The entries of a module's functions."""

    def __init__(self, elf: ElfFile) -> None:
        """Reads the FDEs, which takes some milliseconds; DynacutError if .eh_frame is malformed."""
        self._section = eh_frame(elf)
        self._fdes = {fde.start: fde for fde in fdes(elf)}

    def __contains__(self, offset: int) -> bool:
        """Whether the FDE that begins at a module offset says of its first instruction that it was just called.

        False if there is none, or it says something that is not understood.
        """
        fde = self._fdes.get(offset)
        if self._section is None or fde is None:
            return False
        data, address, _ = self._section
        reader = Reader(data[: fde.limit], address)
        row = _Row()
        try:
            instructions = fde.rest
            if fde.cie.has_length:
                size, instructions = reader.leb128(instructions)
                instructions += size
            _run(row, Reader(memoryview(fde.cie.instructions), 0), 0, fde.cie)
            _run(row, reader, instructions, fde.cie)
        except (IndexError, DynacutError):
            return False
        return row.is_of_a_call


def _run(row: _Row, program: Reader, position: int, cie: Cie) -> None:
    """Applies the instructions from a position on, up to the first that is not for the first row.

    Raises:
        DynacutError: one is not understood. IndexError: the program ends amid one.
    """
    while position < len(program.data):
        opcode = program.data[position]
        position += 1
        high, low = opcode & 0xC0, opcode & 0x3F
        if (high == 0x40 and low) or opcode in _ADVANCES:
            return
        if high == 0x80:
            distance, position = program.leb128(position)
            row.saved[low] = distance * cie.data_factor
        elif high == 0xC0:
            row.saved.pop(low, None)
        elif high == 0:
            operands, position = _operands(program, position, opcode)
            _apply(row, opcode, operands, cie)


def _operands(program: Reader, position: int, opcode: int) -> tuple[list[int], int]:
    kinds = _OPERANDS.get(opcode)
    if kinds is None:
        raise DynacutError(f"call frame instruction {opcode:#x} is unknown")
    values = []
    for kind in kinds:
        value, position = program.leb128(position, signed=kind == _S)
        if kind == _BLOCK:
            position += value
        values.append(value)
    return values, position


def _apply(row: _Row, opcode: int, operands: list[int], cie: Cie) -> None:
    match opcode, operands:
        case 0x0C, [register, distance]:
            row.cfa = (register, distance)
        case 0x12, [register, distance]:
            row.cfa = (register, distance * cie.data_factor)
        case 0x0D, [register]:
            row.cfa = (register, row.cfa[1])
        case 0x0E, [distance]:
            row.cfa = (row.cfa[0], distance)
        case 0x13, [distance]:
            row.cfa = (row.cfa[0], distance * cie.data_factor)
        case 0x0F, _:
            row.cfa = (-1, 0)
        case ((0x05 | 0x11), [register, distance]):
            row.saved[register] = distance * cie.data_factor
        case ((0x06 | 0x08), [register]):
            row.saved.pop(register, None)
        case ((0x07 | 0x09 | 0x10 | 0x14 | 0x15 | 0x16), [register, *_]):
            row.saved[register] = None
