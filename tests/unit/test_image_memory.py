"""Mapping, unmapping and writing in images, in any order, through any layers: compared with a model."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_builder import (
    ANONYMOUS,
    ANONYMOUS_PAGES,
    SHARED,
    State,
    build_image,
    everything,
    page_of,
    snapshot,
)

from dynacut.offline.images.image import Image
from dynacut.offline.images.process import ImageProcess
from dynacut.offline.layer import write_image
from dynacut.shared.errors import DynacutError
from dynacut.shared.target import PAGE_SIZE

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")
KINDS = pytest.mark.parametrize("flat", [False, True], ids=["layer", "flat"])


def reopened(path: Path) -> list[State]:
    with Image(path) as image:
        return everything(image)


# Mapping and unmapping.


@KINDS
def test_unmapping_splits_vmas_and_drops_pages(tmp_path: Path, flat: bool) -> None:
    source = build_image().write(tmp_path / "image")
    with Image(source) as image:
        process = image.processes[0]
        library = process.modules[1].mappings[-1]
        assert library.size == 2 * PAGE_SIZE
        process.memory.unmap(ANONYMOUS + 4 * PAGE_SIZE, ANONYMOUS + 6 * PAGE_SIZE)
        process.memory.unmap(SHARED + PAGE_SIZE, SHARED + 2 * PAGE_SIZE)
        process.memory.unmap(library.start, library.start + PAGE_SIZE)
        expected = everything(image)
        write_image(image, tmp_path / "new", flat=flat, extra={})
    assert reopened(tmp_path / "new") == expected
    with Image(tmp_path / "new") as image:
        process = image.processes[0]
        parts = {vma.mapping.start: vma for vma in process.memory.vmas}
        assert parts[ANONYMOUS].mapping.end == ANONYMOUS + 4 * PAGE_SIZE
        assert parts[ANONYMOUS + 6 * PAGE_SIZE].mapping.end == ANONYMOUS + ANONYMOUS_PAGES * PAGE_SIZE
        assert [parts[ANONYMOUS].message.pgoff, parts[ANONYMOUS + 6 * PAGE_SIZE].message.pgoff] == [0, 0]
        assert parts[SHARED].message.pgoff == PAGE_SIZE
        assert parts[SHARED + 2 * PAGE_SIZE].message.pgoff == 3 * PAGE_SIZE
        assert parts[library.start + PAGE_SIZE].mapping.file_offset == library.file_offset + PAGE_SIZE
        assert not list(process.memory.pages.within(ANONYMOUS + 4 * PAGE_SIZE, ANONYMOUS + 6 * PAGE_SIZE))
        for address in (ANONYMOUS + 4 * PAGE_SIZE, SHARED + PAGE_SIZE, library.start):
            with pytest.raises(DynacutError, match="cannot be read"):
                process.read(address, 1)


# Any sequence of changes.

PAGES = range(ANONYMOUS, ANONYMOUS + ANONYMOUS_PAGES * PAGE_SIZE, PAGE_SIZE)
WRITES = st.tuples(
    st.just("write"), st.integers(ANONYMOUS, PAGES.stop - 1), st.integers(1, 2 * PAGE_SIZE), st.integers(1, 255)
)
UNMAPS = st.tuples(st.just("unmap"), st.sampled_from(PAGES), st.integers(1, 3), st.just(0))
CHANGES = st.lists(st.one_of(WRITES, UNMAPS), max_size=5)


def apply(process: ImageProcess, model: dict[int, bytearray], changes: list[tuple[str, int, int, int]]) -> None:
    """Does the changes both in the image and in a model of its anonymous memory, by page."""
    for kind, address, size, byte in changes:
        if kind == "unmap":
            end = min(address + size * PAGE_SIZE, PAGES.stop)
            process.memory.unmap(address, end)
            for page in range(address, end, PAGE_SIZE):
                model.pop(page, None)
            continue
        pages = range(address & -PAGE_SIZE, address + size, PAGE_SIZE)
        if not all(page in model for page in pages):
            with pytest.raises(DynacutError):
                process.read(address, size)
            continue
        process.write(address, bytes([byte]) * size)
        for position in range(address, address + size):
            model[position & -PAGE_SIZE][position % PAGE_SIZE] = byte


def check(process: ImageProcess, model: dict[int, bytearray]) -> None:
    mapped = {page for part in process.mappings for page in range(part.start, part.end, PAGE_SIZE) if page in PAGES}
    assert mapped == set(model)
    assert all(process.read(page, PAGE_SIZE) == data for page, data in model.items())


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    depths=st.lists(st.integers(-1, 2), min_size=ANONYMOUS_PAGES, max_size=ANONYMOUS_PAGES),
    stale=st.sets(st.sampled_from(PAGES)),
    rounds=st.lists(st.tuples(CHANGES, st.booleans()), min_size=1, max_size=3),
)
def test_any_changes_to_any_image_read_as_in_a_model(
    depths: list[int], stale: set[int], rounds: list[tuple[list[tuple[str, int, int, int]], bool]]
) -> None:
    """depths: which of three dumps holds a page, none for -1; stale: pages that older dumps hold with other bytes."""
    model = {page: bytearray(PAGE_SIZE) for page in PAGES}
    with TemporaryDirectory() as name:
        folder = Path(name)
        for level in (2, 1, 0):
            part = deepcopy(build_image())
            part.processes = part.processes[:1]
            process = part.processes[0]
            process.pages = {page: data for page, data in process.pages.items() if page not in PAGES}
            for page, depth in zip(PAGES, depths, strict=True):
                if depth == level or (depth < level and depth >= 0 and page in stale):
                    process.pages[page] = page_of(level, page)
                elif depth > level:
                    process.inherited.add(page)
                if depth == level:
                    model[page] = bytearray(page_of(level, page))
            last = part.write(folder / f"dump-{level}", f"../dump-{level + 1}" if level < 2 else None)
        before = snapshot(folder)
        for number, (changes, flat) in enumerate(rounds):
            with Image(last) as image:
                check(image.processes[0], model)
                apply(image.processes[0], model, changes)
                check(image.processes[0], model)
                expected = everything(image)
                write_image(image, folder / str(number), flat=flat, extra={})
            last = folder / str(number)
            assert reopened(last) == expected
        with Image(last) as image:
            check(image.processes[0], model)
        assert before.items() <= snapshot(folder).items()
