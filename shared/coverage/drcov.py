"""Coverage as drcov logs: what DynamoRIO, Frida, QEMU and their like write, and Lighthouse, bncov and Cutter read.

File version 2 counts a block's start from the module's load base, version 3 from the start of its segment. The
header and tables in text are read in drcov_text; the layout of binary blocks is that of bb_entry_t in DynamoRIO's
ext/drcovlib/drcovlib.h.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from dynacut.shared.coverage.coverage import UNKNOWN_PATH, Coverage, CoveredModule, union_of_all
from dynacut.shared.coverage.drcov_text import BEGINNINGS, Header, LogReader, ModuleRow, read_header, text_blocks
from dynacut.shared.errors import DynacutError
from dynacut.shared.target import PAGE_SIZE
from dynacut.shared.whole_file import write_whole

SIZE_LIMIT = 256 << 20
"""The largest log that is read, in bytes."""
BLOCK_LIMIT = 1 << 23
"""The most different blocks of all modules; as Python numbers they are about 1 GB."""

_MODULE_LIMIT = 1 << 18
_CHUNK = 1 << 16
_BLOCK = struct.Struct("<IHH")  # start, size, module id
_LARGEST_START, _LARGEST_SIZE, _NO_MODULE = 0xFFFF_FFFF, 0xFFFF, 0xFFFF
_BLANKS = re.compile(rb"[\s\0]*")
# What a line of the table cannot hold: its end, and blanks before the path, which readers skip.
_UNWRITABLE = re.compile(r"[\n\r\0]|^[ \t]+")


@dataclass(frozen=True)
class DrcovLog:
    """A log's coverage and what else it says.

    rows are those of the last module table: a program that calls execve in vain makes DynamoRIO append a whole log
    for each attempt to the same file. Modules of one path are one module, wherever they were loaded.
    """

    coverage: Coverage
    version: int
    flavor: str
    table_version: int
    rows: tuple[ModuleRow, ...]
    logs: int
    """How many logs the file holds, one after the other."""
    orphans: int
    """Blocks of no module in the table, which were skipped: code generated at run time, or in unnamed memory."""
    outside: int
    """Different blocks that end beyond their module, as far as the log has its size. Kept."""
    absolute: tuple[str, ...]
    """The paths of modules whose blocks had absolute addresses; see warnings."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know, one line each."""
        warnings = []
        if self.orphans:
            warnings.append(f"{self.orphans} blocks lie in no module of the log and were left out")
        if self.outside:
            warnings.append(f"{self.outside} blocks end beyond their module")
        warnings += (
            f"the log has absolute addresses of {path!r}, as QEMU's plugin writes them: they were counted from the"
            " start of its code, which is the load base only if the first segment is executable"
            for path in self.absolute
        )
        return tuple(warnings)


def read_union(paths: Iterable[Path], warn: Callable[[str], None]) -> Coverage:
    """Return what any of the logs has; warn is told their oddities. DynacutError like read_log."""
    coverages = []
    for path in paths:
        log = read_log(path)
        for line in log.warnings:
            warn(f"{path}: {line}")
        coverages.append(log.coverage)
    return union_of_all(coverages)


def read_log(path: Path) -> DrcovLog:
    """Read a drcov log of file version 2 or 3, binary or text; DynacutError if it cannot be, or is malformed.

    Blocks are in the order of the log (DynamoRIO: of first execution), or by their timestamps where it has them. A
    block that is there repeatedly keeps its first place and its largest size; size 0 (unknown) becomes 1. Modules
    without blocks are kept. drcov has no build-ids, so they are None.
    """
    reader = LogReader(path, _contents(path))
    found = _Found()
    while True:
        header = read_header(reader)
        found.add(header, reader)
        if _BLANKS.fullmatch(reader.data, reader.position):
            break
        reader.position = _BLANKS.match(reader.data, reader.position).end()  # type: ignore[union-attr]
        if not reader.data.startswith(BEGINNINGS, reader.position):
            raise reader.malformed(f"{reader.remaining} bytes follow after the last block")
    modules = tuple(CoveredModule.of(path, blocks) for (path, _), blocks in found.modules.items())
    return DrcovLog(
        Coverage(modules),
        header.version,
        header.flavor,
        header.table_version,
        header.rows,
        found.logs,
        found.orphans,
        found.outside,
        tuple(dict.fromkeys(found.absolute)),
    )


