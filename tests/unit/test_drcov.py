"""drcov logs: real ones of DynamoRIO, every version and quirk made in code, and broken ones."""

from __future__ import annotations

import os
import re
import struct
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dynacut.shared.coverage import drcov
from dynacut.shared.coverage.coverage import Coverage, CoveredModule
from dynacut.shared.coverage.drcov import read_log, write
from dynacut.shared.errors import DynacutError, ExitStatus

REAL_LOGS = Path(__file__).resolve().parents[3] / "shared" / "data" / "drcov"
LINUX = {
    1: "",
    2: "id, base, end, entry, path",
    3: "id, containing_id, start, end, entry, path",
    4: "id, containing_id, start, end, entry, offset, path",
    5: "id, containing_id, start, end, entry, offset, preferred_base, path",
}
Block = tuple[int, int, int]  # start, size, module id
# Two segments of one program and a library, whose path has a comma and a space.
SEGMENTS = [
    (0, 0, 0x400000, 0x402000, "/opt/a program, new/server"),
    (1, 0, 0x403000, 0x405000, "/opt/a program, new/server"),
    (2, 2, 0x7F0000000000, 0x7F0000008000, "/lib/x86_64-linux-gnu/libc.so.6"),
]
BLOCKS: list[Block] = [(0x1010, 8, 0), (0x20, 4, 1), (0x30, 300, 2), (0x1010, 8, 0), (0x10, 1, 0), (7, 7, 0xFFFF)]


def real(name: str) -> Path:
    if not (REAL_LOGS / name).exists():
        pytest.skip(f"NOT TESTED with a real log: {REAL_LOGS / name} is missing")
    return REAL_LOGS / name


def table(version: int, columns: str, segments: Sequence[tuple[int, int, int, int, str]] = SEGMENTS) -> str:
    rows = []
    for index, containing, start, end, path in segments:
        values = {"id": f"{index:3}", "containing_id": f"{containing:3}", "path": f" {path}"}
        values |= {"start": f"0x{start:016x}", "base": f"0x{start:016x}", "end": f"0x{end:016x}"}
        names = columns.split(", ") if columns else ["id", "size", "path"]
        values["size"] = str(end - start)
        rows.append(", ".join(values.get(name, "0000000000000000") for name in names) + "\n")
    count = f"version {version}, count {len(rows)}" if version > 1 else str(len(rows))
    return f"Module Table: {count}\n" + (f"Columns: {columns}\n" if columns else "") + "".join(rows)


def log(
    modules: str, blocks: Sequence[Block] = BLOCKS, *, version: int = 2, text: bool = False, count: int | None = None
) -> bytes:
    head = f"DRCOV VERSION: {version}\nDRCOV FLAVOR: drcov-64\n{modules}"
    head += f"BB Table: {len(blocks) if count is None else count} bbs\n"
    if text:
        rows = "".join(f"module[{module:3}]: 0x{start:016x}, {size:3}\n" for start, size, module in blocks)
        return f"{head}module id, start, size:\n{rows}".encode()
    return head.encode() + b"".join(struct.pack("<IHH", *block) for block in blocks)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "drcov.log"


def read_bytes(path: Path, data: bytes) -> drcov.DrcovLog:
    path.write_bytes(data)
    return read_log(path)


def blocks_of(log: drcov.DrcovLog, name: str) -> list[tuple[int, int]]:
    return list(log.coverage.module(name).blocks.items())


def refused(path: Path, data: bytes) -> str:
    """Read a log that must be refused, in one line and one of advice, and return the first."""
    path.write_bytes(data)
    with pytest.raises(DynacutError) as error:
        read_log(path)
    assert error.value.status is ExitStatus.REFUSED
    for line in (error.value.problem, error.value.advice):
        assert line and "\n" not in line and len(line) < 300
    assert str(path) in error.value.problem
    return error.value.problem


