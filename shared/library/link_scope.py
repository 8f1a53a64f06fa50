"""The modules of a target as its dynamic linker sees them: which definition a symbol is bound to, and where that lies.

Nothing is run to find out: a target may be an image. What only running code can tell, the choice that an indirect
function (STT_GNU_IFUNC) makes for the processor, is read where the target's own linker has left it.
"""

from __future__ import annotations

import difflib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from dynacut.shared.binary.dynamic import Dynamic, DynamicSymbol, Rela, SymbolType
from dynacut.shared.binary.elf import PT_DYNAMIC
from dynacut.shared.code import Code, CodeOf
from dynacut.shared.errors import DynacutError

_DT_DEBUG = 21
_MAX_MODULES = 4096
_MAX_DYNAMIC = 1 << 16
# <link.h>: struct r_debug { int r_version; struct link_map *r_map; … };
# struct link_map { Elf64_Addr l_addr; char *l_name; Elf64_Dyn *l_ld; struct link_map *l_next, …; }.
_R_MAP = 8
_LINK_MAP = struct.Struct("<QQQQ")


@dataclass(frozen=True)
class Linked:
    """A module with its dynamic section."""

    code: Code
    dynamic: Dynamic

    @property
    def base(self) -> int:
        """The address of module offset 0."""
        return self.code.module.base

    @cached_property
    def names(self) -> frozenset[str]:
        """What a DT_NEEDED may call it."""
        path = self.code.module.path
        return frozenset({path.rpartition("/")[2], path, self.code.elf.soname or path})

    def contains(self, address: int) -> bool:
        """Whether an absolute address lies in its code."""
        return any(part.start <= address < part.end for part in self.code.module.executable_mappings)


@dataclass(frozen=True)
class Definition:
    """A symbol in the module that defines it."""

    module: Linked
    symbol: DynamicSymbol


class LinkScope:
    """The modules in the order in which symbols are looked for: that of the target's own link map."""

    def __init__(self, codes: CodeOf) -> None:
        self._target = codes.target
        self.modules = [Linked(code, Dynamic(code.elf)) for code in _load_order(codes)]

    def providing(self, needed: str) -> Linked | None:
        """The module that a DT_NEEDED means."""
        return next((module for module in self.modules if needed in module.names), None)

    def find(self, name: str, version: str) -> Definition | None:
        """What a reference is bound to: the first definition in the order of the modules whose version fits.

        As glibc does (elf/dl-lookup.c): a reference with a version also fits a definition without any; one without a
        version takes the default version.
        """
        for module in self.modules:
            for symbol in module.dynamic.exported_as(name):
                fits = symbol.version in (version, "") if version else symbol.is_default
                if fits:
                    return Definition(module, symbol)
        return None

    def versions(self, name: str) -> list[str]:
        """The versions of a name that there are."""
        return sorted({symbol.version for module in self.modules for symbol in module.dynamic.exported_as(name)} - {""})

    def near(self, name: str) -> list[str]:
        """Up to three names that are defined and look like this one."""
        names = {other for module in self.modules for other in module.dynamic.exported}
        # difflib takes 20 ms for a thousand names: only those of about this length have a chance.
        alike = sorted(other for other in names if abs(len(other) - len(name)) < 4)
        return difflib.get_close_matches(name, alike, n=3, cutoff=0.75)

    def address(self, found: Definition) -> int:
        """The absolute address that a reference to a definition gets.

        Raises:
            DynacutError: it is an indirect function, and no module of the target holds what that was resolved to.
        """
        if found.symbol.kind != SymbolType.IFUNC:
            return found.module.base + found.symbol.offset
        for value in self._resolved(found):
            if self._is_code(value):
                return value
        raise DynacutError(
            f"{found.symbol.name} of {found.module.code.module.name} is chosen for the processor when it is first "
            f"needed (an IFUNC), and {self._target.label} has not needed it",
            "do without it in the library, with a loop of your own for example",
        )

    def _resolved(self, found: Definition) -> Iterator[int]:
        """What words of the target hold that stand for an indirect function: in its own module first, whose relocation
        names the resolver; then wherever else the symbol is bound to. A slot that was not bound yet leads back into its
        own module's linkage table, which a resolved one never does.
        """
        resolver = found.symbol.offset + found.module.dynamic.elf.link_base
        for place, kind, _, addend in found.module.dynamic.relocations():
            if kind == Rela.IRELATIVE and addend == resolver:
                yield self._word(found.module.base + place)
        for module in self.modules:
            for place, kind, index, addend in module.dynamic.relocations():
                if kind not in (Rela.GLOB_DAT, Rela.JUMP_SLOT, Rela.ABSOLUTE) or addend:
                    continue
                if index >= len(module.dynamic.symbols):
                    continue
                symbol = module.dynamic.symbols[index]
                if symbol.name != found.symbol.name or self.find(symbol.name, symbol.version) != found:
                    continue
                value = self._word(module.base + place)
                if not module.contains(value):
                    yield value

    def _word(self, address: int) -> int:
        return int.from_bytes(self._target.read(address, 8), "little")

    def _is_code(self, address: int) -> bool:
        return any(part.executable and part.start <= address < part.end for part in self._target.mappings)


def _load_order(codes: CodeOf) -> list[Code]:
    """The modules as the link map lists them: the executable, what it was started with, what it loaded later.

    A module that is not in it belongs to another namespace, or to nobody; a static program has no link map, and
    nothing to bind to.
    """
    ordered: dict[int, Code] = {}
    for address in _dynamic_sections(codes):
        code = codes.containing(address)
        if code is not None:
            ordered.setdefault(code.module.base, code)
    return list(ordered.values())


def _dynamic_sections(codes: CodeOf) -> Iterator[int]:
    """The addresses of the dynamic sections in the target's link map."""
    target = codes.target
    executable = next((code for code in codes if code.module.is_executable), None)
    header = executable.elf.program_header(PT_DYNAMIC) if executable else None
    if executable is None or header is None:
        return
    address = executable.module.base + header.address - executable.elf.link_base
    section = target.read(address, min(header.memory_size, _MAX_DYNAMIC) & -16)
    debug = next((value for tag, value in struct.iter_unpack("<qQ", section) if tag == _DT_DEBUG), 0)
    entry = int.from_bytes(target.read(debug + _R_MAP, 8), "little") if debug else 0
    if not entry:
        raise DynacutError(
            f"{target.label} has no list of its libraries yet: its dynamic linker has not run",
            "wait until it has started",
        )
    for _ in range(_MAX_MODULES):
        _, _, dynamic_section, entry = _LINK_MAP.unpack(target.read(entry, _LINK_MAP.size))
        yield dynamic_section
        if not entry:
            return