@dataclass
class _Found:
    """What the logs in a file hold together."""

    modules: dict[tuple[str, int], dict[int, int]] = field(default_factory=dict)
    """By path, and a number that keeps modules apart which have none."""
    logs: int = 0
    orphans: int = 0
    outside: int = 0
    absolute: list[str] = field(default_factory=list)
    _count: int = 0

    def add(self, header: Header, reader: LogReader) -> None:
        """Read the blocks that follow a header."""
        self.logs += 1
        by_id = {row.id: row for row in header.rows}
        blocks: dict[int, dict[int, int]] = {row.containing_id: {} for row in header.rows}
        segments = {}
        ends = dict.fromkeys(blocks, 0)
        for row in header.rows:
            distance = row.start - by_id[row.containing_id].start
            segments[row.id] = blocks[row.containing_id], distance if header.version > 2 else 0
            ends[row.containing_id] = max(ends[row.containing_id], row.end)
        self._take(_chunks(header, reader), segments, blocks.values(), reader)
        for module_id, taken in blocks.items():
            row = by_id[module_id]
            module_size = ends[module_id] - row.start
            if header.version == 2 and header.table_version == 2 and _are_absolute(taken, row.start, module_size):
                placed = {(start - row.start) & _LARGEST_START: size for start, size in taken.items()}
                taken = {offset: size for offset, size in placed.items() if offset < module_size}
                self.orphans += len(placed) - len(taken)  # of libraries: QEMU's plugin knows one module only
                self.absolute.append(row.path)
            if module_size > 0:
                self.outside += sum(offset + size > module_size for offset, size in taken.items())
            is_named = row.path not in ("", UNKNOWN_PATH)
            module = self.modules.setdefault((row.path, 0 if is_named else len(self.modules) + 1), {})
            self._count -= len(module)
            for offset, size in taken.items():
                if module.get(offset, 0) < size:
                    module[offset] = size
            self._count += len(module)
        if len(self.modules) > _MODULE_LIMIT:
            raise reader.malformed(f"more than {_MODULE_LIMIT} modules")

    def _take(
        self,
        chunks: Iterable[Iterable[tuple[int, int, int]]],
        segments: Mapping[int, tuple[dict[int, int], int]],
        modules: Collection[dict[int, int]],
        reader: LogReader,
    ) -> None:
        """Put blocks into the modules: segments tells by module id which one, and its distance from the base."""
        for chunk in chunks:
            for start, size, module_id in chunk:
                try:
                    taken, distance = segments[module_id]
                except KeyError:
                    self.orphans += 1
                    continue
                offset = start + distance
                if taken.get(offset, 0) < (size or 1):
                    taken[offset] = size or 1
            if self._count + sum(map(len, modules)) > BLOCK_LIMIT:
                raise DynacutError(
                    f"{reader.path} has more than {BLOCK_LIMIT} different blocks", "record fewer modules at a time"
                )


def _are_absolute(blocks: Mapping[int, int], base: int, size: int) -> bool:
    """Whether starts are addresses cut to 32 bits: more of them lie in the module so than counted from its base."""
    if size <= 0 or not blocks or max(blocks) < size:
        return False
    relative = sum(start < size for start in blocks)
    return relative < sum((start - base) & _LARGEST_START < size for start in blocks)


def _chunks(header: Header, reader: LogReader) -> Iterator[Iterable[tuple[int, int, int]]]:
    """Yield start, size and module id of each block of the table that comes next, some thousands at a time."""
    if header.columns is not None or header.count is None:
        blocks = text_blocks(reader, header, BLOCK_LIMIT)
        while chunk := list(islice(blocks, _CHUNK)):
            yield chunk
        return
    end = reader.position + header.count * _BLOCK.size
    if end > len(reader.data):
        raise reader.malformed(
            f"{header.count} blocks should follow, which are {header.count * _BLOCK.size} bytes, but"
            f" {reader.remaining} bytes do"
        )
    table = memoryview(reader.data)[reader.position : end]
    reader.position = end
    reader.is_binary = True
    for position in range(0, len(table), _CHUNK * _BLOCK.size):
        yield _BLOCK.iter_unpack(table[position : position + _CHUNK * _BLOCK.size])


