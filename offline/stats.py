"""What CRIU has measured: the files stats-dump and stats-restore.

Source: CRIU's images/stats.proto and criu/include/magic.h. They are one small message of numbers, read
without protobuf, which a checkpoint need not load.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from dynacut.offline.images.wire import fields, varint
from dynacut.shared.target import PAGE_SIZE

_MAGICS = struct.pack("<II", 0x55105940, 0x57093306)
_DUMP, _FROZEN_TIME, _PAGES_WRITTEN, _SHARED_PAGES_WRITTEN = 1, 2, 7, 14
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
        start, end = {number: (start, end) for number, start, end in fields(data, 12, 12 + length)}[_DUMP]
        dump = {number: varint(data, start)[0] for number, start, _ in fields(data, start, end)}
    except (OSError, ValueError, KeyError, struct.error):
        return None
    pages = dump.get(_PAGES_WRITTEN, 0) + dump.get(_SHARED_PAGES_WRITTEN, 0)
    return DumpStats(dump.get(_FROZEN_TIME, 0), pages * PAGE_SIZE)
