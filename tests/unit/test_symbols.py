"""Symbols from every place they can be in, compared with readelf."""

from __future__ import annotations

import lzma
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from dynacut.shared.binary import symbols as symbols_module
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.symbols import SymbolTable, find_debug_file, mini_debug, symbols
from dynacut.shared.errors import DynacutError

needs_tools = pytest.mark.skipif(
    not (shutil.which("gcc") and shutil.which("objcopy")), reason="gcc or objcopy is not installed"
)


def run(*command: object) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def debug_path(elf: ElfFile, path: Path, root: Path = Path("/")) -> Path | None:
    found = find_debug_file(elf, path, root)
    return None if found is None else found.path


def readelf_symbols(path: Path, table: str) -> set[tuple[str, int, int]]:
    """Name, value and size of what readelf shows as defined functions, objects and labels."""
    text = run("readelf", "-sW", path).partition(f"Symbol table '{table}'")[2].partition("Symbol table '")[0]
    rows = re.findall(r"^ +\d+: (\w+) +(\w+) (FUNC|IFUNC|OBJECT|NOTYPE) +\w+ +\w+ +(\d+) (\S+)", text, re.M)
    return {(name.partition("@")[0], int(value, 16), int(size, 0)) for value, size, _, _, name in rows}


@pytest.mark.parametrize("path", ["/usr/bin/redis-server", "/usr/sbin/nginx", "/lib/x86_64-linux-gnu/libc.so.6"])
def test_dynsym_as_readelf(path: str) -> None:
    if not Path(path).exists() or not shutil.which("readelf"):
        pytest.skip(f"{path} or readelf is not installed")
    elf = ElfFile.open(Path(path))
    ours = {(s.name, s.offset + elf.link_base, s.size) for s in symbols(elf, ".dynsym")}
    assert ours == readelf_symbols(Path(path), ".dynsym")
    assert len(ours) > 100


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Two files with a static function of the same name."""
    (tmp_path / "one.c").write_text(
        "static int twin(int x) { return x + 1; }\n"
        "int shared_name(int x) { return twin(x); }\nint table[4] = {1};\n"
        "static int resolved(void) { return 5; }\nstatic void *resolve(void) { return resolved; }\n"
        'int picked(void) __attribute__((ifunc("resolve")));\n__thread int mine = 3;\n'
    )
    (tmp_path / "two.c").write_text(
        "static int twin(int x) { return x * 3; }\nint shared_name(int);\nint picked(void);\n"
        "int other(int x) { return twin(x); }\n"
        'int main(int c, char **v) { return other(shared_name(c)) + picked(); }\n__asm__(".globl absolute\\n"'
        '".set absolute, 0x1234");\n'
    )
    target = tmp_path / "bin" / "program"
    target.parent.mkdir()
    run("gcc", "-g", "-rdynamic", tmp_path / "one.c", tmp_path / "two.c", "-o", target)
    return target


@needs_tools
def test_lookup(program: Path) -> None:
    elf = ElfFile.open(program)
    table = SymbolTable.of(elf, program)
    by_name = {name: value for name, value, _ in readelf_symbols(program, ".symtab")}
    twins = table.lookup("twin")
    assert len(twins) == 2 and twins[0].offset < twins[1].offset
    assert all(twin.is_local and twin.kind == "function" and twin.table == ".symtab" for twin in twins)
    (shared,) = table.lookup("shared_name")  # in .symtab and .dynsym
    assert shared.offset == by_name["shared_name"] and not shared.is_local
    assert table.lookup("picked")[0].kind == "function"
    assert table.lookup("table")[0].kind == "object"
    for name in ("absolute", "mine", "printf", "", "one.c", "win", "twi"):
        assert table.lookup(name) == ()
    assert {s.name for s in symbols(elf, ".symtab")} >= {"main", "twin", "table"}


@needs_tools
def test_near_and_at(program: Path) -> None:
    table = SymbolTable.of(ElfFile.open(program), program)
    assert table.near("shared_nam")[0] == "shared_name"
    assert "shared_name" in table.near("SHARED_name")
    assert table.near("zzzzzzzzzz") == [] and table.near("") == []
    (main,) = table.lookup("main")
    for distance in (0, 1, main.size - 1):
        found = table.at(main.offset + distance)
        assert found is not None and found[0].name == "main" and found[1] == distance
    assert table.at(-1) is None and table.at(1 << 50) is None
    (start,) = table.lookup("_start")
    found = table.at(start.offset + 2)
    assert found is not None and found[0].name == "_start"


def split(program: Path, debug: Path, *, link: bool = True, mini: bool = False) -> Path:
    """Move the debug information into a file of its own, as distributions do."""
    debug.parent.mkdir(parents=True, exist_ok=True)
    run("objcopy", "--only-keep-debug", program, debug)
    stripped = program.with_name("stripped")
    options = ["--strip-all"]
    if link:
        options.append(f"--add-gnu-debuglink={debug}")
    if mini:
        packed = program.with_name("packed.xz")
        packed.write_bytes(lzma.compress(debug.read_bytes(), lzma.FORMAT_XZ))
        options.append(f"--add-section=.gnu_debugdata={packed}")
    run("objcopy", *options, program, stripped)
    return stripped


@needs_tools
@pytest.mark.parametrize("place", ["bin", "bin/.debug", "root/usr/lib/debug/BIN"])
def test_debug_link(program: Path, tmp_path: Path, place: str) -> None:
    root = tmp_path / "root" if place.startswith("root") else Path("/")
    shown = Path("/opt/tool/stripped") if place.startswith("root") else program.with_name("stripped")
    debug = tmp_path / place.replace("BIN", "opt/tool") / "program.debug"
    stripped = split(program, debug)
    elf = ElfFile.open(stripped)
    assert debug_path(elf, shown, root) == debug
    table = SymbolTable.of(elf, shown, root)
    assert len(table.lookup("twin")) == 2 and table.debug is not None
    assert table.lookup("main")[0].offset == SymbolTable.of(ElfFile.open(program), program).lookup("main")[0].offset
    debug.write_bytes(debug.read_bytes()[:1000])  # a broken debug file is as good as none
    assert debug_path(elf, shown, root) is None
    assert SymbolTable.of(elf, shown, root).lookup("twin") == ()
    assert len(SymbolTable.of(elf, shown, root).lookup("main")) == 1  # from .dynsym


@needs_tools
def test_build_id_tree(program: Path, tmp_path: Path) -> None:
    build_id = ElfFile.open(program).build_id
    assert build_id is not None
    debug = tmp_path / "root/usr/lib/debug/.build-id" / build_id[:2] / f"{build_id[2:]}.debug"
    elf = ElfFile.open(split(program, debug, link=False))
    assert debug_path(elf, Path("/x/program"), tmp_path / "root") == debug
    assert debug_path(elf, Path("/x/program"), tmp_path) is None
    other = tmp_path / "other"
    (tmp_path / "other.c").write_text("int main(void) { return 0; }\n")
    run("gcc", tmp_path / "other.c", "-o", other)
    shutil.copy(other, debug)  # the right name, another build-id
    assert debug_path(elf, Path("/x/program"), tmp_path / "root") is None


@needs_tools
def test_links_are_followed_within_the_targets_root_only(program: Path, tmp_path: Path) -> None:
    build_id = ElfFile.open(program).build_id
    assert build_id is not None
    root = tmp_path / "root"
    link = root / "usr/lib/debug/.build-id" / build_id[:2] / f"{build_id[2:]}.debug"
    link.parent.mkdir(parents=True)
    outside = tmp_path / "outside.debug"
    elf = ElfFile.open(split(program, outside, link=False))
    for text in (outside, Path("../" * 20) / outside.relative_to("/")):
        link.unlink(missing_ok=True)
        link.symlink_to(text)
        assert link.resolve() == outside
        assert debug_path(elf, Path("/x/program"), root) is None
    inside = root / outside.relative_to("/")  # where the same link leads in the target
    inside.parent.mkdir(parents=True)
    shutil.copy(outside, inside)
    assert debug_path(elf, Path("/x/program"), root) == link


@needs_tools
def test_a_pipe_in_a_debug_files_place_is_not_opened(program: Path, tmp_path: Path) -> None:
    stripped = split(program, tmp_path / "bin" / "program.debug")
    (tmp_path / "bin" / "program.debug").unlink()
    os.mkfifo(tmp_path / "bin" / "program.debug")
    # Opening a pipe for reading would let an opening for writing through.
    assert debug_path(ElfFile.open(stripped), stripped.with_name("stripped")) is None
    with pytest.raises(OSError, match="No such device or address"):
        os.open(tmp_path / "bin" / "program.debug", os.O_WRONLY | os.O_NONBLOCK)


@needs_tools
def test_debug_link_without_build_id_needs_its_crc(tmp_path: Path) -> None:
    (tmp_path / "p.c").write_text("static int hidden(void) { return 2; }\nint main(void) { return hidden(); }\n")
    run("gcc", "-g", "-Wl,--build-id=none", tmp_path / "p.c", "-o", tmp_path / "p")
    debug = tmp_path / "p.debug"
    elf = ElfFile.open(split(tmp_path / "p", debug))
    assert elf.build_id is None
    assert debug_path(elf, tmp_path / "stripped") == debug
    debug.write_bytes(debug.read_bytes() + b"x")
    assert debug_path(elf, tmp_path / "stripped") is None


@needs_tools
def test_debug_link_cannot_leave_its_folder(program: Path, tmp_path: Path) -> None:
    stripped = split(program, tmp_path / "bin" / "x.debug")
    section = ElfFile.open(stripped).section(".gnu_debuglink")
    assert section is not None
    data = bytearray(stripped.read_bytes())
    for name in (b"../x.dbg\0", b"..\0", b"\0", b"x" * section.size):
        broken = data.copy()
        broken[section.file_offset : section.file_offset + len(name)] = name
        assert debug_path(ElfFile(stripped, memoryview(bytes(broken))), stripped) is None


@needs_tools
def test_mini_debug_information(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elf = ElfFile.open(split(program, tmp_path / "away" / "d", link=False, mini=True))
    twins = SymbolTable.of(elf, elf.path).lookup("twin")
    assert len(twins) == 2 and twins[0].table == ".gnu_debugdata"
    section = elf.section(".gnu_debugdata")
    assert section is not None
    broken = bytearray(elf.data)
    broken[section.file_offset + 20] ^= 0xFF
    with pytest.raises(DynacutError):
        mini_debug(ElfFile(elf.path, memoryview(bytes(broken))))
    monkeypatch.setattr(symbols_module, "MINI_DEBUG_LIMIT", 1 << 13)
    with pytest.raises(DynacutError, match="gnu_debugdata"):
        mini_debug(elf)


@needs_tools
def test_names_outside_their_table_are_refused(program: Path) -> None:
    data = bytearray(program.read_bytes())
    section = ElfFile.open(program).section(".symtab")
    assert section is not None
    for position in range(section.file_offset, section.file_offset + section.size, 24):
        struct.pack_into("<I", data, position, 0xFFFFFF00)
    with pytest.raises(DynacutError, match="names"):
        list(symbols(ElfFile(program, memoryview(bytes(data)))))
