"""Reading images: what is in them is found; what lies, leads astray or does not hold together is refused."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest
from image_builder import (
    ANONYMOUS,
    ANONYMOUS_PAGES,
    ARGUMENTS,
    CHILD_PID,
    HEAP,
    ROOT_PID,
    SHARED,
    STACK,
    STACK_PAGES,
    VDSO,
    BuiltImage,
    build_image,
    build_process,
    memory_of,
    page_of,
    write_incremental,
)
from image_refusal import with_pagemap
from test_sites import BASE, built

from dynacut.handlers.table import KernelAction
from dynacut.offline.images.image import Image
from dynacut.offline.images.schema import Message
from dynacut.shared.errors import DynacutError
from dynacut.shared.target import PAGE_SIZE

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")


# What is in an image.


def test_processes_threads_names_and_arguments(image: Path) -> None:
    with Image(image) as opened:
        assert [process.pid for process in opened.processes] == [ROOT_PID, CHILD_PID]
        root = opened.processes[0]
        assert [thread.tid for thread in root.threads] == [ROOT_PID, ROOT_PID + 1, ROOT_PID + 2]
        assert (root.name, root.exe) == ("server", str(built()[0]))
        assert root.arguments == tuple(ARGUMENTS.decode().split("\0")[:-1])
        assert [module.name for module in root.modules] == ["server", "libextra.so.1"]
        assert root.modules[0].base == BASE
        assert [thread.blocked for thread in root.threads] == [0, (1 << 64) - 1, 0]
        assert root.action(15) == KernelAction(BASE + 0x1100, 0x4000000, BASE + 0x1200, 0xFFFF)
        assert root.caught_signals() == [15]
        assert opened.depth == 0


@pytest.mark.parametrize("incremental", [False, True])
def test_memory_is_what_was_dumped_or_the_file_or_zero(tmp_path: Path, incremental: bool) -> None:
    if incremental:
        path = write_incremental(tmp_path / "image", build_image())
    else:
        path = build_image().write(tmp_path / "image")
    with Image(path) as image:
        assert image.depth == (2 if incremental else 0)
        for process in image.processes:
            for index in range(ANONYMOUS_PAGES):
                expected = page_of(process.pid, ANONYMOUS, index) if index % 4 < 2 else bytes(PAGE_SIZE)
                assert process.read(ANONYMOUS + index * PAGE_SIZE, PAGE_SIZE) == expected
            assert process.read(HEAP, 2) == page_of(process.pid, HEAP, 0)[:2]
            assert process.read(HEAP + 2 * PAGE_SIZE, 2) == bytes(2)
            assert process.read(VDSO, PAGE_SIZE) == page_of(process.pid, VDSO, 0)
            assert process.read(STACK + STACK_PAGES * PAGE_SIZE - len(ARGUMENTS), len(ARGUMENTS)) == ARGUMENTS
            assert process.read(BASE, 4) == b"\x7fELF"
            assert process.read(SHARED, PAGE_SIZE) == bytes(PAGE_SIZE)
            assert process.read(SHARED + PAGE_SIZE, PAGE_SIZE) == page_of("shared", 2)
            for mapping in process.modules[1].mappings:
                count = min(mapping.size, PAGE_SIZE)
                with built()[1].open("rb") as file:
                    file.seek(mapping.file_offset)
                    assert process.read(mapping.start, count) == file.read(count).ljust(count, b"\0")


def test_memory_that_is_not_mapped_or_shared_is_not_written(image: Path) -> None:
    with Image(image) as opened:
        process = opened.processes[0]
        for address, why in ((SHARED, "shared"), (HEAP - 1, "nothing is mapped"), (1 << 63, "nothing is mapped")):
            with pytest.raises(DynacutError, match=why):
                process.write(address, b"x")
        with pytest.raises(DynacutError, match="cannot be read"):
            process.read(HEAP - 1, 2)
        with pytest.raises(DynacutError, match="not free"):
            process.memory.map_anonymous(HEAP + PAGE_SIZE, PAGE_SIZE, 3)
        assert not process.changed


def test_files_are_found_below_a_root(tmp_path: Path, built_image: BuiltImage) -> None:
    """As for an image of a container."""
    path = built_image.write(tmp_path / "image")
    for file in built():
        below = tmp_path / "root" / str(file).lstrip("/")
        below.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, below)
    with Image(path, str(tmp_path / "root")) as image:
        process = image.processes[0]
        assert process.read(BASE, 4) == b"\x7fELF"
        assert process.exe == str(built()[0])
        assert process.modules[0].file == tmp_path / "root" / str(built()[0]).lstrip("/")


def test_counts_of_older_images_are_read(image: Path) -> None:
    """Before CRIU 4.2 there was only the short count, before 2.7 no flags."""

    def older(messages: list[Message]) -> None:
        for entry in messages[1:]:
            entry.ClearField("nr_pages")
            entry.ClearField("flags")

    with Image(image) as opened:
        expected = memory_of(opened.processes[0])
    with Image(with_pagemap(image, older)) as opened:
        assert memory_of(opened.processes[0]) == expected


def test_a_tree_of_more_processes_than_files_may_be_open(tmp_path: Path, built_image: BuiltImage) -> None:
    count = 100
    for index in range(count):
        built_image.processes.append(build_process(CHILD_PID + 100 + 2 * index, ROOT_PID, 1, pages_id=100 + index))
    image = built_image.write(tmp_path / "image")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        with Image(image) as opened:
            assert len(opened.processes) == 2 + count
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
