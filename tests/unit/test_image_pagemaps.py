"""Pagemaps, parents and tables that do not fit: a clear error."""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from image_builder import (
    ANONYMOUS,
    CHILD_PID,
    HEAP,
    SHARED_ID,
    VSYSCALL,
    BuiltImage,
    build_image,
    vma,
    write_incremental,
)
from image_refusal import changed, refused, with_pagemap
from image_trial import limited_memory
from test_sites import BASE

from dynacut.handlers.table import MAGIC, Layout, Repair, RepairKind, Table
from dynacut.offline import patcher
from dynacut.offline.change import look
from dynacut.offline.images.files import MAX_PARENTS
from dynacut.offline.images.image import Image
from dynacut.offline.images.pages import PAGEMAP_MAGIC, PARENT, PRESENT
from dynacut.offline.images.schema import Message, PagemapEntry, PagemapHead
from dynacut.shared import resolve
from dynacut.shared.errors import DynacutError
from dynacut.shared.region import choose_address, find_region, new_table
from dynacut.shared.target import PAGE_SIZE

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")


# Pagemaps and parents.


@pytest.mark.parametrize(
    ("new", "why"),
    [
        ({"vaddr": ANONYMOUS + 1, "nr_pages": 1, "flags": PRESENT}, "overlaps or is no range"),
        ({"vaddr": (1 << 64) - PAGE_SIZE, "nr_pages": 1, "flags": PRESENT}, "overlaps or is no range"),
        ({"vaddr": VSYSCALL, "nr_pages": 0, "flags": PRESENT}, "overlaps or is no range"),
        ({"vaddr": 1 << 47, "nr_pages": 1 << 60, "flags": PRESENT}, "overlaps or is no range"),
        ({"vaddr": BASE, "nr_pages": 1, "flags": PRESENT}, "overlaps or is no range"),
        ({"vaddr": 1 << 50, "nr_pages": 1, "flags": PRESENT}, "do not fit"),
        ({"vaddr": 1 << 50, "nr_pages": 1, "flags": 0}, "not in one place"),
        ({"vaddr": 1 << 50, "nr_pages": 1, "flags": 2}, "not in one place"),
        ({"vaddr": 1 << 50, "nr_pages": 1, "flags": PRESENT | PARENT}, "not in one place"),
        ({"vaddr": 1 << 50, "nr_pages": 1, "flags": PRESENT, "in_parent": True}, "not in one place"),
        ({"vaddr": 1 << 50, "nr_pages": 1, "flags": PARENT}, "no parent directory"),
        ({"vaddr": 1 << 50, "nr_pages": 1, "in_parent": True}, "no parent directory"),
    ],
)
def test_a_pagemap_that_does_not_fit(image: Path, new: dict[str, int], why: str) -> None:
    new.setdefault("compat_nr_pages", 1)
    assert why in refused(with_pagemap(image, lambda messages: messages.append(PagemapEntry(**new))))


def test_an_empty_pagemap(image: Path) -> None:
    assert "it is empty" in refused(with_pagemap(image, lambda messages: messages.clear()))


@pytest.mark.parametrize("size", [0, 1, PAGE_SIZE, 1 << 40])
def test_a_pages_file_of_another_size(image: Path, size: int) -> None:
    os.truncate(image / "pages-1.img", size)
    assert "they do not fit" in refused(image)


@pytest.mark.parametrize("name", [f"pagemap-{CHILD_PID}.img", f"pagemap-shmem-{SHARED_ID}.img"])
def test_two_pagemaps_with_one_pages_file(image: Path, name: str) -> None:
    """The change of one would be the other's, too."""
    changed(image, name, PAGEMAP_MAGIC, lambda messages: setattr(messages[0], "pages_id", 1), PagemapHead, PagemapEntry)
    assert "the same pages file" in refused(image)


@pytest.mark.parametrize("target", [".", "parent", "./parent", "../image", "../image/.", ""])
def test_a_circle_of_parents(image: Path, target: str) -> None:
    if target:
        (image / "parent").symlink_to(target)
    else:
        image.rename(image.parent / "two")
        (image.parent / "two" / "parent").symlink_to("../image")
        shutil.copytree(image.parent / "two", image, symlinks=True)
        (image / "parent").unlink()
        (image / "parent").symlink_to("../two")
    refused(image)


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("/", "leads out"),
        ("/etc", "leads out"),
        ("../..", "leads out"),
        ("../../elsewhere", "leads out"),
        ("../out", "leads out"),
        ("..", "No such file"),
        ("nowhere", "cannot be opened"),
        ("pstree.img", "cannot be opened"),
    ],
)
def test_a_parent_that_leads_astray(image: Path, target: str, why: str) -> None:
    build_image().write(image.parent.parent / "elsewhere")
    (image.parent / "out").symlink_to("../elsewhere")
    (image / "parent").symlink_to(target)

    def inherit(messages: list[Message]) -> None:
        messages[1].flags = PARENT

    assert "leads" in refused(image) if why == "leads out" else True
    os.truncate(image / "pages-1.img", (image / "pages-1.img").stat().st_size - PAGE_SIZE)
    assert why in refused(with_pagemap(image, inherit))