def test_one_run_in_three_formats_of_dynamorio() -> None:
    logs = [read_log(real(f"bncov-test-10-{name}.cov")) for name in ("v2", "v3", "v3-text")]
    programs = [log.coverage.module("fuzztest") for log in logs]
    assert [(log.version, log.table_version, len(log.rows)) for log in logs] == [(2, 4, 11), (3, 5, 20), (3, 5, 20)]
    assert [module.count for module in programs] == [44, 44, 44]
    assert programs[0].blocks == programs[1].blocks == programs[2].blocks
    assert logs[1].coverage == logs[2].coverage
    assert not any(log.warnings for log in logs)
    v2, v3, _ = (log.coverage for log in logs)  # made on two machines: the paths differ
    assert v2.module("fuzztest").path != v3.module("fuzztest").path
    assert v2.difference(v3).module("fuzztest").count == 0
    libraries = v3.module("libc.so.6"), v3.module("ld-linux-x86-64.so.2")
    assert [min(library.blocks) > 0x1000 for library in libraries] == [True, True]  # in their second segments


@pytest.mark.parametrize(("version", "name"), [(2, "test1.bin"), (3, "test1.bin"), (4, "test2.bin")])
def test_real_logs_of_32_bits(version: int, name: str) -> None:
    log = read_log(real(f"cutter-table-v{version}.log"))
    assert (log.flavor, log.table_version) == ("drcov-32", version)
    first = 0x60 if name == "test1.bin" else 0x6A
    assert blocks_of(log, name) == [(first, 20), (first + 0x14, 7), (first + 0x2A, 12)]


def test_a_real_orphan_is_counted() -> None:
    log = read_log(real("cutter-orphan-module.log"))
    assert log.orphans == 1
    assert log.warnings == ("1 blocks lie in no module of the log and were left out",)
    assert log.coverage.count == 3


