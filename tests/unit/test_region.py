"""Regions of dynacut in a target: what is not believed of one that somebody else has made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest

from dynacut.handlers.table import CODE_SIZE, MAGIC, RETIRED_MAGICS
from dynacut.shared.errors import DynacutError
from dynacut.shared.region import MAX_REGIONS, check_room_for_region, find_region
from dynacut.shared.target import PAGE_SIZE, Mapping, Target

_STRIDE = 2 * (CODE_SIZE + PAGE_SIZE)


class Retired:
    """A target with so many regions that are out of force. reads: how often it was read."""

    label = "process 4711"

    def __init__(self, count: int) -> None:
        self.reads = 0
        self.mappings: Sequence[Mapping] = [
            mapping
            for code in range(_STRIDE, (count + 1) * _STRIDE, _STRIDE)
            for mapping in (
                Mapping(code, code + CODE_SIZE, True, False, True, True, 0, "", 0),
                Mapping(code + CODE_SIZE, code + CODE_SIZE + PAGE_SIZE, True, True, False, True, 0, "", 0),
            )
        ]

    def read(self, _: int, size: int) -> bytes:
        self.reads += 1
        return RETIRED_MAGICS[MAGIC].ljust(size, b"\0")


def retired(count: int) -> tuple[Retired, Target]:
    target = Retired(count)
    return target, cast(Target, target)


def test_as_many_regions_as_dynacut_makes_are_looked_at() -> None:
    _, target = retired(MAX_REGIONS)
    assert find_region(target) is None


def test_of_more_regions_no_more_are_read() -> None:
    counted, target = retired(10 * MAX_REGIONS)
    with pytest.raises(DynacutError, match="process 4711 has more than 1,024") as caught:
        find_region(target)
    assert "restart" in caught.value.advice
    assert counted.reads == MAX_REGIONS + 1


def test_one_region_too_many_is_not_mapped() -> None:
    check_room_for_region(retired(MAX_REGIONS - 1)[1])
    with pytest.raises(DynacutError, match="1,024 of dynacut's tables, and needs another") as caught:
        check_room_for_region(retired(MAX_REGIONS)[1])
    assert "--undo" in caught.value.advice
