"""Binds a user's library to a target: what the dynamic linker would have made of it, but that no code of it runs.

Each relocation is applied here, against the modules of the target. The library's own symbols come first, as with
dlopen's RTLD_DEEPBIND: a program that exports a function of the same name must not get its calls.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from mmap import PROT_EXEC, PROT_READ, PROT_WRITE
from pathlib import Path

from dynacut.shared.binary.dynamic import Dynamic, DynamicSymbol, Rela, Relocation, SymbolType
from dynacut.shared.binary.elf import Segment
from dynacut.shared.code import CodeOf
from dynacut.shared.errors import DynacutError
from dynacut.shared.library.link_scope import LinkScope
from dynacut.shared.memory import NewMemory
from dynacut.shared.target import PAGE_SIZE, Target

_PT_GNU_RELRO = 0x6474E552
_TLS_RELOCATIONS = frozenset({Rela.DTPMOD, Rela.DTPOFF, Rela.TPOFF, Rela.TLSDESC})
_WORD = struct.Struct("<Q")


@dataclass
class _Image:
    """The library's memory while it is relocated: the file-backed bytes of each segment."""

    start: int
    parts: list[tuple[Segment, bytearray]]

    def read(self, offset: int) -> int | None:
        """The word at a module offset; None where there is none from the file."""
        for segment, data in self.parts:
            if segment.offset <= offset and offset + 8 <= segment.file_end:
                return int(_WORD.unpack_from(data, offset - segment.offset)[0])
        return None

    def write(self, offset: int, value: int) -> bool:
        """Puts a word at a module offset; False where no writable segment has it from the file."""
        for segment, data in self.parts:
            if segment.writable and segment.offset <= offset and offset + 8 <= segment.file_end:
                _WORD.pack_into(data, offset - segment.offset, value % (1 << 64))
                return True
        return False