@pytest.mark.parametrize("kind", ["fifo", "file"])
def test_a_parent_that_is_no_directory(image: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(image / "parent")
    else:
        (image / "parent").write_text("..")
    assert "neither a directory nor a link" in refused(image)


def test_more_parents_than_anybody_needs(tmp_path: Path, built_image: BuiltImage) -> None:
    folder = tmp_path / "folder"
    for depth in range(MAX_PARENTS + 2):
        built_image.write(folder / str(depth), f"../{depth + 1}" if depth <= MAX_PARENTS else None)
    assert "never ends" in refused(folder / "0")
    with Image(folder / "1") as image:
        assert image.depth == MAX_PARENTS


def test_a_page_that_the_parent_does_not_have(tmp_path: Path, built_image: BuiltImage) -> None:
    """CRIU would look for it for ever."""
    path = write_incremental(tmp_path / "image", built_image, levels=1)
    (entry,) = [each for each in built_image.processes[0].pages if each == HEAP]
    other = build_image()
    for process in other.processes:
        del process.pages[entry]
    shutil.rmtree(tmp_path / "image-1")
    other.write(tmp_path / "image-1")
    assert f"pages from {entry:#x} on should be here" in refused(path)


def test_pages_by_the_billion_that_are_nowhere(tmp_path: Path, built_image: BuiltImage) -> None:
    """As many as fit the address space, in a mapping of code, of which private pages are listed."""
    root = built_image.processes[0]
    root.vmas.insert(0, vma(PAGE_SIZE * 16, (1 << 46) // PAGE_SIZE - 16, 5, 2, 0x40, shmid=1))
    built_image.write(tmp_path / "parent")
    image = built_image.write(tmp_path / "folder" / "image")
    built_image.write(tmp_path / "folder" / "below")
    (image / "parent").symlink_to("../below")
    entry = PagemapEntry(vaddr=1 << 30, compat_nr_pages=0, nr_pages=1 << 33, flags=PARENT)
    assert "should be here, and are not" in refused(with_pagemap(image, lambda messages: messages.insert(1, entry)))


def test_a_sparse_pages_file_of_a_terabyte(tmp_path: Path, built_image: BuiltImage) -> None:
    """It holds what its pagemap says, so it is read where it is looked at, but not page by page."""
    root = built_image.processes[0]
    built_image.mapped[9] = Path(shutil.copy(built_image.mapped[1], tmp_path / "huge"))
    root.vmas.insert(0, vma(PAGE_SIZE * 16, (1 << 46) // PAGE_SIZE - 16, 5, 2, 0x40, shmid=9))
    image = built_image.write(tmp_path / "folder" / "image")
    pages = image / "pages-1.img"
    try:
        os.truncate(pages, pages.stat().st_size + (1 << 40))
    except OSError:
        pytest.skip("this file system has no files of a terabyte")
    entry = PagemapEntry(vaddr=1 << 30, compat_nr_pages=0, nr_pages=1 << 28, flags=PRESENT)
    with_pagemap(image, lambda messages: messages.insert(1, entry))
    started = time.process_time()
    with limited_memory(), Image(image) as opened, pytest.raises(DynacutError, match="too many pages"):
        assert opened.processes[0].read(1 << 32, 5) is not None
        look(opened)
    assert time.process_time() - started < 1


# The table in memory.


def test_a_damaged_table_is_refused(image: Path) -> None:
    with Image(image) as opened:
        process = opened.processes[0]
        layout = Layout.for_contents(1, 1)
        region = choose_address(process, layout)
        process.memory.map_anonymous(region.code, region.table - region.code, 5)
        process.memory.map_anonymous(region.table, layout.size, 3)
        process.write(region.table, MAGIC)
        for write in new_table(layout, None, ("one",), ()):
            process.write(region.table + write.offset, write.data)
        found = find_region(process)
        assert found is not None and found.table is not None
        process.write(region.table + 16, b"\xff" * 100)
        with pytest.raises(DynacutError, match="cannot be used"):
            find_region(process)


def test_a_table_that_repairs_what_cannot_be_repaired(image: Path) -> None:
    """Signals that do not exist, and threads that do not."""
    repairs = [Repair(RepairKind.SIGNAL_MASK, number, 0, 0) for number in (signal.SIGKILL, 0, 65, 4_000_000_000)]
    repairs += [Repair(RepairKind.THREAD_MASK, number, 0, 1 << 63) for number in (0, 4_000_000_000)]
    for repair in repairs:
        with Image(image) as opened:
            process = opened.processes[0]
            layout = Layout.for_contents(1, 1)
            region = choose_address(process, layout)
            process.memory.map_anonymous(region.code, region.table - region.code, 5)
            process.memory.map_anonymous(region.table, layout.size, 3)
            process.write(region.table, MAGIC)
            for write in new_table(layout, None, ("one",), ()):
                process.write(region.table + write.offset, write.data)
            table = replace(Table.parse(process.read(region.table, layout.total_size), region.table))
            for write in table.repair_writes([repair]):
                process.write(region.table + write.offset, write.data)
            if repair.kind is RepairKind.SIGNAL_MASK and repair.id != signal.SIGKILL:
                with pytest.raises(DynacutError, match="which there is not"):
                    find_region(process)
                continue
            found = find_region(process)
            assert found is not None and found.table is not None and found.table.repairs == (repair,)
            patches = resolve.undo(process, found.table)
            if repair.kind is RepairKind.SIGNAL_MASK:
                with pytest.raises(DynacutError, match="no action for signal"):
                    patcher.apply(process, patches)
            else:
                patcher.apply(process, patches)
                assert all(thread.blocked != 1 << 63 for thread in process.threads)
