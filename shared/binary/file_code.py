"""What an ELF file tells of its code: symbols, functions, blocks. All read on demand, once."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dynacut.shared.binary.cache_folder import cache_folder
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.functions import FunctionRange

if TYPE_CHECKING:
    from dynacut.shared.binary.blocks import BlockMap
    from dynacut.shared.binary.entries import Entries
    from dynacut.shared.binary.symbols import SymbolTable

_WORTH_A_BLOCK_MAP = 64
"""This many single checks of instruction boundaries take about as long as the block map of a server."""


class FileCode:
    """The code in one file, by module offsets (relative to the load base)."""

    def __init__(self, elf: ElfFile, path: Path, root: Path) -> None:
        """path: what a process with this root calls the file; both for separate debug information."""
        self.elf = elf
        self._path = path
        self._root = root
        self._decoded: dict[int, bool] = {}

    @cached_property
    def symbols(self) -> SymbolTable:
        """The symbols, those of separate debug information included."""
        from dynacut.shared.binary.symbols import SymbolTable

        return SymbolTable.of(self.elf, self._path, self._root)

    @cached_property
    def functions(self) -> tuple[FunctionRange, ...]:
        """The ranges of all functions, ascending, from the cache where it has them."""
        from dynacut.shared.binary.function_cache import cached_function_ranges

        return cached_function_ranges(self.elf)

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

    def is_boundary(self, offset: int) -> bool:
        """Whether an instruction certainly begins at an offset.

        A few offsets are checked by decoding their functions, which takes a millisecond each; for more of them the
        block map is worth its cost.
        """
        from dynacut.shared.binary.blocks import is_instruction_boundary

        if offset in self._decoded:
            return self._decoded[offset]
        if self._quick_blocks is None and len(self._decoded) < _WORTH_A_BLOCK_MAP:
            self._decoded[offset] = is_instruction_boundary(self.elf, offset, self.functions)
            return self._decoded[offset]
        return self.blocks.is_boundary(offset)

    @cached_property
    def _quick_blocks(self) -> BlockMap | None:
        """The block map if the cache has it."""
        from dynacut.shared.binary import block_cache

        return block_cache.load(self.elf, cache_folder())

    @cached_property
    def blocks(self) -> BlockMap:
        """The basic blocks, from the cache where it has them."""
        from dynacut.shared.binary import block_cache

        return self._quick_blocks or block_cache.cached_block_map(self.elf)

    def source_lines(self, offsets: Iterable[int]) -> dict[int, str]:
        """What is known of the source of some offsets, ``t_string.c:295``; empty without debug information."""
        from dynacut.shared.binary.lines import file_with_lines
        from dynacut.shared.binary.source_lines import source_lines

        elf = file_with_lines(self.elf, self._path, self._root)
        return source_lines(elf, offsets) if elf is not None else {}
