"""Function ranges, compared with readelf's reading of .eh_frame."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from dynacut.shared.binary.blocks import BlockMap
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.functions import PLT_SECTIONS, FunctionRange, function_at, function_ranges, landing_pads
from dynacut.shared.binary.symbols import SymbolTable, symbols
from dynacut.shared.errors import DynacutError

needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")


def run(*command: object) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def readelf_ranges(elf: ElfFile, path: Path) -> set[tuple[int, int]]:
    """What readelf says, without stubs and signal frames."""
    text = run("readelf", "--debug-dump=frames,no-follow-links", "-W", path)
    stubs = [(s.address, s.address + s.size) for s in elf.sections if s.name in PLT_SECTIONS]
    found = set()
    signal_cies = set(re.findall(r"^(\w+) \w+ \w+ CIE\n.*\n +Augmentation: +\"[^\"]*S[^\"]*\"", text, re.M))
    for cie, low, high in re.findall(r"FDE cie=(\w+) pc=(\w+)\.\.(\w+)", text):
        start, end = int(low, 16), int(high, 16)
        if cie not in signal_cies and not any(first <= start < last for first, last in stubs):
            found.add((start - elf.link_base, end - elf.link_base))
    return found


@pytest.mark.parametrize(
    "path",
    [
        "/usr/bin/redis-server",
        "/usr/sbin/nginx",
        "/usr/sbin/lighttpd",
        "/usr/lib/lighttpd/mod_webdav.so",
        "/lib/x86_64-linux-gnu/libc.so.6",
    ],
)
def test_same_as_readelf(path: str) -> None:
    if not Path(path).exists() or not shutil.which("readelf"):
        pytest.skip(f"{path} or readelf is not installed")
    elf = ElfFile.open(Path(path))
    ranges = function_ranges(elf)
    ours = {(function.start, function.end) for function in ranges}
    theirs = readelf_ranges(elf, Path(path))
    assert theirs - ours == set()
    assert len(ours - theirs) == (1 if "libc.so" in path else 0)  # the trampoline of signal handlers
    assert list(ranges) == sorted(ranges)
    assert all(one.end <= other.start for one, other in pairwise(ranges))


def test_signal_frame_starts_after_its_fde() -> None:
    path = Path("/lib/x86_64-linux-gnu/libc.so.6")
    if not path.exists():
        pytest.skip(f"{path} is not installed")
    elf = ElfFile.open(path)
    trampoline = b"\x48\xc7\xc0\x0f\0\0\0\x0f\x05"
    starts = [f.start for f in function_ranges(elf) if elf.read(f.start, 9)[:9] == trampoline]
    assert len(starts) == 1


ASSEMBLY = """
    .text
    .globl exact_frame, early_frame, other_frame
    .type exact_frame, @function
exact_frame:
    .cfi_startproc
    .cfi_signal_frame
    mov $15, %eax
    syscall
    .cfi_endproc
    nop
    .cfi_startproc
    .cfi_signal_frame
    nop
early_frame:
    mov $15, %rax
    syscall
    .cfi_endproc
other_frame:
    .cfi_startproc
    .cfi_signal_frame
    ret
    .cfi_endproc
