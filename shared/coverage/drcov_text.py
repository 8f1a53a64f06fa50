"""The text in a drcov log: its header, its module table, and its blocks where they were dumped as text.

The format grew in DynamoRIO's drcovlib and has no specification; ext/drcovlib/{drcovlib,modules}.c there are what
others follow. Any byte may be hostile: lines and numbers are bounded, and nothing is allocated by a count alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynacut.shared.errors import DynacutError

ROW_LIMIT = 1 << 16
"""The most modules a table can have: blocks name them by 16 bits."""

BEGINNINGS = (b"DRCOV VERSION:", b"Module Table:")
"""What a log begins with; with the table the timestamped logs of DynaCut's own DynamoRIO client."""

_LINE_LIMIT = 1 << 16
_OTHER_LINES_LIMIT = 16
_BLANK_LINES = re.compile(rb"(?:\r?\n)*+")
_VERSION = re.compile(rb"DRCOV VERSION:[ \t]*(\d{1,9})[ \t]*")
_FLAVOR = re.compile(rb"DRCOV FLAVOR:[ \t]*(.*?)[ \t]*")
_OTHER = re.compile(rb"[A-Za-z][A-Za-z ]{0,63}:.*")
_TABLE = re.compile(rb"Module Table:[ \t]*(?:version[ \t]+(\d{1,9}),[ \t]*count[ \t]+)?(\d{1,9})[ \t]*")
_COLUMNS = re.compile(rb"Columns:[ \t]*(.*)")
_COUNTED = re.compile(rb"BB Table:[ \t]*(\d{1,18})[ \t]*bbs?[ \t]*")
_UNCOUNTED = re.compile(rb"BB Table:[ \t]*(module id,.*)", re.IGNORECASE)
_DECIMAL = re.compile(rb"[ \t]*(\d{1,19})[ \t]*")
_HEXADECIMAL = re.compile(rb"[ \t]*(?:0[xX])?([0-9a-fA-F]{1,16})[ \t]*")
_LABEL = re.compile(rb"[A-Za-z_]+:")
_NUMBER = re.compile(rb"\d{1,20}(\.\d{1,20})?")
# `module[  7]: 0x1e2b0,   8`, DynaCut's `[ 7] 0x1e2b0:     8 timestamp_first:  12 …`, and plain `7, 0x1e2b0, 8`.
_BLOCK = re.compile(
    rb"\s*(?:(?:module)?\[[ \t]*(\d{1,9})[ \t]*\]|(\d{1,9})[ \t]*,)[ \t]*:?[ \t]*"
    rb"(?:0[xX])?([0-9a-fA-F]{1,16})[ \t]*[,:][ \t]*(\d{1,9})(?!\d)([^\n]*)(?:\n|\Z)"
)


@dataclass(frozen=True)
class ModuleRow:
    """A row of the module table: a module, or one segment of it. Addresses are absolute, end is exclusive.

    containing_id is the id of the module's first row. end and entry are 0 where the log does not have them; logs
    of DynamoRIO before 7.0 have only sizes, which are shown as a module at address 0.
    """

    id: int
    containing_id: int
    start: int
    end: int
    entry: int
    path: str


@dataclass(frozen=True)
class Header:
    """All before the blocks. count is None where the log does not say how many follow.

    columns: of a table dumped as text, the names of its columns; None for a binary table.
    """

    version: int
    flavor: str
    table_version: int
    rows: tuple[ModuleRow, ...]
    count: int | None
    columns: tuple[str, ...] | None


class LogReader:
    """A log's bytes, and how far they have been read."""

    def __init__(self, path: Path, data: bytes) -> None:
        """path is only what messages name."""
        self.path = path
        self.data = data
        self.position = 0
        self.is_binary = False
        """Whether a binary table was read: then lines are no longer counted."""
        self._line_start = 0

    @property
    def remaining(self) -> int:
        """The number of bytes not yet read."""
        return len(self.data) - self.position

    def line(self, expected: str) -> bytes:
        """Return the next line that is not blank, without its end; DynacutError if there is none."""
        if blank := _BLANK_LINES.match(self.data, self.position):
            self.position = blank.end()
        if not self.remaining:
            raise self.malformed(f"it ends where {expected} should be")
        end = self.data.find(b"\n", self.position, self.position + _LINE_LIMIT)
        if end < 0 and self.remaining >= _LINE_LIMIT:
            raise self.malformed(f"a line is longer than {_LINE_LIMIT} bytes")
        end = end if end >= 0 else len(self.data)
        self._line_start, self.position = self.position, min(end + 1, len(self.data))
        return self.data[self._line_start : end].removesuffix(b"\r")

    def malformed(self, what: str, *, in_line: bool = False) -> DynacutError:
        """Return the error to raise for a broken log. in_line: it is about the line read last."""
        position = self._line_start if in_line else self.position
        line = self.data.count(b"\n", 0, position) + 1
        where = f"byte {position}" if self.is_binary else f"line {line}"
        return DynacutError(
            f"{self.path} is not a sound drcov log: {what} ({where})",
            "record it again, and let the program end by itself: a log is only complete then",
        )