@pytest.mark.parametrize("table_version", LINUX)
@pytest.mark.parametrize("windows", [False, True], ids=["linux", "windows"])
@pytest.mark.parametrize("text", [False, True], ids=["binary", "text"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_every_version_of_the_table(path: Path, table_version: int, windows: bool, text: bool, line_end: str) -> None:
    columns = LINUX[table_version]
    if windows:
        columns = columns.replace("path", "checksum, timestamp, path")
    modules = table(table_version, columns)
    data = log(modules, text=text)
    if line_end == "\r\n":
        end = len(data) if text else data.index(b"bbs\n") + 4
        data = data[:end].replace(b"\n", b"\r\n") + data[end:]
    found = read_bytes(path, data)
    assert (found.version, found.flavor, found.table_version) == (2, "drcov-64", table_version)
    assert found.orphans == 1
    in_order = [(0x1010, 8), (0x20, 4), (0x10, 1)]  # without containing ids, row after row
    assert blocks_of(found, "server") == (in_order if table_version > 2 else [(0x1010, 8), (0x10, 1), (0x20, 4)])
    assert blocks_of(found, "libc.so.6") == [(0x30, 300)]
    assert [module.path for module in found.coverage.modules] == [SEGMENTS[0][4], SEGMENTS[2][4]]
    if table_version > 1:
        assert found.rows[1].start == 0x403000 and found.rows[2].end == 0x7F0000008000


@pytest.mark.parametrize("text", [False, True], ids=["binary", "text"])
@pytest.mark.parametrize("table_version", [3, 4, 5])
def test_file_version_3_counts_from_the_segment(path: Path, table_version: int, text: bool) -> None:
    found = read_bytes(path, log(table(table_version, LINUX[table_version]), version=3, text=text))
    assert blocks_of(found, "server") == [(0x1010, 8), (0x3020, 4), (0x10, 1)]
    assert blocks_of(found, "libc.so.6") == [(0x30, 300)]
    assert found.outside == 0


def test_the_first_table_version_as_others_write_it(path: Path) -> None:
    rows = "0, 0x400000, 0x402000, 0x401000, /bin/a, b\n1, 4096, /lib/0x1, 0x2, 0x3, c\n"
    found = read_bytes(path, log(f"Module Table: 2\n{rows}", [(1, 2, 0), (3, 4, 1)]))
    assert [row.path for row in found.rows] == ["/bin/a, b", "/lib/0x1, 0x2, 0x3, c"]
    assert (found.rows[0].start, found.rows[0].end, found.rows[0].entry) == (0x400000, 0x402000, 0x401000)
    assert (found.rows[1].start, found.rows[1].end) == (0, 4096)


def test_frida(path: Path) -> None:
    columns = "id, base, end, entry, checksum, timestamp, path"
    row = "  0, 0x000056000000, 0x000056001000, 0x000000000000, 0x000000, 0x000000, C:\\a b\\boombox.exe\n"
    found = read_bytes(path, log(f"Module Table: version 2, count 1\nColumns: {columns}\n{row}", [(16, 2, 0)]))
    assert blocks_of(found, "boombox.exe") == [(16, 2)]


def test_numbers_without_0x_and_lines_of_forks(path: Path) -> None:
    modules = "Module Table: version 2, count 1\nColumns: id, base, end, entry, path\n0, 7f00, AF00, 0, /bin/a\n"
    data = log("Edge Coverage Hash: 12ab\n" + modules).split(b"BB Table")[0]
    rows = b"module id, start, size:\nmodule[0]: 10, 4\n[ 0] 0x1A, 5\n0, 20, 06\n"
    found = read_bytes(path, data + b"BB Table: 3 bbs\n" + rows)
    assert blocks_of(found, "a") == [(0x10, 4), (0x1A, 5), (0x20, 6)]
    assert (found.rows[0].start, found.rows[0].end) == (0x7F00, 0xAF00)


def test_absolute_addresses_of_qemu(path: Path) -> None:
    row = "0, 0x555555555000, 0x555555557000, 0x555555555100, /bin/a\n"
    blocks = [(0x55555100, 4, 0), (0xF7DD0000, 9, 0), (0x55555010, 5, 0)]
    modules = f"Module Table: version 2, count 1\nColumns: {LINUX[2]}\n{row}"
    found = read_bytes(path, log(modules, blocks))
    assert blocks_of(found, "a") == [(0x100, 4), (0x10, 5)]
    assert found.orphans == 1 and found.absolute == ("/bin/a",) and len(found.warnings) == 2
    relative = read_bytes(path, log(modules, [(0x100, 4, 0), (0x55555010, 5, 0)]))
    assert relative.absolute == () and relative.outside == 1
    assert relative.warnings == ("1 blocks end beyond their module",)


def test_logs_of_dynacuts_own_client(path: Path) -> None:
    """No header, an empty line, no count, and two timestamps, of which the first says when a block first ran."""
    rows = [(7, 0x1000, 12, 300, 0), (2, 0x2000, 70000, 200, 999), (2, 0x30, 3, 100, 500), (0xFFFF, 1, 1, 1, 1)]
    data = table(4, LINUX[4]).replace("  2,   2", "  7,   7").replace("  1,   0", "  2,   0")
    data += "\nBB Table: Module ID, BB addess, size, execution count, timestamp \n"
    for module, start, size, first, last in rows:
        data += f"[{module:2}] 0x{start:016x}: {size:5} timestamp_first: {first:10} timestamp_last: {last:10}\n"
    found = read_bytes(path, data.encode())
    assert blocks_of(found, "server") == [(0x30, 3), (0x2000, 70000)]
    assert blocks_of(found, "libc.so.6") == [(0x1000, 12)]
    assert (found.version, found.flavor, found.orphans, found.logs) == (2, "", 1, 1)


@pytest.mark.parametrize(
    ("names", "extra"),
    [
        (", timestamp", [", 30", ", 10", ", 20"]),
        (", hits, time", [", 1, 3.5", ", 5, 1.25", ", 4, 2"]),
        ("", [" 3", " 1", " 2"]),
        ("", [" hits: 9 time: 3", " hits: 9 time: 1", " hits: 9 time: 2"]),
    ],
)
def test_timestamps_give_the_order(path: Path, names: str, extra: list[str]) -> None:
    data = log(table(4, LINUX[4]), [], count=3) + f"module id, start, size{names}:\n".encode()
    data += "".join(f"module[  0]: 0x{at:x}, 4{more}\n" for at, more in enumerate(extra)).encode()
    assert [offset for offset, _ in blocks_of(read_bytes(path, data), "server")] == [1, 2, 0]


def test_a_repeated_block_keeps_its_place_and_largest_size(path: Path) -> None:
    found = read_bytes(path, log(table(4, LINUX[4]), [(9, 1, 2), (5, 0, 2), (9, 7, 2), (9, 3, 2)]))
    assert blocks_of(found, "libc.so.6") == [(9, 7), (5, 1)]


@pytest.mark.parametrize("text", [False, True], ids=["binary", "text"])
def test_several_logs_in_one_file(path: Path, text: bool) -> None:
    """An execve that fails makes DynamoRIO append a log of everything again; modules can have moved by then."""
    moved = [(0, 0, 0x7F00_0000, 0x7F00_9000, SEGMENTS[2][4]), (5, 5, 0, 0, "/bin/b")]
    data = log(table(4, LINUX[4]), text=text) + b"\n" + log(table(4, LINUX[4], moved), [(1, 2, 0), (3, 4, 5)])
    found = read_bytes(path, data)
    assert (found.logs, len(found.rows)) == (2, 2)
    assert blocks_of(found, "libc.so.6") == [(0x30, 300), (1, 2)]
    assert blocks_of(found, "b") == [(3, 4)]


def test_modules_without_a_path_stay_apart(path: Path) -> None:
    rows = "0, 0x7fff8000, 0x10007fff8000, 0x0,\n1, 0x1000, 0x2000, 0x0, <unknown>\n2, 0x1, 0x2, 0, <unknown>\n"
    modules = f"Module Table: version 2, count 3\nColumns: {LINUX[2]}\n{rows}"
    found = read_bytes(path, log(modules, [(1, 1, 1), (1, 2, 0)]))
    assert [(module.path, dict(module.blocks)) for module in found.coverage.modules] == [
        ("", {1: 2}),
        ("<unknown>", {1: 1}),
        ("<unknown>", {}),
    ]


def test_no_blocks_at_all(path: Path) -> None:
    for text in (False, True):
        assert read_bytes(path, log(table(4, LINUX[4]), [], text=text)).coverage.count == 0
    assert read_bytes(path, log("Module Table: version 4, count 0\nColumns: id, start, path\n", [])).coverage.count == 0


HEAD = "DRCOV VERSION: 2\nDRCOV FLAVOR: drcov\n"
COLUMNS = f"{HEAD}Module Table: version 4, count 1\nColumns: {LINUX[4]}\n"
SOUND = f"{COLUMNS}0, 0, 0x1000, 0x2000, 0, 0, /bin/a\n"
TEXT = f"{SOUND}BB Table: 2 bbs\nmodule id, start, size:\nmodule[0]: 0x1, 2\n"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("", "is not a drcov log: it is empty"),
        ("\x7fELF", "is not a drcov log"),
        ("DRCOV VERSION: 4\n", "of file version 4"),
        ("DRCOV VERSION: two\n", r"'DRCOV VERSION: two' is where the module table should be \(line 1\)"),
        ("DRCOV VERSION: 2\n", r"it ends where the flavor should be \(line 2\)"),
        (HEAD, r"it ends where the module table should be \(line 3\)"),
        (HEAD + "Hash: 1\n" * 99, r"'Hash: 1' is where the module table should be \(line 18\)"),
        (f"{HEAD}\x01\x02\n", r"is where the module table should be \(line 3\)"),
        (f"{HEAD}Module Table: version 6, count 1\n", "a module table of version 6"),
        (f"{HEAD}Module Table: version 4, count 999999999\n", r"999999999 modules, .* \(line 3\)"),
        (f"{HEAD}Module Table: version 4, count 9\nid, path\n", r"does not name the columns id, .* \(line 4\)"),
        (f"{HEAD}Module Table: version 4, count 9\nColumns: id, path, start\n", "does not name the columns"),
        (f"{HEAD}Module Table: 1\n0, /bin/a\n", r"'0, /bin/a' is no module of this table \(line 4\)"),
        (f"{HEAD}Module Table: 1\n0, -5, /bin/a\n", "is no module"),
        (COLUMNS, r"it ends where module 1 of 1 should be \(line 5\)"),
        (f"{COLUMNS}0, 0, 1, 2, /bin/a\n", "is no module of this table"),
        (f"{COLUMNS}x, 0, 0x1, 0x2, 0, 0, /bin/a\n", "is no module of this table"),
        (f"{COLUMNS}0, 0, -0x1, 0x2, 0, 0, /bin/a\n", "is no module of this table"),
        (f"{COLUMNS}0, 0, 0x1_0, 0x2, 0, 0, /bin/a\n", "is no module of this table"),
        (f"{COLUMNS}0, 0, 0x10000000000000000, 0x2, 0, 0, /bin/a\n", "is no module of this table"),
        (f"{COLUMNS}0, 0, 0x1, 0x2, 0, 0, {'a' * 70000}\n", "a line is longer than 65536 bytes"),
        (f"{COLUMNS}0, 3, 0x1, 0x2, 0, 0, /bin/a\n", "module 0 is part of module 3, which the table lacks"),
        (SOUND.replace("count 1", "count 2") + "0, 0, 0, 0, 0, 0, b\n", r"two modules have the id 0 \(line 6\)"),
        (SOUND.replace("count 1", "count 2") + "1, 0, 0xfff, 0, 0, 0, b\n", "module 1 lies below module 0"),
        (SOUND, r"it ends where the block table should be \(line 6\)"),
        (f"{SOUND}BB Table: many bbs\n", r"'BB Table: many bbs' is where the block table should be \(line 6\)"),
        (f"{SOUND}BB Table: 2 bbs\n12345678", r"2 blocks should follow, which are 16 bytes, but 8 bytes do \(line 7\)"),
        (f"{SOUND}BB Table: 999999999999999999 bbs\n12345678", "blocks should follow"),
        (f"{SOUND}BB Table: 1 bbs\n12345678!", r"1 bytes follow after the last block \(byte 1\d\d\)"),
        (TEXT, r"it ends where block 2 of 2 should be \(line 9\)"),
        (f"{TEXT}module[0]: 0x1\n", r"'module\[0\]: 0x1' is no block \(line 9\)"),
        (f"{TEXT}module[0]: -0x1, 2\n", "is no block"),
        (f"{TEXT}module[0]: 0x1, 99999999999\n", "is no block"),
        (f"{TEXT}module[0]: 0x1, 2, 3\n", r"a block with ', 3' after its size does not fit the others \(line 9\)"),
        (f"{TEXT}module[0]: 0x1, 2\nmodule[0]: 0x2, 2\n", r"18 bytes follow after the last block \(line 10\)"),
        (TEXT.replace(", 2", ", 2, 7") + "module[0]: 0x1, 2\n", "does not fit the others"),
        (TEXT.replace(", 2", ", 2, time: soon"), "does not fit the others"),
        (TEXT.replace("2 bbs", "1 bbs") + "Module Table: 1\n", r"it ends where module 1 of 1 should be \(line 10\)"),
    ],
)
def test_malformed_logs_are_refused(path: Path, data: str, problem: str) -> None:
    assert re.search(problem, refused(path, data.encode()))


