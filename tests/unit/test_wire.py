"""Fields of messages counted without decoding them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynacut.offline.images.schema import CoreEntry, MmEntry
from dynacut.offline.images.wire import fields, has_more_fields

NUMBERS = st.integers(0, (1 << 64) - 1)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=20), NUMBERS)
def test_what_protobuf_writes_is_counted(vmas: list[tuple[int, int]], start: int) -> None:
    message = MmEntry(mm_arg_start=start, vmas=[{"start": first, "end": last} for first, last in vmas])
    data = message.SerializeToString()
    found = list(fields(data))
    assert [number for number, _, _ in found] == [8] + [14] * len(vmas)
    kind = type(message.vmas.add())
    parts = [kind.FromString(data[begin:end]) for number, begin, end in found if number == 14]
    assert [(part.start, part.end) for part in parts] == vmas
    assert has_more_fields(data, len(vmas))
    assert not has_more_fields(data, len(vmas) + 1)


def test_those_of_a_message_within_are_counted_as_well() -> None:
    core = CoreEntry(mtype=1, tc={"blk_sigset": 1, "sigactions": [{"flags": 1}] * 5})
    data = core.SerializeToString()
    assert not has_more_fields(data, 2)
    assert has_more_fields(data, 7, within=3)
    assert not has_more_fields(data, 8, within=3)


@pytest.mark.parametrize("data", [b"\x0b", b"\x08", b"\x0a\x05abc", b"\x09abc", b"\x80" * 11, b"\x08" + b"\xff" * 10])
def test_what_is_no_message(data: bytes) -> None:
    with pytest.raises(ValueError):
        list(fields(data))


@given(st.binary(max_size=60))
def test_any_bytes(data: bytes) -> None:
    try:
        count = len(list(fields(data)))
    except ValueError:
        return
    assert has_more_fields(data, count) is False