class Linker:
    """Binds one library to one target."""

    def __init__(self, path: Path, dynamic: Dynamic, target: Target) -> None:
        """path: the library's, for messages."""
        self._path = path
        self._dynamic = dynamic
        self._scope = LinkScope(CodeOf(target))
        self._label = target.label
        self._bound: set[int] = set()
        self._problems: list[str] = []

    @property
    def bound_to(self) -> tuple[int, ...]:
        """The load bases of the target's modules that the library holds addresses of, once it is linked."""
        return tuple(sorted(self._bound))

    def linked(self, start: int) -> tuple[NewMemory, ...]:
        """The library's memory for a place, ascending by address. start: absolute, a multiple of the page size.

        Raises:
            DynacutError: a library or symbol it needs is not there, or a relocation is not possible.
        """
        self._bound.clear()
        self._problems.clear()
        self._check_needed()
        elf = self._dynamic.elf
        image = _Image(start, [(part, bytearray(elf.view(part.offset, part.file_size))) for part in elf.segments])
        for relocation in self._dynamic.relocations():
            value = self._value(relocation, start)
            if value is not None and not image.write(relocation.place, value):
                raise elf.malformed(f"a relocation at {relocation.place:#x}, where nothing can be written")
        for place in self._dynamic.packed_places():
            before = image.read(place)
            if before is None or not image.write(place, start + before - elf.link_base):
                raise elf.malformed(f"a relocation at {place:#x}, where nothing can be written")
        if self._problems:
            self._refuse(self._problems)
        return tuple(_joined(self._segments(image)))

    def _refuse(self, problems: list[str]) -> None:
        advice = "leave these calls out, or start the program with the library that has them"
        if len(problems) == 1:
            raise DynacutError(f"{self._path}: {problems[0]}", advice)
        raise DynacutError(f"{self._path} cannot be bound to {self._label}", advice, details=problems)

    def _check_needed(self) -> None:
        missing = [name for name in self._dynamic.needed if self._scope.providing(name) is None]
        if missing:
            present = ", ".join(module.code.module.name for module in self._scope.modules) or "none: it is static"
            raise DynacutError(
                f"{self._path} needs {', '.join(missing)}, which {self._label} has not loaded",
                f"link it against nothing but what is there: {present}",
            )

    def _value(self, relocation: Relocation, start: int) -> int | None:
        """What a relocation writes; None for nothing, or where a problem was noted."""
        match relocation.kind:
            case Rela.NONE:
                return None
            case Rela.RELATIVE:
                return start + relocation.addend - self._dynamic.elf.link_base
            case Rela.ABSOLUTE | Rela.GLOB_DAT | Rela.JUMP_SLOT:
                if relocation.symbol >= len(self._dynamic.symbols):
                    raise self._dynamic.elf.malformed(f"a relocation with symbol {relocation.symbol}")
                addend = relocation.addend if relocation.kind == Rela.ABSOLUTE else 0
                address = self._address(self._dynamic.symbols[relocation.symbol], start)
                return None if address is None else address + addend
            case kind if kind in _TLS_RELOCATIONS:
                what = "a thread-local variable of another library"
            case Rela.IRELATIVE:
                what = "an indirect function (IFUNC) of its own, which would have to be run to be bound"
            case Rela.COPY:
                what = "a copy of another library's variable, as only programs may"
            case kind:
                what = f"a relocation of type {kind}, which is not known here"
        raise DynacutError(f"{self._path} has {what}", "build it by gcc -shared -fPIC, and without that")

    def _address(self, symbol: DynamicSymbol, start: int) -> int | None:
        if symbol.kind == SymbolType.TLS:
            self._note(f"{symbol.name} is a thread-local variable")
            return None
        if symbol.is_defined:
            if symbol.kind == SymbolType.IFUNC:
                self._note(f"{symbol.name} is an indirect function (IFUNC), which would have to be run to be bound")
            return start + symbol.offset
        if not symbol.name:
            return 0
        found = self._scope.find(symbol.name, symbol.version)
        if found is None:
            if not symbol.is_weak:
                self._note(self._unresolved(symbol))
            return 0
        if found.symbol.kind == SymbolType.TLS:
            self._note(f"{symbol.name} is a thread-local variable")
            return None
        self._bound.add(found.module.base)
        try:
            return self._scope.address(found)
        except DynacutError as error:
            self._note(f"{error.problem}; {error.advice}")
            return None

    def _note(self, problem: str) -> None:
        if problem not in self._problems:
            self._problems.append(problem)

    def _unresolved(self, symbol: DynamicSymbol) -> str:
        wanted = f"{symbol.name}@{symbol.version}" if symbol.version else symbol.name
        problem = f"no module of {self._label} defines {wanted}"
        if versions := self._scope.versions(symbol.name):
            return f"{problem}; there is {', '.join(f'{symbol.name}@{version}' for version in versions)}"
        near = self._scope.near(symbol.name)
        return f"{problem}; near matches: {', '.join(near)}" if near else problem

    def _segments(self, image: _Image) -> Iterator[NewMemory]:
        """The memory in whole pages, that of PT_GNU_RELRO read-only: it needs no change any more."""
        relro = self._dynamic.elf.program_header(_PT_GNU_RELRO)
        sealed = 0 if relro is None else page(relro.address + relro.memory_size - self._dynamic.elf.link_base)
        for segment, data in image.parts:
            first, end = page(segment.offset), page_end(segment.offset + segment.memory_size)
            contents = bytes(segment.offset - first) + bytes(data)
            protection = PROT_READ | (PROT_EXEC if segment.executable else 0)
            if segment.writable and relro is not None and first <= relro.address - self._dynamic.elf.link_base < end:
                middle = min(max(first, sealed), end)
                if first < middle:
                    size = middle - first
                    yield NewMemory(image.start + first, size, protection, contents[:size])
                first, contents = middle, contents[middle - first :]
            if segment.writable:
                protection |= PROT_WRITE
            if first < end:
                yield NewMemory(image.start + first, end - first, protection, contents)


def _joined(segments: Iterable[NewMemory]) -> Iterator[NewMemory]:
    """Neighbours of the same protection made one, as the kernel would."""
    last: NewMemory | None = None
    for segment in segments:
        if last and last.address + last.size == segment.address and last.protection == segment.protection:
            contents = last.contents.ljust(last.size, b"\0") + segment.contents
            last = replace(last, size=last.size + segment.size, contents=contents)
            continue
        if last:
            yield last
        last = segment
    if last:
        yield last


def page(offset: int) -> int:
    """The start of the page that an offset lies in."""
    return offset & -PAGE_SIZE


def page_end(offset: int) -> int:
    """The first page boundary at or behind an offset."""
    return -(-offset // PAGE_SIZE) * PAGE_SIZE
