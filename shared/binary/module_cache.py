"""What was found out about a module's code, kept between runs: a file for each module and kind of finding.

A file is named by the build-id, but is only believed if it was made from the same bytes: anyone can give a
program a build-id that is another's, and a wrong boundary would put an int3 amid an instruction.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dynacut.shared.binary.elf import ElfFile

# Magic, version, CRC-32 of all after it, digest of the module.
_HEADER = struct.Struct("<8sII32s")
_CHECKED_FROM = 16
_SIZE_LIMIT = 1 << 29


@dataclass(frozen=True)
class Kind:
    """A kind of finding. magic: eight bytes. version: to be raised whenever the same module would now give another."""

    suffix: str
    magic: bytes
    version: int


def load(elf: ElfFile, kind: Kind, folder: Path) -> bytes | None:
    """Return what was stored; None if there is nothing, or it is damaged, outdated or another module's."""
    if elf.build_id is None:
        return None
    try:
        with _opened(folder) as folder_descriptor:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(_name(elf.build_id, kind), flags, dir_fd=folder_descriptor)
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) or not _is_ours(status) or status.st_size > _SIZE_LIMIT:
                    return None
                data = file.read(status.st_size + 1)
    except OSError:
        return None
    if len(data) < _HEADER.size:
        return None
    magic, version, checksum, digest = _HEADER.unpack_from(data)
    if magic != kind.magic or version != kind.version or zlib.crc32(memoryview(data)[_CHECKED_FROM:]) != checksum:
        return None
    return data[_HEADER.size :] if digest == elf.code_digest else None


def store(elf: ElfFile, kind: Kind, body: bytes, folder: Path) -> bool:
    """Keep a finding for later, atomically; whether that worked. Files without a build-id are not cached."""
    if elf.build_id is None:
        return False
    name = _name(elf.build_id, kind)
    temporary = f".{name}.{os.getpid()}.{os.urandom(4).hex()}"
    checksum = zlib.crc32(body, zlib.crc32(elf.code_digest))
    header = _HEADER.pack(kind.magic, kind.version, checksum, elf.code_digest)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _opened(folder) as folder_descriptor:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o600, dir_fd=folder_descriptor)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(header + body)
                os.rename(temporary, name, src_dir_fd=folder_descriptor, dst_dir_fd=folder_descriptor)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=folder_descriptor)
                raise
    except OSError:
        return False
    return True


def _name(build_id: str, kind: Kind) -> str:
    return f"{build_id}.{kind.suffix}"


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
