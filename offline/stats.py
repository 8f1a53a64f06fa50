"""What CRIU has measured: the files stats-dump and stats-restore.

Source: CRIU's images/stats.proto and criu/include/magic.h. They are one small message, decoded here by hand, so that
a checkpoint need not load protobuf.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dynacut.shared.target import PAGE_SIZE

_MAGICS = struct.pack("<II", 0x55105940, 0x57093306)
_DUMP, _FROZEN_TIME, _PAGES_WRITTEN, _SHARED_PAGES_WRITTEN = 1, 2, 7, 14
_VARINT, _BYTES = 0, 2
_MAX_SIZE = 1 << 16


@dataclass(frozen=True)
class DumpStats:
    """frozen_us: how long the processes stood still, in microseconds. dumped_bytes: memory written, whole pages."""

    frozen_us: int
    dumped_bytes: int


def read_dump_stats(path: Path) -> DumpStats | None:
    """What a stats-dump file says; None if there is none, or it says something else."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_SIZE)
        if data[:8] != _MAGICS:
            return None
        (length,) = struct.unpack_from("<I", data, 8)
        message = dict(_fields(data[12 : 12 + length])).get(_DUMP)
        if not isinstance(message, bytes):
            return None
        dump = {number: value for number, value in _fields(message) if isinstance(value, int)}
    except (OSError, ValueError, IndexError, struct.error):
        return None
    pages = dump.get(_PAGES_WRITTEN, 0) + dump.get(_SHARED_PAGES_WRITTEN, 0)
    return DumpStats(dump.get(_FROZEN_TIME, 0), pages * PAGE_SIZE)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message that has only integers and messages.

    Raises:
        ValueError: it has others. IndexError: it is cut off.
    """
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        value, position = _varint(data, position)
        if key & 7 == _VARINT:
            yield key >> 3, value
        elif key & 7 == _BYTES:
            yield key >> 3, data[position : position + value]
            position += value
        else:
            raise ValueError(f"wire type {key & 7}")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
