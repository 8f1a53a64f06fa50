"""The fields of a message of protocol buffers, told from its bytes alone, without protobuf.

Their number is known before it is decoded: one of two bytes may take a hundred of memory then.

Source: "Encoding" in the documentation of protocol buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_LONGEST_VARINT = 10


def fields(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int]]:
    """The fields of a message that lies in some bytes: number, and where what it holds begins and ends.

    Raises:
        ValueError: it is no message.
    """
    position, end = start, len(data) if end is None else end
    while position < end:
        tag, position = varint(data, position)
        kind = tag & 7
        begin = position
        if kind == _VARINT:
            _, position = varint(data, position)
        elif kind == _LENGTH:
            size, begin = varint(data, position)
            position = begin + size
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            position += 8 if kind == _EIGHT_BYTES else 4
        else:  # groups, which CRIU does not have
            raise ValueError(f"a field of type {kind}")
        if position > end:
            raise ValueError("it is cut off")
        yield tag >> 3, begin, position


def varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at a position, and the position behind it; ValueError if it does not end."""
    if position < len(data) and data[position] < 0x80:
        return data[position], position + 1  # nearly always
    value = 0
    for index, byte in enumerate(data[position : position + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    raise ValueError("a number does not end")


def has_more_fields(data: bytes, limit: int, within: int | None = None) -> bool:
    """Whether a message has more fields than a limit, those of the messages in its field `within` counted too.

    Raises:
        ValueError: it is no message.
    """
    count = 0
    for number, start, end in fields(data):
        inner = fields(data, start, end) if number == within else ()
        count += 1 + sum(1 for _ in islice(inner, limit))
        if count > limit:
            return True
    return False
