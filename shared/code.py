"""A module of a target together with what its ELF file tells: symbols, functions, blocks. All read on demand, once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dynacut.shared.binary.cache_folder import cache_folder
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.functions import FunctionRange, function_at
from dynacut.shared.errors import DynacutError
from dynacut.shared.target import Module, Target

if TYPE_CHECKING:
    from dynacut.shared.binary.blocks import BlockMap
    from dynacut.shared.binary.entries import Entries
    from dynacut.shared.binary.symbols import SymbolTable

_WORTH_A_BLOCK_MAP = 64
"""This many single checks of instruction boundaries take about as long as the block map of a server."""


class Code:
    """What is known of the code of one module. Offsets are module offsets (relative to the load base)."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self._decoded = 0

    @cached_property
    def elf(self) -> ElfFile:
        """The ELF file the target has mapped; DynacutError if it cannot be read or is malformed."""
        try:
            return self.module.elf
        except DynacutError as error:
            raise DynacutError(
                f"{self.module.path}: {error.problem}",
                error.advice or "its file must be readable to patch it",
            ) from None

    @cached_property
    def symbols(self) -> SymbolTable:
        """The module's symbols, those of separate debug information included."""
        from dynacut.shared.binary.symbols import SymbolTable

        return SymbolTable.of(self.elf, Path(self.module.path), self.module.root)

    @cached_property
    def functions(self) -> tuple[FunctionRange, ...]:
        """The ranges of all functions, ascending, from the cache where it has them."""
        from dynacut.shared.binary.function_cache import cached_function_ranges

        return cached_function_ranges(self.elf)

    def function_at(self, offset: int) -> FunctionRange | None:
        """The function that contains an offset."""
        return function_at(self.functions, offset)

    @cached_property
    def entries(self) -> Entries:
        """Where functions begin, without their parts that lie apart (``work.cold``)."""
        from dynacut.shared.binary.entries import Entries

        return Entries(self.elf)

    @cached_property
    def restartable(self) -> tuple[range, ...]:
        """The offsets at which an int3 would abort a restartable sequence."""
        from dynacut.shared.binary.rseq import restartable_sequences

        return restartable_sequences(self.elf)

    def is_restartable(self, start: int, end: int) -> bool:
        """Whether one of the offsets from start to end lies in a restartable sequence."""
        return any(part.start < end and start < part.stop for part in self.restartable)

    def is_boundary(self, offset: int) -> bool:
        """Whether an instruction certainly begins at an offset.

        A few offsets are checked by decoding their functions, which takes a millisecond each; for more of them the
        block map of the module is worth its cost.
        """
        from dynacut.shared.binary.blocks import is_instruction_boundary

        if self._quick_blocks is None and self._decoded < _WORTH_A_BLOCK_MAP:
            self._decoded += 1
            return is_instruction_boundary(self.elf, offset, self.functions)
        return self.blocks.is_boundary(offset)

    @cached_property
    def _quick_blocks(self) -> BlockMap | None:
        """The block map if the cache has it."""
        from dynacut.shared.binary import block_cache

        return block_cache.load(self.elf, cache_folder())

    def block_size(self, offset: int) -> int:
        """The bytes from an offset to the end of its basic block. Needs the block map of the whole module."""
        block = self.blocks.block_at(offset)
        if block is None:
            raise DynacutError(f"{self.module.name}+{offset:#x} lies in no known basic block")
        return block.end - offset

    @cached_property
    def blocks(self) -> BlockMap:
        """The module's basic blocks, from the cache where it has them."""
        from dynacut.shared.binary import block_cache

        return self._quick_blocks or block_cache.cached_block_map(self.elf)

    def describe(self, offset: int) -> str:
        """An offset as people know it: ``setCommand+0x12`` where a symbol is known, else ``redis-server+0xab072``."""
        found = self.symbols.at(offset)
        if found is None:
            return f"{self.module.name}+{offset:#x}"
        symbol, distance = found
        return f"{symbol.name}+{distance:#x}" if distance else str(symbol.name)

    def source_lines(self, offsets: Iterable[int]) -> dict[int, str]:
        """What is known of the source of some offsets, ``t_string.c:295``; empty without debug information."""
        from dynacut.shared.binary.lines import file_with_lines
        from dynacut.shared.binary.source_lines import source_lines

        elf = file_with_lines(self.elf, Path(self.module.path), self.module.root)
        return source_lines(elf, offsets) if elf is not None else {}


class CodeOf:
    """The code of every module of a target."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._codes = {module.path: Code(module) for module in target.modules}
        parts = sorted(
            (
                (mapping.start, mapping.end, self._codes[module.path])
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
        return self._codes[module.path]

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
