"""Function ranges kept between runs, as walking .eh_frame takes 20 ms for redis. What is believed: see module_cache."""

from __future__ import annotations

from array import array
from pathlib import Path

from dynacut.shared.binary import module_cache
from dynacut.shared.binary.cache_folder import cache_folder
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.functions import FunctionRange, function_ranges

VERSION = 1
"""To be raised whenever the format changes, or function_ranges finds others than it did before."""

_WORTH_KEEPING = 256
"""Fewer functions are found about as quickly as they are read."""


def cached_function_ranges(elf: ElfFile, folder: Path | None = None) -> tuple[FunctionRange, ...]:
    """Return the module's functions: from the cache, or computed (see function_ranges) and then cached.

    A cache that cannot be read, written or trusted is as good as none. DynacutError if the module is malformed.
    """
    folder = cache_folder() if folder is None else folder
    known = load(elf, folder)
    if known is None:
        known = function_ranges(elf)
        if len(known) >= _WORTH_KEEPING:
            store(elf, known, folder)
    return known


def load(elf: ElfFile, folder: Path) -> tuple[FunctionRange, ...] | None:
    """Return the cached ranges; None if there are none, or they are damaged, outdated or another module's."""
    data = module_cache.load(elf, _kind(), folder)
    if data is None or len(data) % 16:
        return None
    limits = array("Q")
    limits.frombytes(data)
    return tuple(map(FunctionRange, limits[::2], limits[1::2]))


def store(elf: ElfFile, ranges: tuple[FunctionRange, ...], folder: Path) -> bool:
    """Keep ranges for later, atomically; whether that worked."""
    limits = array("Q", [limit for function in ranges for limit in function])
    return module_cache.store(elf, _kind(), limits.tobytes(), folder)


def _kind() -> module_cache.Kind:
    return module_cache.Kind("functions", b"dynafncs", VERSION)