"""


@needs_gcc
def test_signal_frames_start_where_the_trampoline_does(tmp_path: Path) -> None:
    (tmp_path / "frames.s").write_text(ASSEMBLY)
    run("gcc", "-shared", "-nostdlib", tmp_path / "frames.s", "-o", tmp_path / "frames.so")
    elf = ElfFile.open(tmp_path / "frames.so")
    offsets = {symbol.name: symbol.offset for symbol in symbols(elf, ".symtab")}
    assert [f.start for f in function_ranges(elf)] == [offsets["exact_frame"], offsets["early_frame"]]


@needs_gcc
def test_overlapping_ranges_are_cut_at_the_next_start() -> None:
    # Built in memory: linkers refuse or drop FDEs like these.
    code_at, frame_at = 0x1000, 0x2000
    cie = struct.pack("<II", 16, 0) + b"\x01zR\0\x01\x78\x10\x01\x1b\0\0\0"
    frame = bytearray(cie)

    def fde(start: int, size: int, *, extended: bool = False) -> None:
        body = struct.pack("<I", len(frame) + (12 if extended else 4))
        place = frame_at + len(frame) + (16 if extended else 8)
        body += struct.pack("<iIB3x", start - place, size, 0)
        frame.extend(struct.pack("<IQ", 0xFFFFFFFF, len(body)) if extended else struct.pack("<I", len(body)))
        frame.extend(body)

    fde(code_at, 32)
    fde(code_at + 8, 8, extended=True)
    fde(code_at + 8, 4)
    fde(code_at + 64, 0)
    fde(code_at + 4090, 32)  # beyond the segment
    fde(0x2000, 4)  # not executable
    frame += bytes(4)
    fde(code_at + 100, 5)  # after a zero, as readelf goes on too
    elf = build(bytes(frame), code_at, frame_at)
    assert function_ranges(elf) == (
        FunctionRange(0x1000, 0x1008),
        FunctionRange(0x1008, 0x1010),
        FunctionRange(0x1064, 0x1069),
    )


def build(frame: bytes, code_at: int, frame_at: int) -> ElfFile:
    """An ELF file in memory: a page of code and an .eh_frame."""
    names = b"\0.eh_frame\0.shstrtab\0"
    file_size = 0x3000
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 64, 0x2800, 0, 64, 56, 3, 64, 3, 2)
    load = struct.pack("<IIQQQQQQ", 1, 4, 0, 0, 0, 0x200, 0x200, 4096)
    load += struct.pack("<IIQQQQQQ", 1, 5, code_at, code_at, code_at, 4096, 4096, 4096)
    load += struct.pack("<IIQQQQQQ", 1, 4, frame_at, frame_at, frame_at, len(frame), len(frame), 4096)
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 1, 1, 2, frame_at, frame_at, len(frame), 0, 0, 8, 0)
    sections += struct.pack("<IIQQQQIIQQ", 11, 3, 0, 0, 0x2700, len(names), 0, 0, 1, 0)
    data = bytearray(file_size)
    for offset, part in ((0, header + load), (frame_at, frame), (0x2700, names), (0x2800, sections)):
        data[offset : offset + len(part)] = part
    return ElfFile(Path("built"), memoryview(bytes(data)))


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (struct.pack("<I", 100), "longer than the section"),
        (struct.pack("<IQ", 0xFFFFFFFF, 1 << 63), "longer than the section"),
        (struct.pack("<II", 4, 400), "before the section"),
        (struct.pack("<II4x", 8, 4) + bytes(8), "no CIE|CIE|unpack|range"),
        (
            struct.pack("<II", 16, 0) + b"\x01eh\0" + bytes(8) + struct.pack("<IIII", 12, 24, 0, 0),
            "not supported",
        ),
        (
            struct.pack("<II", 16, 0) + b"\x07zR\0" + bytes(8) + struct.pack("<IIII", 12, 24, 0, 0),
            "not supported",
        ),
        (
            struct.pack("<II", 16, 0) + b"\x01zR\0\x01\x78\x10\x01\x50\0\0\0" + struct.pack("<IIII", 12, 24, 0, 0),
            "not supported",
        ),
        (
            struct.pack("<II", 16, 0) + b"\x01zR\0\x01\x78\x10\x01\x1b\0\0\0" + struct.pack("<II", 4, 24),
            "requires a buffer|shorter",
        ),
    ],
)
def test_malformed_frames_are_refused(frame: bytes, reason: str) -> None:
    with pytest.raises(DynacutError, match=reason):
        function_ranges(build(frame, 0x1000, 0x2000))


def test_functions_too_far_apart_are_refused() -> None:
    cie = struct.pack("<II", 16, 0) + b"\x01zR\0\x01\x78\x10\x01\x1b\0\0\0"
    frame = bytearray(cie)
    for start in (0x1000, 0x40000000):
        frame += struct.pack("<IIiII", 16, len(frame) + 4, start - 0x2000 - len(frame) - 8, 16, 0)
    data = bytearray(build(bytes(frame), 0x1000, 0x2000).data)
    # The first segment becomes one of code, a gigabyte further on.
    struct.pack_into("<IIQQQQ", data, 64, 1, 5, 0, 0x40000000, 0x40000000, 0x200)
    elf = ElfFile(Path("far"), memoryview(bytes(data)))
    with pytest.raises(DynacutError, match="too large"):
        BlockMap.of(elf)


def test_function_at() -> None:
    ranges = (FunctionRange(16, 20), FunctionRange(20, 24), FunctionRange(32, 40))
    expected = {15: None, 16: 0, 19: 0, 20: 1, 24: None, 31: None, 32: 2, 39: 2, 40: None}
    for offset, index in expected.items():
        assert function_at(ranges, offset) == (None if index is None else ranges[index])
    assert function_at((), 5) is None


@needs_gcc
@pytest.mark.parametrize("options", [(), ("-no-pie",), ("-O2", "-static-pie"), ("-mcmodel=large",)])
def test_ranges_are_the_functions_of_the_symbol_table(tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "p.c").write_text("int f(int x) { return x + 1; }\nint main(void) { return f(2); }\n")
    run("gcc", *options, tmp_path / "p.c", "-o", tmp_path / "p")
    elf = ElfFile.open(tmp_path / "p")
    ranges = function_ranges(elf)
    table = SymbolTable.of(elf, elf.path)
    for name in ("main", "f"):
        (symbol,) = table.lookup(name)
        assert FunctionRange(symbol.offset, symbol.offset + symbol.size) in ranges


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
@pytest.mark.parametrize("options", [(), ("-O2",), ("-no-pie",)])
def test_landing_pads_are_in_functions(tmp_path: Path, options: tuple[str, ...]) -> None:
    code = "int g(int); int f(int x) { try { return g(x); } catch (int y) { return y; } catch (...) {} }"
    code += "\nint g(int x) { if (x) throw x; return 1; }\nint main() { return f(1); }\n"
    (tmp_path / "p.cc").write_text(code)
    run("g++", *options, tmp_path / "p.cc", "-o", tmp_path / "p")
    elf = ElfFile.open(tmp_path / "p")
    pads = landing_pads(elf)
    assert pads
    assert all(function_at(function_ranges(elf), pad) is not None for pad in pads)