def shown(text: bytes) -> str:
    """Return the beginning of hostile text for a message."""
    return repr(text[:40].decode("utf-8", "replace"))


def read_header(reader: LogReader) -> Header:
    """Read the next header; DynacutError if it is malformed or of an unknown version."""
    if not reader.data.startswith(BEGINNINGS, reader.position):
        beginning = f"begins with {shown(reader.data)}" if reader.data else "is empty"
        raise DynacutError(
            f"{reader.path} is not a drcov log: it {beginning}",
            "pass a log of dynacut trace, or of DynamoRIO's drcov, Frida or QEMU",
        )
    line = reader.line("its version")
    version, flavor = 2, ""
    if found := _VERSION.fullmatch(line):
        version = int(found[1])
        if version not in (2, 3):
            raise DynacutError(f"{reader.path} is a drcov log of file version {version}", "dynacut reads 2 and 3")
        line = reader.line("the flavor")
        for _ in range(_OTHER_LINES_LIMIT):  # the flavor, and lines of forks, such as `Edge Coverage Hash: …`
            if _TABLE.fullmatch(line) or not _OTHER.fullmatch(line):
                break
            if found := _FLAVOR.fullmatch(line):
                flavor = found[1].decode("utf-8", "replace")
            line = reader.line("the module table")
    table = _TABLE.fullmatch(line)
    if table is None:
        raise reader.malformed(f"{shown(line)} is where the module table should be", in_line=True)
    table_version = int(table[1] or 1)
    if table_version not in range(1, 6):
        raise DynacutError(f"{reader.path} has a module table of version {table_version}", "dynacut reads 1 to 5")
    rows = _module_rows(reader, table_version, int(table[2]))
    return Header(version, flavor, table_version, rows, *_block_table(reader))


def _module_rows(reader: LogReader, table_version: int, count: int) -> tuple[ModuleRow, ...]:
    if count > ROW_LIMIT:
        raise reader.malformed(f"{count} modules, where blocks can name {ROW_LIMIT}", in_line=True)
    columns = _columns(reader) if table_version > 1 else []
    rows: dict[int, ModuleRow] = {}
    for _ in range(count):
        line = reader.line(f"module {len(rows) + 1} of {count}")
        row = _row(line, columns) if columns else _first_version_row(line)
        if row is None:
            raise reader.malformed(f"{shown(line)} is no module of this table", in_line=True)
        if row.id in rows:
            raise reader.malformed(f"two modules have the id {row.id}", in_line=True)
        rows[row.id] = row
    for row in rows.values():
        containing = rows.get(row.containing_id)
        if containing is None:
            raise reader.malformed(f"module {row.id} is part of module {row.containing_id}, which the table lacks")
        if containing.start > row.start:
            raise reader.malformed(f"module {row.id} lies below module {row.containing_id}, which it is part of")
    return tuple(rows.values())


def _columns(reader: LogReader) -> list[str]:
    line = reader.line("the names of the columns")
    found = _COLUMNS.fullmatch(line)
    names = [name.strip().decode("ascii", "replace").lower() for name in found[1].split(b",")] if found else []
    names = ["start" if name == "base" else name for name in names]
    if not {"id", "start", "path"} <= set(names) or names[-1] != "path":
        raise reader.malformed(f"{shown(line)} does not name the columns id, start and, last, path", in_line=True)
    return names