def _contents(path: Path) -> bytes:
    try:
        # O_NONBLOCK: a FIFO or a device in the file's place must not hang us.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DynacutError(f"{path} is not a regular file", "pass the drcov log itself")
            if status.st_size > SIZE_LIMIT:
                raise DynacutError(
                    f"{path} has {status.st_size} bytes; logs of up to {SIZE_LIMIT} are read",
                    "record fewer modules at a time",
                )
            return file.read(SIZE_LIMIT)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise DynacutError(f"{path} cannot be read: {reason}", "check the path and the permissions") from error


def write(path: Path, coverage: Coverage, extents: Mapping[str, tuple[int, int]] | None = None) -> None:
    """Write coverage as a binary drcov log of file version 2 with a module table of version 4; atomically.

    extents: by module path, the load base and the end (exclusive) as addresses, where they are known; others are
    shown at address 0. Build-ids and names are not written. Blocks of more than 65535 bytes are split. Line ends
    in paths are written as octal escapes, as in /proc/PID/maps. DynacutError if the file cannot be written, or
    drcov cannot hold the coverage: 65535 modules, offsets below 4 GiB.
    """
    data = _packed(coverage, extents or {})
    _target(path)
    try:
        write_whole(path, data)
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error


def check_writable(path: Path) -> None:
    """Returns if a log can be written there, as far as can be told beforehand; DynacutError if it cannot."""
    folder = _target(path).parent
    if not folder.is_dir():
        raise _unwritable(path, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unwritable(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def _target(path: Path) -> Path:
    """Where a log is to be written: a link, such as /dev/stdout, must not be replaced itself."""
    try:
        target = Path(os.path.realpath(path))
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(path.stat().st_mode):
                raise DynacutError(f"{path} is not a regular file", "write the log to a file")
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error
    return target


def _unwritable(path: Path, error: OSError | ValueError) -> DynacutError:
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    return DynacutError(f"{path} cannot be written: {reason}", "check the folder, its permissions and space")


def _packed(coverage: Coverage, extents: Mapping[str, tuple[int, int]]) -> bytes:
    if len(coverage.modules) > _NO_MODULE:
        raise DynacutError(f"{len(coverage.modules)} modules are too many for a drcov log", "write fewer modules")
    rows, table = [], bytearray()
    for module_id, module in enumerate(coverage.modules):
        covered_end = 0
        for offset, size in module.blocks.items():
            covered_end = max(covered_end, offset + size)
            if covered_end > _LARGEST_START + 1:
                raise DynacutError(
                    f"drcov cannot hold offset {offset:#x} of {module.path!r}: it ends at 4 GiB",
                    "leave this module out",
                )
            for start in range(offset, offset + size, _LARGEST_SIZE):
                table += _BLOCK.pack(start, min(_LARGEST_SIZE, offset + size - start), module_id)
        base, end = extents.get(module.path, (0, 0))
        end = max(end, base + -(-covered_end // PAGE_SIZE) * PAGE_SIZE)
        path = _UNWRITABLE.sub(lambda found: "".join(f"\\{ord(character):03o}" for character in found[0]), module.path)
        rows.append(f"{module_id:3}, {module_id:3}, 0x{base:016x}, 0x{end:016x}, 0x{0:016x}, {0:016x}, {path}\n")
    header = (
        "DRCOV VERSION: 2\nDRCOV FLAVOR: drcov-64\n"
        f"Module Table: version 4, count {len(rows)}\n"
        "Columns: id, containing_id, start, end, entry, offset, path\n"
        f"{''.join(rows)}BB Table: {len(table) // _BLOCK.size} bbs\n"
    )
    return header.encode("utf-8", "surrogateescape") + table
