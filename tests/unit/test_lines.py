"""FILE:LINE, with DWARF 4 and 5, compared with objdump's decoded line tables."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from dynacut.shared.binary.blocks import BlockMap
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.functions import function_at, function_ranges
from dynacut.shared.binary.lines import file_with_lines, has_lines, line_offsets, nearest_lines
from dynacut.shared.binary.source_lines import source_lines
from dynacut.shared.binary.symbols import SymbolTable
from dynacut.shared.errors import DynacutError

pytestmark = pytest.mark.skipif(
    not (shutil.which("gcc") and shutil.which("objdump")), reason="gcc or objdump is not installed"
)

SOURCE = """#include "inner.h"
int plain(int x)
{
    int total = 0;
    for (int i = 0; i < x; i++)
        total += i * x;

    return total;
}

static inline __attribute__((always_inline)) int inlined(int x)
{
    return x * 7 + plain(x);
}

int first(int x) { return inlined(x) + 1; }
int second(int x) { return inlined(x) + inlined(x + 1); }
int main(int c, char **v) { return first(c) + second(c) + from_header(c); }
"""
HEADER = "static int from_header(int x)\n{\n    return x ^ 5;\n}\n"


def run(*command: object, cwd: Path | None = None) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, cwd=cwd).stdout


def built(folder: Path, *options: str) -> Path:
    (folder / "src").mkdir()
    (folder / "lib").mkdir()
    (folder / "src" / "code.c").write_text(SOURCE)
    (folder / "src" / "inner.h").write_text(HEADER)
    (folder / "lib" / "code.c").write_text("int elsewhere(void)\n{\n    return 3;\n}\n")
    run("gcc", *options, "src/code.c", "lib/code.c", "-o", "program", cwd=folder)
    return folder / "program"


def functions_of(elf: ElfFile, offsets: tuple[int, ...]) -> list[str]:
    table = SymbolTable.of(elf, elf.path)
    return [found[0].name if (found := table.at(offset)) else "?" for offset in offsets]


@pytest.mark.parametrize("dwarf", ["-gdwarf-4", "-gdwarf-5"])
@pytest.mark.parametrize("level", ["-O0", "-O2"])
@pytest.mark.parametrize("more", [(), ("-gz=zlib",), ("-no-pie",), ("-ffunction-sections", "-Wl,--gc-sections")])
def test_lines(tmp_path: Path, dwarf: str, level: str, more: tuple[str, ...]) -> None:
    elf = ElfFile.open(built(tmp_path, dwarf, level, *more))
    decoded = run("objdump", "--dwarf=decodedline", elf.path)
    for line in (6, 8, 16):
        rows = {
            int(address, 16) - elf.link_base for address in re.findall(rf"^code\.c +{line} +(0x\w+).*x", decoded, re.M)
        }
        offsets = line_offsets(elf, "src/code.c", line)
        assert offsets and set(offsets) <= rows
        assert offsets == line_offsets(elf, str(tmp_path / "src/code.c"), line)
        ranges = function_ranges(elf)
        assert all(function_at(ranges, offset) is not None for offset in offsets)
    header = line_offsets(elf, "inner.h", 3)
    assert functions_of(elf, header) == (["from_header"] if level == "-O0" else ["main"])


@pytest.mark.parametrize("dwarf", ["-gdwarf-4", "-gdwarf-5"])
def test_one_address_for_each_function_or_inlined_copy(tmp_path: Path, dwarf: str) -> None:
    elf = ElfFile.open(built(tmp_path, dwarf, "-O0"))
    (loop,) = line_offsets(elf, "src/code.c", 5)  # the line has code before and after the body
    (body,) = line_offsets(elf, "src/code.c", 6)
    assert loop < body
    assert functions_of(elf, line_offsets(elf, "src/code.c", 13)) == ["first", "second", "second"]
    (entry,) = line_offsets(elf, "src/code.c", 3) or line_offsets(elf, "src/code.c", 2)
    assert functions_of(elf, (entry,)) == ["plain"]


def test_path_suffixes(tmp_path: Path) -> None:
    elf = ElfFile.open(built(tmp_path, "-g"))
    assert len(line_offsets(elf, "code.c", 8)) == 1
    both = line_offsets(elf, "code.c", 3)  # in both files of that name
    assert functions_of(elf, both) in (["plain", "elsewhere"], ["elsewhere"])
    assert functions_of(elf, line_offsets(elf, "lib/code.c", 3)) == ["elsewhere"]
    assert functions_of(elf, line_offsets(elf, "./lib/../lib/code.c", 3)) == ["elsewhere"]
    for name in ("ode.c", "rc/code.c", "other/src/code.c", "", "src"):
        assert line_offsets(elf, name, 8) == () == nearest_lines(elf, name, 8)


def test_lines_without_code(tmp_path: Path) -> None:
    elf = ElfFile.open(built(tmp_path, "-g"))
    assert line_offsets(elf, "src/code.c", 7) == ()
    assert nearest_lines(elf, "src/code.c", 7, 2) == (6, 8)
    assert line_offsets(elf, "src/code.c", 4000) == ()
    assert nearest_lines(elf, "src/code.c", 4000, 1) == (18,)


def test_separate_debug_file(tmp_path: Path) -> None:
    program = built(tmp_path, "-g")
    whole = ElfFile.open(program)
    assert file_with_lines(whole, program) is whole
    run("objcopy", "--only-keep-debug", program, tmp_path / "program.debug")
    run("objcopy", "--strip-all", f"--add-gnu-debuglink={tmp_path / 'program.debug'}", program, tmp_path / "s")
    stripped = ElfFile.open(tmp_path / "s")
    assert not has_lines(stripped) and line_offsets(stripped, "src/code.c", 8) == ()
    debug = file_with_lines(stripped, tmp_path / "s")
    assert debug is not None
    assert line_offsets(debug, "src/code.c", 8) == line_offsets(whole, "src/code.c", 8) != ()
    (tmp_path / "program.debug").unlink()
    assert file_with_lines(stripped, tmp_path / "s") is None


@pytest.mark.parametrize("dwarf", ["-gdwarf-4", "-gdwarf-5"])
@pytest.mark.parametrize("level", ["-O0", "-O2"])
@pytest.mark.parametrize("more", [(), ("-no-pie",), ("-gz=zlib", "-ffunction-sections"), ("-gno-aranges",)])
def test_the_source_of_every_instruction(tmp_path: Path, dwarf: str, level: str, more: tuple[str, ...]) -> None:
    """As in objdump's rows; code without debug information has none. (binutils 2.40's addr2line errs with DWARF 5.)"""
    options = [option for option in more if option != "-gno-aranges"]
    program = built(tmp_path, dwarf, level, *options)
    if len(options) < len(more):  # as other compilers do it
        run("objcopy", "--remove-section", ".debug_aranges", program)
    elf = ElfFile.open(program)
    rows = [
        (int(address, 16) - elf.link_base, "" if line == "-" else f"{name}:{line}")
        for name, line, address in re.findall(
            r"^(\S+) +(\d+|-) +(0x\w+)", run("objdump", "--dwarf=decodedline", program), re.M
        )
    ]
    theirs = {
        offset: line
        for (start, line), (end, _) in pairwise(rows)
        if line and start < end
        for offset in range(start, end)
    }
    blocks = BlockMap.of(elf)
    offsets = [offset for offset in range(blocks.base, blocks.block_starts[-1] + 16) if blocks.is_boundary(offset)]
    found = source_lines(elf, offsets)
    assert found == {offset: theirs[offset] for offset in offsets if offset in theirs}
    assert len(offsets) > len(found) > 20
    assert {line.partition(":")[0] for line in found.values()} == {"code.c", "inner.h"}


def test_broken_line_tables_are_refused(tmp_path: Path) -> None:
    program = built(tmp_path, "-g")
    elf = ElfFile.open(program)
    section = elf.section(".debug_info")
    assert section is not None
    data = bytearray(program.read_bytes())
    data[section.file_offset : section.file_offset + section.size] = b"\xff" * section.size
    with pytest.raises(DynacutError):
        line_offsets(ElfFile(program, memoryview(bytes(data))), "code.c", 8)
    with pytest.raises(DynacutError):
        source_lines(ElfFile(program, memoryview(bytes(data))), [0x1200])