def _row(line: bytes, columns: Sequence[str]) -> ModuleRow | None:
    fields = line.split(b",", len(columns) - 1)  # the path is last, and may have commas itself
    if len(fields) != len(columns):
        return None
    named = dict(zip(columns, fields, strict=True))
    row_id = _DECIMAL.fullmatch(named["id"])
    containing_id = _DECIMAL.fullmatch(named.get("containing_id", named["id"]))
    addresses = [_HEXADECIMAL.fullmatch(named.get(name, b"0")) for name in ("start", "end", "entry")]
    if row_id is None or containing_id is None:
        return None
    start, end, entry = (int(address[1], 16) if address else -1 for address in addresses)
    if min(start, end, entry) < 0:
        return None
    return ModuleRow(int(row_id[1]), int(containing_id[1]), start, end, entry, _path(named["path"]))


def _first_version_row(line: bytes) -> ModuleRow | None:
    """`id, size, path` as DynamoRIO wrote it, or `id, base, end, entry, path` as others do."""
    fields = line.split(b",", 4)
    if len(fields) == 5 and all(_HEXADECIMAL.fullmatch(field) for field in fields[1:4]):
        return _row(line, ("id", "start", "end", "entry", "path"))
    fields = line.split(b",", 2)
    row_id, size = (_DECIMAL.fullmatch(field) for field in (*fields, b"", b"")[:2])
    if len(fields) < 3 or row_id is None or size is None:
        return None
    return ModuleRow(int(row_id[1]), int(row_id[1]), 0, int(size[1]), 0, _path(fields[2]))


def _path(field: bytes) -> str:
    return field.lstrip(b" \t").decode("utf-8", "surrogateescape")


def _block_table(reader: LogReader) -> tuple[int | None, tuple[str, ...] | None]:
    line = reader.line("the block table")
    if found := _UNCOUNTED.fullmatch(line):
        return None, _names(found[1])
    found = _COUNTED.fullmatch(line)
    if found is None:
        raise reader.malformed(f"{shown(line)} is where the block table should be", in_line=True)
    beginning = reader.data[reader.position : reader.position + 40].lstrip().lower()
    if beginning.startswith(b"module id"):
        return int(found[1]), _names(reader.line("the names of the columns"))
    return int(found[1]), () if beginning.startswith(b"module[") else None


def _names(line: bytes) -> tuple[str, ...]:
    return tuple(name.strip().decode("ascii", "replace").lower() for name in line.strip().rstrip(b":").split(b","))


def text_blocks(reader: LogReader, header: Header, limit: int) -> Iterator[tuple[int, int, int]]:
    """Read a table dumped as text: start, size and module id of each block.

    If the blocks have timestamps (a column of that name, or else the first one after the size), they are sorted by
    them; then more than limit blocks are refused. DynacutError if the table is malformed or ends too early.
    """
    names = header.columns or ()
    timestamp_at = next((index for index, name in enumerate(names[3:]) if name.startswith("time")), 0)
    timed: list[tuple[float, int, int, int]] | None = None
    data, match = reader.data, _BLOCK.match
    done = 0
    while done != header.count:
        row = match(data, reader.position)
        if row is None:
            if header.count is None:
                break  # what follows is for the caller to judge
            line = reader.line(f"block {done + 1} of {header.count}")
            raise reader.malformed(f"{shown(line)} is no block", in_line=True)
        module_id, other_id, start, size, rest = row.groups()
        block = int(start, 16), int(size), int(module_id or other_id)
        if not done and rest.strip():
            timed = []
        if timed is not None or rest.strip():
            timestamp = _timestamp(rest, timestamp_at)
            if timestamp is None or timed is None:
                raise reader.malformed(f"a block with {shown(rest)} after its size does not fit the others")
            if len(timed) >= limit:
                raise reader.malformed(f"more than {limit} blocks with timestamps")
            timed.append((timestamp, *block))
        else:
            yield block
        done += 1
        reader.position = row.end()
    if timed is not None:
        timed.sort(key=lambda block: block[0])
        yield from (block[1:] for block in timed)


def _timestamp(rest: bytes, column: int) -> float | None:
    """Return the number that is labelled as a time, or else the one in that column; None if there is none."""
    numbers: list[float] = []
    is_time = False
    for word in rest.replace(b",", b" ").split():
        if number := _NUMBER.fullmatch(word):
            numbers.append(float(word) if number[1] else int(word))
            if is_time:
                return numbers[-1]
        elif not _LABEL.fullmatch(word):
            return None
        is_time = word.lower().startswith(b"time")
    return numbers[column] if column < len(numbers) else None
