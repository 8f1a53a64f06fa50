"""Pages of code that may be unmapped, and targets in which they are."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from test_sites import MemoryTarget, new_target

from dynacut.handlers.table import Layout, Table, TableSite
from dynacut.shared.code import Code
from dynacut.shared.holes import Patched, idle_pages
from dynacut.shared.memory import PageRange
from dynacut.shared.patch_set import ByteEdit, outside
from dynacut.shared.target import PAGE_SIZE, Mapping, Module

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")

WORK = " ".join(f"sum += {n} * 3 + (sum >> {n % 8});" for n in range(1, 40))
FUNCTIONS = [f"void function{n}(void) {{ {WORK} }}" for n in range(48)]
DATA = '__asm__(".text; .ascii \\"data amid the code\\"; .balign 16");'
SOURCE = "\n".join(["volatile int sum;", *FUNCTIONS[:30], DATA, *FUNCTIONS[30:], "int main(void) { return 0; }"])


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Code:
    folder = tmp_path_factory.mktemp("holes")
    (folder / "program.c").write_text(SOURCE)
    subprocess.run(["gcc", "-O1", "-fno-toplevel-reorder", folder / "program.c", "-o", folder / "program"], check=True)
    path = folder / "program"
    module = Module("program", frozenset(), str(path), path, Path("/"), 0, 1 << 20, True, ())
    return Code(module)


def blocks_of(code: Code) -> list[tuple[int, int]]:
    return [(code.blocks.block(index).start, code.blocks.block(index).end) for index in range(len(code.blocks))]


def text_of(code: Code) -> range:
    section = code.elf.section(".text")
    assert section is not None
    return range(section.address, section.address + section.size)


def test_pages_of_removed_blocks_and_padding_are_idle(code: Code) -> None:
    """All but the first and last page, which other sections share, and the page with data that is no code."""
    blocks, text = blocks_of(code), text_of(code)
    data = code.elf.read(text.start, len(text)).find(b"data amid the code") + text.start
    runs = idle_pages(code, blocks)
    pages = {page for start, end in runs for page in range(start, end, PAGE_SIZE)}
    whole = set(range(-(-text.start // PAGE_SIZE) * PAGE_SIZE, text.stop - PAGE_SIZE + 1, PAGE_SIZE))
    assert data > text.start
    assert len(whole) > 4
    assert pages == whole - {data & -PAGE_SIZE}


def test_a_page_with_one_kept_block_stays(code: Code) -> None:
    blocks = blocks_of(code)
    everything = idle_pages(code, blocks)
    start, end = everything[0]
    kept = next(block for block in blocks if start < block[0] and block[1] <= start + PAGE_SIZE)
    pages = idle_pages(code, [block for block in blocks if block != kept])
    assert sum(stop - first for first, stop in pages) == sum(stop - first for first, stop in everything) - PAGE_SIZE
    assert all(not first <= kept[0] < stop for first, stop in pages)
    assert end > start


def test_nothing_removed_nothing_idle(code: Code) -> None:
    assert idle_pages(code, []) == []


def test_edits_outside_of_holes_remain() -> None:
    mapping = Mapping(0x1000, 0x9000, True, False, True, True, 0, "/bin/x", 1)
    holes = [PageRange(0x2000, 0x3000, mapping), PageRange(0x4000, 0x5000, mapping)]
    edits = [ByteEdit(0x1FFE, b"abcd", b"ABCD"), ByteEdit(0x2100, b"x", b"X"), ByteEdit(0x4FFF, b"yz", b"YZ")]
    assert outside(edits, holes) == (ByteEdit(0x1FFE, b"ab", b"AB"), ByteEdit(0x5000, b"z", b"Z"))
    assert outside(edits, []) == tuple(edits)


def test_a_hole_reads_as_int3_bytes() -> None:
    target = new_target()
    mapping = next(part for part in target.mappings if part.executable and part.is_file)
    hole = PageRange(mapping.start, mapping.start + PAGE_SIZE, mapping)
    view = Patched(with_hole(target, hole), table_with(hole))
    assert [(one.start, one.end) for one in view.holes] == [(hole.start, hole.end)]
    assert view.read(hole.start, 16) == b"\xcc" * 16
    assert len(view.mappings) == len(target.mappings)
    assert sum(len(module.mappings) for module in view.modules) == len(target.mappings)
    assert Patched(target, table_with(hole)).holes == ()


def with_hole(target: MemoryTarget, hole: PageRange) -> MemoryTarget:
    """The target without the mapping that a hole is the beginning of."""
    holed = new_target()
    holed.modules = [
        replace(module, mappings=tuple(part for part in module.mappings if part.start != hole.start))
        for module in target.modules
    ]
    return holed


def table_with(hole: PageRange) -> Table:
    """A table that says that the pages are unmapped."""
    site = TableSite.unmapped(hole.start, "one", hole.size)
    empty = Table.empty(Layout.of_capacities(64, 4096))
    memory = bytearray(empty.layout.total_size)
    for write in [*empty.update(["one"], [site]), replace(empty, generation=1).header()]:
        memory[write.offset : write.offset + len(write.data)] = write.data
    memory[:8] = b"dynacut\0"
    return Table.parse(bytes(memory), 0x10_0000)
