"""Block maps kept between runs, one file for each module: reading one takes milliseconds, and no capstone.

A file is named by the build-id, but is only believed if it was made from the same bytes: anyone can give a
program a build-id that is another's, and a wrong boundary would put an int3 amid an instruction.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path

from dynacut.shared.blocks import BlockMap
from dynacut.shared.cache_folder import cache_folder
from dynacut.shared.elf import ElfFile

VERSION = 1
"""To be raised whenever the format changes, or BlockMap.of finds other blocks than it did before."""

_MAGIC = b"dynablks"
# Magic, version, CRC-32 of all after it, digest of the module, base, bytes of the bitmap, number of blocks.
_HEADER = struct.Struct("<8sII32sQQQ")
_CHECKED_FROM = 16
_SIZE_LIMIT = 1 << 29


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
    if elf.build_id is None:
        return None
    try:
        with _opened(folder) as folder_descriptor:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(_name(elf.build_id), flags, dir_fd=folder_descriptor)
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) or not _is_ours(status) or status.st_size > _SIZE_LIMIT:
                    return None
                data = file.read(status.st_size + 1)
    except OSError:
        return None
    return _unpack(elf, data)


def store(elf: ElfFile, blocks: BlockMap, folder: Path) -> bool:
    """Keep blocks for later, atomically; whether that worked."""
    if elf.build_id is None:
        return False
    name = _name(elf.build_id)
    temporary = f".{name}.{os.getpid()}.{os.urandom(4).hex()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _opened(folder) as folder_descriptor:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o600, dir_fd=folder_descriptor)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(_pack(elf, blocks))
                os.rename(temporary, name, src_dir_fd=folder_descriptor, dst_dir_fd=folder_descriptor)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=folder_descriptor)
                raise
    except OSError:
        return False
    return True


def _name(build_id: str) -> str:
    return f"{build_id}.blocks"


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """Open the folder, so that nobody can exchange it after the check that it is ours; OSError if not."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not _is_ours(os.fstat(descriptor)):
            raise PermissionError(f"{folder} belongs to, or can be written by, others")
        yield descriptor
    finally:
        os.close(descriptor)


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _digest(elf: ElfFile) -> bytes:
    """Return the SHA-256 of what the blocks were computed from: 2 ms for redis."""
    import hashlib

    digest = hashlib.sha256(struct.pack("<QQ", elf.link_base, elf.entry & 0xFFFF_FFFF_FFFF_FFFF))
    for segment in elf.segments:
        digest.update(struct.pack("<QQ?", segment.offset, segment.file_size, segment.executable))
        digest.update(elf.view(segment.offset, segment.file_size))
    for section in elf.sections:  # which parts are stubs, where .eh_frame is, and what is exported
        digest.update(repr(section).encode())
        if section.name == ".dynsym":
            digest.update(elf.contents(section))
    return digest.digest()


def _pack(elf: ElfFile, blocks: BlockMap) -> bytes:
    body = blocks.boundary_bits + blocks.block_starts.tobytes() + blocks.block_sizes.tobytes()
    header = _HEADER.pack(
        _MAGIC, VERSION, 0, _digest(elf), blocks.base, len(blocks.boundary_bits), len(blocks.block_starts)
    )
    checksum = zlib.crc32(body, zlib.crc32(header[_CHECKED_FROM:]))
    return header[: _CHECKED_FROM - 4] + struct.pack("<I", checksum) + header[_CHECKED_FROM:] + body


def _unpack(elf: ElfFile, data: bytes) -> BlockMap | None:
    if len(data) < _HEADER.size:
        return None
    magic, version, checksum, digest, base, bitmap_size, count = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != VERSION or len(data) != _HEADER.size + bitmap_size + 12 * count:
        return None
    if zlib.crc32(memoryview(data)[_CHECKED_FROM:]) != checksum or digest != _digest(elf):
        return None
    starts_at = _HEADER.size + bitmap_size
    starts, sizes = array("Q"), array("I")
    starts.frombytes(data[starts_at : starts_at + 8 * count])
    sizes.frombytes(data[starts_at + 8 * count :])
    return BlockMap(elf, base, data[_HEADER.size : starts_at], starts, sizes)
