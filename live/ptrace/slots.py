"""The slots behind the handler in a region, that stubs run in."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from dynacut.handlers.table import FIRST_SLOT, SLOT_COUNT, SLOT_DONE_OFFSET, SLOT_SIZE
from dynacut.shared.errors import DynacutError
from dynacut.shared.region import Region
from dynacut.shared.target import Writable

_RECYCLING_AGE_NS = 100_000_000
_STAMP = struct.Struct("<Q")
MAX_STUB_SIZE = SLOT_SIZE - _STAMP.size


@dataclass(frozen=True)
class Slot:
    """A place for one stub: its address, and the byte it sets as its last act (None: outside of a region)."""

    address: int
    done: int | None


def take_slot(process: Writable, region: Region, none_inside: Callable[[], bool]) -> Slot:
    """The next slot that was never used; else the older half of the used ones is cleared first.

    A slot is used again only when its stub had finished, that was long ago, and since then no thread is in any stub:
    one may have been held up on its way out of it. none_inside: whether that is so; it is asked only if needed.

    Raises:
        DynacutError: every slot is in use.
    """
    stamps_start = region.code + FIRST_SLOT
    area = process.read(stamps_start, SLOT_COUNT * SLOT_SIZE)
    done = process.read(region.table + SLOT_DONE_OFFSET, SLOT_COUNT)
    stamps = [_STAMP.unpack_from(area, (index + 1) * SLOT_SIZE - _STAMP.size)[0] for index in range(SLOT_COUNT)]
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    free = next((index for index, stamp in enumerate(stamps) if stamp == 0), None)
    if free is None:
        by_age = sorted(range(SLOT_COUNT), key=stamps.__getitem__)
        reusable = [
            index for index in by_age[: SLOT_COUNT // 2] if done[index] and now - stamps[index] > _RECYCLING_AGE_NS
        ]
        if not reusable or not none_inside():
            raise DynacutError(f"{process.label} was changed too often in the last instants", "try again in a second")
        for index in reusable:
            process.write(stamps_start + index * SLOT_SIZE, bytes(SLOT_SIZE))
        free = reusable[0]
    slot = Slot(stamps_start + free * SLOT_SIZE, region.table + SLOT_DONE_OFFSET + free)
    assert slot.done is not None
    process.write(slot.done, b"\0")
    # From here on the slot counts as used, whatever happens to this patcher.
    process.write(slot.address + SLOT_SIZE - _STAMP.size, _STAMP.pack(now))
    return slot
