"""Block maps kept between runs: reading one takes milliseconds, and no capstone. What is believed: see module_cache."""

from __future__ import annotations

import struct
from array import array
from pathlib import Path

from dynacut.shared.binary import module_cache
from dynacut.shared.binary.blocks import BlockMap
from dynacut.shared.binary.cache_folder import cache_folder
from dynacut.shared.binary.elf import ElfFile

VERSION = 3
"""To be raised whenever the format changes, or BlockMap.of finds other blocks than it did before."""

_HEADER = struct.Struct("<QQQ")  # base, bytes of the bitmap, number of blocks


def cached_block_map(elf: ElfFile, folder: Path | None = None) -> BlockMap:
    """Return the module's blocks: from the cache, or computed (see BlockMap.of) and then cached.

    A cache that cannot be read, written or trusted is as good as none. Files without a build-id are not
    cached. DynacutError if the module is malformed.
    """
    folder = cache_folder() if folder is None else folder
    known = load(elf, folder)
    if known is None:
        known = BlockMap.of(elf)
        store(elf, known, folder)
    return known


def load(elf: ElfFile, folder: Path) -> BlockMap | None:
    """Return the cached blocks; None if there are none, or they are damaged, outdated or another module's."""
    data = module_cache.load(elf, _kind(), folder)
    if data is None or len(data) < _HEADER.size:
        return None
    base, bitmap_size, count = _HEADER.unpack_from(data)
    starts_at = _HEADER.size + bitmap_size
    if len(data) != starts_at + 12 * count:
        return None
    starts, sizes = array("Q"), array("I")
    starts.frombytes(data[starts_at : starts_at + 8 * count])
    sizes.frombytes(data[starts_at + 8 * count :])
    return BlockMap(elf, base, data[_HEADER.size : starts_at], starts, sizes)


def store(elf: ElfFile, blocks: BlockMap, folder: Path) -> bool:
    """Keep blocks for later, atomically; whether that worked."""
    header = _HEADER.pack(blocks.base, len(blocks.boundary_bits), len(blocks.block_starts))
    body = header + blocks.boundary_bits + blocks.block_starts.tobytes() + blocks.block_sizes.tobytes()
    return module_cache.store(elf, _kind(), body, folder)


def _kind() -> module_cache.Kind:
    return module_cache.Kind("blocks", b"dynablks", VERSION)
