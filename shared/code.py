"""A module of a target together with what its ELF file tells: symbols, functions, blocks. All read on demand, once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dynacut.shared.binary.elf import ElfFile, FileIdentity
from dynacut.shared.binary.file_code import FileCode
from dynacut.shared.binary.functions import FunctionRange, function_at
from dynacut.shared.errors import DynacutError
from dynacut.shared.target import Module, Target

if TYPE_CHECKING:
    from dynacut.shared.binary.blocks import BlockMap
    from dynacut.shared.binary.entries import Entries
    from dynacut.shared.binary.symbols import SymbolTable


class KnownFiles:
    """What was found out about files, for the next target that maps the same ones: a process and then its image."""

    def __init__(self) -> None:
        self._files: dict[FileIdentity, FileCode] = {}

    def of(self, module: Module) -> FileCode:
        """The code of a module's file: known already, or read anew where it is not the very same one.

        Raises:
            DynacutError: it cannot be read, or is malformed.
        """
        known = self._files.get(identity) if self._files and (identity := _identity(module.file)) else None
        if known is None:
            known = FileCode(module.elf, Path(module.path), module.root)
            if module.elf.identity is not None:
                self._files[module.elf.identity] = known
        else:
            module.take(known.elf)
        return known


def _identity(path: Path) -> FileIdentity | None:
    try:
        return FileIdentity.of(path.stat())
    except OSError:
        return None


class Code:
    """What is known of the code of one module. Offsets are module offsets (relative to the load base)."""

    def __init__(self, module: Module, known: KnownFiles | None = None) -> None:
        self.module = module
        self._known = known or KnownFiles()

    @cached_property
    def file(self) -> FileCode:
        """The code in the file that the target has mapped; DynacutError if it cannot be read or is malformed."""
        try:
            return self._known.of(self.module)
        except DynacutError as error:
            path, problem = self.module.path, error.problem
            raise DynacutError(
                problem if path in problem else f"{path}: {problem}",
                error.advice or "its file must be readable to patch it",
            ) from None

    @property
    def elf(self) -> ElfFile:
        """The file; DynacutError as file."""
        return self.file.elf

    @property
    def symbols(self) -> SymbolTable:
        """The module's symbols, those of separate debug information included."""
        return self.file.symbols

    @property
    def functions(self) -> tuple[FunctionRange, ...]:
        """The ranges of all functions, ascending."""
        return self.file.functions

    @property
    def blocks(self) -> BlockMap:
        """The module's basic blocks."""
        return self.file.blocks

    def function_at(self, offset: int) -> FunctionRange | None:
        """The function that contains an offset."""
        return function_at(self.functions, offset)

    @property
    def entries(self) -> Entries:
        """Where functions begin, without their parts that lie apart (``work.cold``)."""
        return self.file.entries

    def is_restartable(self, start: int, end: int) -> bool:
        """Whether one of the offsets from start to end lies in a restartable sequence."""
        return any(part.start < end and start < part.stop for part in self.file.restartable)

    def is_boundary(self, offset: int) -> bool:
        """Whether an instruction certainly begins at an offset."""
        return self.file.is_boundary(offset)

    def block_size(self, offset: int) -> int:
        """The bytes from an offset to the end of its basic block. Needs the block map of the whole module."""
        block = self.blocks.block_at(offset)
        if block is None:
            raise DynacutError(f"{self.module.name}+{offset:#x} lies in no known basic block")
        return block.end - offset

    def describe(self, offset: int) -> str:
        """An offset as people know it: ``setCommand+0x12`` where a symbol is known, else ``redis-server+0xab072``."""
        found = self.symbols.at(offset)
        if found is None:
            return f"{self.module.name}+{offset:#x}"
        symbol, distance = found
        return f"{symbol.name}+{distance:#x}" if distance else str(symbol.name)

    def source_lines(self, offsets: Iterable[int]) -> dict[int, str]:
        """What is known of the source of some offsets, ``t_string.c:295``; empty without debug information."""
        return self.file.source_lines(offsets)


class CodeOf:
    """The code of every module of a target."""

    def __init__(self, target: Target, known: KnownFiles | None = None) -> None:
        """known: where to look for what is known of a file, and to leave what is found out."""
        self.target = target
        known = known or KnownFiles()
        self._codes = {module.base: Code(module, known) for module in target.modules}
        parts = sorted(
            (
                (mapping.start, mapping.end, self._codes[module.base])
                for module in target.modules
                for mapping in module.mappings
            ),
            key=lambda part: part[0],
        )
        self._starts = [start for start, _, _ in parts]
        self._parts = [(end, code) for _, end, code in parts]

    def __iter__(self) -> Iterator[Code]:
        return iter(self._codes.values())

    def of(self, module: Module) -> Code:
        """The code of a module."""
        return self._codes[module.base]

    def containing(self, address: int) -> Code | None:
        """The code that an absolute address lies in."""
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        end, code = self._parts[index]
        return code if address < end else None

    def named(self, name: str) -> list[Code]:
        """The modules that a name in a SITE may mean."""
        return [code for code in self._codes.values() if name in code.module.names]

    def describe(self, address: int) -> str:
        """An absolute address as ``module+0xOFFSET``; plain where it lies in no module."""
        code = self.containing(address)
        return f"{code.module.name}+{address - code.module.base:#x}" if code else f"{address:#x}"


def code_of_file(path: Path) -> Code:
    """The code of an ELF file that is not mapped anywhere: only offsets have a meaning."""
    module = Module(
        name=path.name,
        names=frozenset({path.name}),
        path=str(path),
        file=path,
        root=Path("/"),
        base=0,
        end=0,
        is_executable=False,
        mappings=(),
    )
    return Code(module)