def test_files_that_cannot_be_read(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DynacutError, match="cannot be read: No such file"):
        read_log(path)
    with pytest.raises(DynacutError, match=r"cannot be read: Is a directory|is not a regular file"):
        read_log(tmp_path)
    os.mkfifo(path)
    with pytest.raises(DynacutError, match="is not a regular file"):
        read_log(path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(drcov.SIZE_LIMIT + 1)
    with pytest.raises(DynacutError, match="has 268435457 bytes"):
        read_log(path)
    monkeypatch.setattr(drcov, "BLOCK_LIMIT", 2)
    assert "more than 2 different blocks" in refused(path, log(table(4, LINUX[4])))
    assert read_bytes(path, log(table(4, LINUX[4]), [(1, 1, 0), (2, 1, 2)] * 50)).coverage.count == 2
    timed = TEXT.replace("2 bbs", "3 bbs").replace("0x1, 2\n", "0x1, 2 7\n" + "module[0]: 0x1, 2 6\n" * 2)
    assert "more than 2 blocks with timestamps (line 10)" in refused(path, timed.encode())


def test_a_million_blocks_are_read_quickly(path: Path) -> None:
    records = array("Q", (index * 11 % (1 << 24) | 9 << 32 | (index & 1) << 48 for index in range(1_000_000)))
    rows = "0, 0x400000, 0x1500000, 0, /bin/a\n1, 0x7f0000000000, 0x7f0001100000, 0, /lib/b\n"
    header = f"{HEAD}Module Table: version 2, count 2\nColumns: {LINUX[2]}\n{rows}BB Table: 1000000 bbs\n"
    path.write_bytes(header.encode() + records.tobytes())
    before = time.process_time()
    coverage = read_log(path).coverage
    assert time.process_time() - before < 2
    assert coverage.count == 1_000_000


def test_what_is_written(path: Path) -> None:
    coverage = Coverage((CoveredModule.of("/bin/a", {0x30: 5, 0x10: 2}), CoveredModule.of("[vdso]", {})))
    write(path, coverage, {"/bin/a": (0x5000, 0x7000)})
    assert path.read_bytes() == (
        b"DRCOV VERSION: 2\nDRCOV FLAVOR: drcov-64\nModule Table: version 4, count 2\n"
        b"Columns: id, containing_id, start, end, entry, offset, path\n"
        b"  0,   0, 0x0000000000005000, 0x0000000000007000, 0x0000000000000000, 0000000000000000, /bin/a\n"
        b"  1,   1, 0x0000000000000000, 0x0000000000000000, 0x0000000000000000, 0000000000000000, [vdso]\n"
        b"BB Table: 2 bbs\n"
        b"\x30\0\0\0\5\0\0\0\x10\0\0\0\2\0\0\0"
    )


PATHS = st.text(st.characters(exclude_characters="\n\r\0", exclude_categories=["Cs"])).filter(
    lambda path: not path.startswith((" ", "\t"))
)


@settings(deadline=None)  # writes files
@given(
    st.dictionaries(
        PATHS | st.sampled_from(["/bin/a", "/a, b c", "<unknown>"]),
        st.tuples(
            st.dictionaries(st.integers(0, (1 << 32) - (1 << 17)), st.integers(1, 65535)),
            st.integers(0, 1 << 47),
        ),
        max_size=4,
    )
)
@example({"/odd\udcff, \udc80": ({0: 1}, 0x1000)})
def test_what_is_written_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, modules: dict[str, tuple[dict[int, int], int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.log"
    coverage = Coverage(tuple(CoveredModule.of(name, blocks) for name, (blocks, _) in modules.items()))
    write(path, coverage, {name: (base, base) for name, (_, base) in modules.items()})
    found = read_log(path)
    assert found.coverage == coverage
    assert [list(module.blocks) for module in found.coverage.modules] == [list(m.blocks) for m in coverage.modules]
    assert found.warnings == ()
    before = path.read_bytes()
    write(path, found.coverage, {row.path: (row.start, row.end) for row in found.rows})
    assert path.read_bytes() == before


def test_large_blocks_are_split(path: Path) -> None:
    write(path, Coverage((CoveredModule.of("/bin/a", {16: 140_000, 5: 65_535}),)))
    assert list(read_log(path).coverage.module("a").blocks.items()) == [
        (16, 65535),
        (65551, 65535),
        (131086, 8930),
        (5, 65535),
    ]


def test_hostile_paths_stay_in_their_line(path: Path) -> None:
    hostile = "\t/a\nBB Table: 0 bbs\r\nb"
    write(path, Coverage((CoveredModule.of(hostile, {1: 2}),)))
    assert [(module.path, dict(module.blocks)) for module in read_log(path).coverage.modules] == [
        ("\\011/a\\012BB Table: 0 bbs\\015\\012b", {1: 2})
    ]


@pytest.mark.parametrize(
    ("coverage", "problem"),
    [
        (Coverage((CoveredModule.of("/bin/a", {0xFFFFFFFF: 2}),)), "cannot hold offset 0xffffffff of '/bin/a'"),
        (Coverage((CoveredModule.of("/bin/a", {}),) * 65536), "65536 modules are too many"),
    ],
)
def test_what_drcov_cannot_hold(path: Path, coverage: Coverage, problem: str) -> None:
    with pytest.raises(DynacutError, match=problem):
        write(path, coverage)
    assert not path.exists()


def test_writing_replaces_all_or_nothing(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some, more = (Coverage((CoveredModule.of("/bin/a", {1: size}),)) for size in (1, 2))
    write(path, some)
    link = tmp_path / "link"
    link.symlink_to(path)
    write(link, more)
    assert link.is_symlink() and read_log(path).coverage == more

    def fail(*_: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail)
        with pytest.raises(DynacutError, match="cannot be written: No space left on device"):
            write(path, some)
    assert read_log(path).coverage == more
    assert sorted(tmp_path.iterdir()) == [path, link]
    with pytest.raises(DynacutError, match="cannot be written: No such file"):
        write(tmp_path / "missing" / "log", some)
    for other in (tmp_path, Path("/dev/null")):
        with pytest.raises(DynacutError, match="is not a regular file"):
            write(other, some)


BASES = [
    log(table(4, LINUX[4])),
    log(table(5, LINUX[5]), version=3, text=True),
    log(table(2, LINUX[2])),
    TEXT.replace("0x1, 2", "0x1, 2 time: 5").replace("2 bbs", "1 bbs").encode(),
    log(table(3, LINUX[3])) + log(table(1, LINUX[1])),
]


def reads_or_refuses(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        found = read_log(path)
    except DynacutError as error:
        assert error.advice and "\n" not in error.problem + error.advice
    else:
        assert all(size > 0 for module in found.coverage.modules for size in module.blocks.values())


@pytest.mark.slow
@pytest.mark.parametrize("data", BASES)
def test_every_truncation(path: Path, data: bytes) -> None:
    whole = read_bytes(path, data)
    for size in range(len(data)):
        reads_or_refuses(path, data[:size])
    if whole.logs == 1 and b"module[" not in data:
        for size in range(len(data)):
            refused(path, data[:size])


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(BASES), st.data())
def test_mutations(tmp_path_factory: pytest.TempPathFactory, base: bytes, data: st.DataObject) -> None:
    mutated = bytearray(base)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(mutated)))
        removed = data.draw(st.integers(0, 12))
        mutated[start : start + removed] = data.draw(
            st.binary(max_size=8)
            | st.sampled_from([b"\n", b",", b"0x", b"-1", b"9" * 30, b"\xff", b"\r\n", b"DRCOV VERSION: 3\n", b"["])
        )
    reads_or_refuses(tmp_path_factory.getbasetemp() / "mutated.log", bytes(mutated))
