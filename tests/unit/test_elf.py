"""The ELF reader, compared with readelf, and fed with broken files."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynacut.shared.binary import elf as elf_module
from dynacut.shared.binary.blocks import BlockMap
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.functions import function_ranges, landing_pads
from dynacut.shared.binary.lines import line_offsets
from dynacut.shared.binary.symbols import SymbolTable, find_debug_file, symbols
from dynacut.shared.errors import DynacutError

INSTALLED = ["/usr/bin/redis-server", "/usr/sbin/nginx", "/usr/lib/lighttpd/mod_webdav.so", "/bin/ls"]
needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")


def run(*command: object) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def installed(path: str) -> ElfFile:
    if not Path(path).exists() or not shutil.which("readelf"):
        pytest.skip(f"{path} or readelf is not installed")
    return ElfFile.open(Path(path))


def compiled(folder: Path, *options: str, code: str = "int main(void) { return 0; }\n") -> Path:
    (folder / "program.c").write_text(code)
    program = folder / "program"
    run("gcc", *options, folder / "program.c", "-o", program)
    return program


@pytest.mark.parametrize("path", INSTALLED)
def test_same_as_readelf(path: str) -> None:
    elf = installed(path)
    build_id = re.search(r"Build ID: ([0-9a-f]+)", run("readelf", "-n", path))
    assert build_id is not None and elf.build_id == build_id[1]
    rows = re.findall(r"\[ *\d+\] (\S+) +\S+ +([0-9a-f]{16}) ([0-9a-f]+) ([0-9a-f]+)", run("readelf", "-SW", path))
    expected = [(name, *(int(number, 16) for number in numbers)) for name, *numbers in rows]
    ours = [(s.name, s.address, s.file_offset, s.size) for s in elf.sections[1:]]
    assert ours == expected
    loads = re.findall(r"LOAD +0x(\w+) 0x(\w+) 0x\w+ 0x(\w+) 0x(\w+) (...) ", run("readelf", "-lW", path))
    segments = [
        (s.file_offset, s.offset + elf.link_base, s.file_size, s.memory_size, s.writable, s.executable)
        for s in elf.segments
    ]
    assert segments == [
        (*(int(number, 16) for number in numbers), "W" in flags, "E" in flags) for *numbers, flags in loads
    ]
    soname = re.search(r"SONAME.*\[(.*)\]", run("readelf", "-d", path))
    assert elf.soname == (soname[1] if soname else None)


def test_read_is_the_mapped_bytes() -> None:
    elf = installed("/usr/bin/redis-server")
    for segment in elf.segments:
        raw = Path("/usr/bin/redis-server").read_bytes()[segment.file_offset :][:64]
        assert elf.read(segment.offset, 64) == raw
        end = segment.file_end
        assert len(elf.read(end - 1, 1)) == 1
        with pytest.raises(DynacutError):
            elf.read(end - 1, 2)
    for offset, size in ((-1, 1), (1 << 60, 1), (elf.segments[0].offset, -1)):
        with pytest.raises(DynacutError):
            elf.read(offset, size)


@needs_gcc
def test_fixed_program_has_offsets_from_its_link_base(tmp_path: Path) -> None:
    elf = ElfFile.open(compiled(tmp_path, "-no-pie"))
    assert elf.is_fixed and elf.link_base == 0x400000
    assert elf.segments[0].offset == 0
    assert elf.read(0, 4) == b"\x7fELF"
    (main,) = symbols(elf, ".symtab", "main")
    address = re.search(r"(\w+) +\d+ FUNC .* main$", run("readelf", "-sW", elf.path), re.M)
    assert address is not None and main.offset == int(address[1], 16) - 0x400000


@needs_gcc
def test_soname_and_no_build_id(tmp_path: Path) -> None:
    elf = ElfFile.open(compiled(tmp_path, "-shared", "-fPIC", "-Wl,-soname,libx.so.3", "-Wl,--build-id=none"))
    assert elf.soname == "libx.so.3"
    assert elf.build_id is None


@needs_gcc
def test_without_section_headers(tmp_path: Path) -> None:
    program = compiled(tmp_path)
    whole = ElfFile.open(program)
    data = bytearray(program.read_bytes())
    data[0x28:0x30] = bytes(8)
    data[0x3A:0x40] = bytes(6)
    stripped = ElfFile(program, memoryview(bytes(data)))
    assert stripped.sections == () and stripped.section(".text") is None
    assert stripped.build_id == whole.build_id
    assert function_ranges(stripped) == function_ranges(whole)


@needs_gcc
def test_large_files_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = compiled(tmp_path, "-g")
    small = ElfFile.open(program)
    monkeypatch.setattr(elf_module, "MMAP_FROM", 1)
    large = ElfFile.open(program)
    assert not isinstance(large.data.obj, bytes)
    assert large.build_id == small.build_id
    assert line_offsets(large, "program.c", 1) == line_offsets(small, "program.c", 1) != ()
    assert BlockMap.of(large).block_starts == BlockMap.of(small).block_starts


def test_what_is_not_a_program_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("#!/bin/sh\n")
    (tmp_path / "short").write_bytes(b"\x7fELF\x02\x01")
    for name in ("fifo", "empty", "text", "short", "missing", "."):
        with pytest.raises(DynacutError) as error:
            ElfFile.open(tmp_path / name)
        assert "\n" not in error.value.problem
    with pytest.raises(DynacutError, match="regular"):
        ElfFile.open(Path("/dev/zero"))


@needs_gcc
def test_other_kinds_of_elf_are_refused(tmp_path: Path) -> None:
    data = bytearray(compiled(tmp_path).read_bytes())

    def refused(position: int, value: bytes) -> str:
        broken = bytes(data[:position] + value + data[position + len(value) :])
        with pytest.raises(DynacutError) as error:
            ElfFile(Path("x"), memoryview(broken))
        return error.value.problem

    assert "x86-64" in refused(4, b"\x01")
    assert "x86-64" in refused(5, b"\x02")
    assert "x86-64" in refused(18, struct.pack("<H", 183))
    assert "ELF type 1" in refused(16, struct.pack("<H", 1))
    assert "ELF type 4" in refused(16, struct.pack("<H", 4))
    assert "beyond its end" in refused(0x20, struct.pack("<Q", 1 << 62))
    assert "beyond its end" in refused(0x28, struct.pack("<Q", 1 << 40))
    assert "program headers of 1 bytes" in refused(0x36, struct.pack("<H", 1))
    assert "nothing to load" in refused(0x38, struct.pack("<H", 0))
    assert "section names" in refused(0x3E, struct.pack("<H", 4000))


@needs_gcc
def test_notes_that_lie_are_refused(tmp_path: Path) -> None:
    program = compiled(tmp_path)
    data = bytearray(program.read_bytes())
    note = ElfFile.open(program).section(".note.gnu.build-id")
    assert note is not None
    for position, value in ((0, 0xFFFFFFF0), (4, 0xFFFFFFF0), (4, 0)):
        broken = data.copy()
        struct.pack_into("<I", broken, note.file_offset + position, value)
        with pytest.raises(DynacutError):
            ElfFile(program, memoryview(bytes(broken)))


@pytest.fixture(scope="module")
def small_elf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    code = "int f(int x) { switch (x) { case 0: return 7; case 1: return 3; case 2: return 9; case 3: return 1;"
    code += "case 4: return 8; case 5: return 2; } return 0; }\nint main(int c, char **v) { return f(c); }\n"
    return compiled(tmp_path_factory.mktemp("small"), "-g1", "-O1", code=code).read_bytes()


def use_everything(data: bytes) -> None:
    """Use each reader; only a DynacutError may come out."""
    for debug_file in (False, True):
        try:
            elf = ElfFile(Path("/nonexistent/mutant"), memoryview(data), debug_file=debug_file)
        except DynacutError:
            continue
        for use in READERS:
            try:
                use(elf)
            except DynacutError as error:
                assert "\n" not in error.problem


READERS: list[Callable[[ElfFile], object]] = [
    lambda elf: elf.soname,
    lambda elf: [elf.contents(section) for section in elf.sections],
    lambda elf: sum(symbol.size for symbol in symbols(elf)),
    lambda elf: SymbolTable.of(elf, elf.path).at(elf.entry),
    lambda elf: find_debug_file(elf, elf.path),
    function_ranges,
    landing_pads,
    BlockMap.of,
    lambda elf: line_offsets(elf, "program.c", 2),
]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_mutants_give_nothing_but_dynacut_errors(small_elf: bytes, data: st.DataObject) -> None:
    broken = bytearray(small_elf)
    elf = ElfFile(Path("x"), memoryview(small_elf))
    # Most of a small program is padding: aim at what is parsed.
    places = [(0, 64), (64, 64 + 13 * 56), (len(broken) - 64 * len(elf.sections), len(broken))]
    places += [(s.file_offset, s.file_offset + s.size) for s in elf.sections if s.kind != 8 and s.size]
    for _ in range(data.draw(st.integers(1, 4))):
        low, high = data.draw(st.sampled_from(places))
        position = data.draw(st.integers(low, min(high, len(broken)) - 1))
        width = data.draw(st.sampled_from((1, 2, 4, 8)))
        value = data.draw(st.integers(0, 256**width - 1) | st.sampled_from((0, 256**width - 1)))
        broken[position : position + width] = value.to_bytes(width, "little")
    use_everything(bytes(broken[: len(small_elf)]))


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1))
def test_truncations_give_nothing_but_dynacut_errors(small_elf: bytes, share: float) -> None:
    size = int(len(small_elf) * share)
    use_everything(small_elf[:size])
    if size < len(small_elf):
        with pytest.raises(DynacutError):
            ElfFile(Path("x"), memoryview(small_elf[:size]))


def test_reading_elf_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pathlib import Path; from dynacut.shared.binary.elf import ElfFile;"
        "from dynacut.shared.binary.symbols import SymbolTable;"
        "from dynacut.shared.binary.functions import function_ranges;"
        "from dynacut.shared.binary import lines, block_cache;"
        "elf = ElfFile.open(Path('/bin/ls')); SymbolTable.of(elf, elf.path).lookup('x');"
        "function_ranges(elf);"
        "assert not {'capstone', 'elftools', 'lzma', 'difflib', 'hashlib'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
