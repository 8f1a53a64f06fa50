"""Changed images: a layer or a copy reads as what was changed in memory, and the original stays as it was."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from image_builder import (
    ANONYMOUS,
    BLOCKING_TID,
    CHILD_PID,
    HEAP,
    HEAP_PAGES,
    ROOT_PID,
    STACK,
    STACK_PAGES,
    UNKNOWN,
    State,
    build_image,
    build_process,
    everything,
    snapshot,
    write_incremental,
)

from dynacut.handlers.table import Table
from dynacut.offline.change import change, look
from dynacut.offline.images.files import MAX_PARENTS, ImageFolder, packed
from dynacut.offline.images.image import Image
from dynacut.offline.images.pages import PAGEMAP_MAGIC
from dynacut.offline.layer import Written, write_image
from dynacut.shared import resolve
from dynacut.shared.errors import DynacutError
from dynacut.shared.on_hit import OnHit
from dynacut.shared.patch_set import PatchSet
from dynacut.shared.plan import Plan, PlannedFeature, PlannedSite, Scope
from dynacut.shared.target import PAGE_SIZE, Target

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")
KINDS = pytest.mark.parametrize("flat", [False, True], ids=["layer", "flat"])
ORIGINALS = pytest.mark.parametrize("incremental", [False, True], ids=["one dump", "incremental"])
PLAN = Plan(
    "plan",
    (
        PlannedFeature("alpha", OnHit.parse("terminate"), Scope.BLOCK, (PlannedSite("alpha", 13),)),
        PlannedFeature("extra", OnHit.parse("return=3"), Scope.ENTRY, (PlannedSite("extra"),)),
    ),
)


def original(folder: Path, *, incremental: bool = False) -> Path:
    """An image, made of one dump or of three."""
    if incremental:
        return write_incremental(folder / "image", build_image())
    return build_image().write(folder / "image")


def write(image: Image, output: Path, *, flat: bool = False) -> Written:
    return write_image(image, output, flat=flat, extra={})


def disable(target: Target, table: Table | None) -> PatchSet:
    return resolve.disable(PLAN, target, table)


def disabled(source: Path, output: Path, *, flat: bool = False, pids: tuple[int, ...] = ()) -> Path:
    """The image without the plan's features."""
    with Image(source) as image:
        change(image, disable, output, pids=pids, dry_run=False, flat=flat)
    return output


def undone(source: Path, output: Path, *, flat: bool = False) -> Path:
    """The image with everything put back."""
    with Image(source) as image:
        change(image, resolve.undo, output, dry_run=False, flat=flat)
    return output


def reopened(path: Path) -> list[State]:
    with Image(path) as image:
        return everything(image)


# What is written reads as what was in memory.


@KINDS
@ORIGINALS
def test_what_was_written_is_found_again(tmp_path: Path, flat: bool, incremental: bool) -> None:
    """Over a page of the image, a page that no dump has, a page of the program, and from one page into the next."""
    places = [HEAP, HEAP + 3 * PAGE_SIZE + 5, ANONYMOUS + 2 * PAGE_SIZE - 3, ANONYMOUS + 5 * PAGE_SIZE]
    source = original(tmp_path, incremental=incremental)
    before = snapshot(tmp_path)
    with Image(source) as image:
        for process in image.processes:
            for place in [*places, process.modules[0].executable_mappings[0].start + 7]:
                process.write(place, b"changed")
                assert process.read(place, 7) == b"changed"
        expected = everything(image)
        write(image, tmp_path / "new", flat=flat)
    assert reopened(tmp_path / "new") == expected
    assert expected != reopened(source)
    assert before.items() <= snapshot(tmp_path).items()


@KINDS
@ORIGINALS
def test_an_unchanged_image_reads_the_same(tmp_path: Path, flat: bool, incremental: bool) -> None:
    source = original(tmp_path, incremental=incremental)
    with Image(source) as image:
        write(image, tmp_path / "new", flat=flat)
    assert reopened(tmp_path / "new") == reopened(source)


def test_a_flat_copy_needs_no_parent_and_shares_no_file(tmp_path: Path) -> None:
    source = original(tmp_path, incremental=True)
    disabled(source, tmp_path / "flat", flat=True)
    assert not (tmp_path / "flat" / "parent").exists()
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "flat").iterdir())
    expected = reopened(tmp_path / "flat")
    for other in tmp_path.iterdir():
        if other.name != "flat":
            shutil.rmtree(other)
    assert reopened(tmp_path / "flat") == expected


def test_a_copy_of_what_was_never_written_to_takes_no_room(tmp_path: Path) -> None:
    image = original(tmp_path)
    data = b"head".ljust(1 << 16, b"-")
    (image / "tmpfs-dev-1.img").write_bytes(data)
    pages = image / "pages-1.img"
    hole = bytearray(pages.read_bytes())
    hole[4 * PAGE_SIZE : 9 * PAGE_SIZE] = bytes(5 * PAGE_SIZE)
    with pages.open("wb") as file:
        file.write(hole[: 4 * PAGE_SIZE])
        file.seek(9 * PAGE_SIZE)
        file.write(hole[9 * PAGE_SIZE :])
    try:
        for name in ("tmpfs-dev-1.img", "ghost-file-1.img"):
            with (image / name).open("ab") as file:
                file.truncate(1 << 40)
    except OSError:
        pytest.skip("this file system has no files of a terabyte")
    with Image(image) as opened:
        before = everything(opened)
        opened.processes[0].write(HEAP, b"new")
        changed = write_image(opened, tmp_path / "copy", flat=True, extra={}).path
    for name in ("tmpfs-dev-1.img", "ghost-file-1.img"):
        status = (changed / name).stat()
        assert status.st_size == 1 << 40
        assert status.st_blocks * 512 < 1 << 20
    with (changed / "tmpfs-dev-1.img").open("rb") as file:
        assert file.read(len(data) + 1) == data + b"\0"
    with Image(changed) as opened:
        assert opened.processes[0].read(HEAP, 3) == b"new"
        opened.processes[0].write(HEAP, before[0][0][HEAP, HEAP + HEAP_PAGES * PAGE_SIZE][:3])
        assert everything(opened) == before


@ORIGINALS
def test_a_layer_outlives_the_original(tmp_path: Path, incremental: bool) -> None:
    source = original(tmp_path, incremental=incremental)
    expected = reopened(disabled(source, tmp_path / "layer"))
    for other in tmp_path.iterdir():
        if other.name != "layer":
            shutil.rmtree(other)
    assert reopened(tmp_path / "layer") == expected


def test_a_layer_on_a_layer_on_a_layer(tmp_path: Path) -> None:
    last = original(tmp_path)
    for number in range(5):
        with Image(last) as image:
            for process in image.processes:
                process.write(ANONYMOUS + number * PAGE_SIZE, b"changed")
                process.write(HEAP + 9, bytes([number]))
            expected = everything(image)
            write(image, tmp_path / str(number))
        last = tmp_path / str(number)
        assert reopened(last) == expected


@KINDS
@ORIGINALS
@pytest.mark.parametrize("twice", [False, True])
def test_an_undo_gives_the_original(tmp_path: Path, flat: bool, incremental: bool, twice: bool) -> None:
    """Equal memory, actions and masks; only the handler's region stays mapped, emptied."""
    source = original(tmp_path, incremental=incremental)
    before = snapshot(source)
    new = disabled(source, tmp_path / "new", flat=flat)
    with Image(new) as image:
        features = [feature.name for process in look(image).processes for feature in process.features]
        assert features == ["alpha", "extra"] * 2
        blocked = {thread.tid: thread.blocked for thread in image.processes[0].threads}
        assert blocked[BLOCKING_TID] == (1 << 64) - 1 - (1 << 4)
    if twice:
        new = undone(disabled(undone(new, tmp_path / "1"), tmp_path / "2"), tmp_path / "3", flat=flat)
    else:
        new = undone(new, tmp_path / "undone", flat=flat)
    for (memory, _, *signals), (undone_memory, _, *undone_signals) in zip(reopened(source), reopened(new), strict=True):
        assert memory.items() <= undone_memory.items()
        assert signals == undone_signals
    assert snapshot(source) == before


def test_what_one_process_alone_is_patched_with_leaves_the_others(tmp_path: Path) -> None:
    source = original(tmp_path)
    disabled(source, tmp_path / "new", pids=(CHILD_PID,))
    assert reopened(source)[0] == reopened(tmp_path / "new")[0]
    assert reopened(source)[1] != reopened(tmp_path / "new")[1]


@pytest.mark.parametrize("pid", [ROOT_PID, CHILD_PID])
def test_a_parent_that_numbers_its_pages_differently(tmp_path: Path, pid: int) -> None:
    """A process born between two dumps moves the numbers of the pages files behind its own."""
    newer, older = build_image(), build_image()
    newer.processes.insert(1, build_process(ROOT_PID + 5, ROOT_PID, 1, pages_id=2))
    newer.processes[2].pages_id = 3
    for new, old in ((newer.processes[0], older.processes[0]), (newer.processes[2], older.processes[1])):
        new.inherited, new.pages = set(old.pages), {}
    older.write(tmp_path / "older")
    newer.write(tmp_path / "image", "../older")
    before = reopened(tmp_path / "image")
    for number, changed in enumerate((pid, ROOT_PID + 5)):
        for address in (HEAP, HEAP + 3 * PAGE_SIZE):
            output = tmp_path / f"{number}-{address:x}"
            with Image(tmp_path / "image") as image:
                process = next(each for each in image.processes if each.pid == changed)
                process.write(address, b"changed")
                expected = everything(image)
                write(image, output)
            assert reopened(output) == expected != before


# What is changed, and what is not.


def test_only_what_changed_differs(tmp_path: Path) -> None:
    source = original(tmp_path)
    with Image(source) as image:
        written = change(image, disable, tmp_path / "new", pids=(ROOT_PID,), dry_run=False, flat=False).written
    assert written is not None
    old, new = snapshot(source), snapshot(tmp_path / "new")
    linked = {name for name in new if new[name][0] in inodes(old)}
    assert (
        set(new) - linked
        == set(written.files)
        == {
            "dynacut.json",
            f"core-{ROOT_PID}.img",
            f"core-{BLOCKING_TID}.img",
            f"mm-{ROOT_PID}.img",
            f"pagemap-{ROOT_PID}.img",
            "pages-1.img",
        }
    )
    assert written.bytes_written == sum(len(new[name][2]) for name in written.files)
    assert all(new[name] == old[Path(name).name] for name in linked)
    assert {name for name in new if "/" not in name} - {"dynacut.json"} == set(old) - {"dump.log"}
    assert {name for name in new if "/" in name} == {f"parent/pagemap-{ROOT_PID}.img", "parent/pages-1.img"}


def inodes(files: dict[str, tuple[int, int, bytes]]) -> set[int]:
    return {inode for inode, _, _ in files.values()}


@KINDS
def test_unknown_fields_survive(tmp_path: Path, flat: bool) -> None:
    disabled(original(tmp_path), tmp_path / "new", flat=flat)
    for name in (f"core-{ROOT_PID}.img", f"core-{BLOCKING_TID}.img", f"mm-{ROOT_PID}.img", "pstree.img"):
        assert UNKNOWN in (tmp_path / "new" / name).read_bytes()


def test_entries_of_pages_that_stay_keep_their_bytes(tmp_path: Path) -> None:
    """Also what a CRIU to come adds to them, and the limits that dumping gave them."""
    name = f"pagemap-{ROOT_PID}.img"
    source = original(tmp_path)
    with ImageFolder(source) as folder:
        head, *entries = (data + UNKNOWN for data in folder.messages(name, PAGEMAP_MAGIC))
    (source / name).write_bytes(packed(PAGEMAP_MAGIC, [head, *entries]))
    with Image(source) as image:
        image.processes[0].write(HEAP + 3 * PAGE_SIZE, b"not in the image before")
        write(image, tmp_path / "new")
    with ImageFolder(tmp_path / "new") as folder:
        new_head, *new_entries = folder.messages(name, PAGEMAP_MAGIC)
    assert new_head == head
    assert len(new_entries) == len(entries) + 1
    assert set(entries) < set(new_entries)


@KINDS
def test_nothing_but_images_is_taken_over(tmp_path: Path, flat: bool) -> None:
    source = original(tmp_path)
    for name in ("stats-dump", "restore.log", "core.img.orig", ".hidden"):
        (source / name).write_text("x")
    (source / "descriptors.json").write_text("{}")
    with Image(source) as image:
        write(image, tmp_path / "new", flat=flat)
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {path.name for path in source.glob("*.img")} | {"descriptors.json"}


def test_a_layer_of_the_depth_that_can_be_read_becomes_a_copy(tmp_path: Path) -> None:
    """A layer adds a parent, and the number of parents is limited."""
    image = build_image()
    for built in image.processes:
        built.inherited = set(built.pages)
        built.pages = {}
    for depth in range(MAX_PARENTS):
        image.write(tmp_path / f"image-{depth}", f"../image-{depth + 1}")
    build_image().write(tmp_path / f"image-{MAX_PARENTS}")
    with Image(tmp_path / "image-0") as opened:
        for process in opened.processes:
            process.write(HEAP, b"changed")
        expected = everything(opened)
        write(opened, tmp_path / "new")
    assert reopened(tmp_path / "new") == expected


@pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == Path("/tmp").stat().st_dev,
    reason="this machine has no second file system",
)
@ORIGINALS
def test_another_file_system_gets_a_copy(tmp_path: Path, incremental: bool) -> None:
    with TemporaryDirectory(dir="/dev/shm") as folder, Image(original(tmp_path, incremental=incremental)) as image:
        image.processes[0].write(HEAP, b"changed")
        expected = everything(image)
        assert not write(image, Path(folder) / "new").is_layer
        assert reopened(Path(folder) / "new") == expected


# Nothing is left of what could not be written.


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """As on a full disk: writing beyond that many bytes of a file fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@KINDS
@ORIGINALS
@pytest.mark.parametrize("missing", [1, 5000, 20_000, 1 << 30], ids=lambda missing: f"{missing} bytes missing")
def test_a_full_disk_leaves_nothing(tmp_path: Path, flat: bool, incremental: bool, missing: int) -> None:
    """However little is missing: a write that takes a part only has not failed yet."""
    source = original(tmp_path, incremental=incremental)
    with Image(source) as image:
        for process in image.processes:
            process.write(ANONYMOUS, b"changed" * 2 * PAGE_SIZE)
            process.write(STACK + (STACK_PAGES - 1) * PAGE_SIZE, b"the last page")
        write(image, tmp_path / "image-whole", flat=flat)
        before = snapshot(tmp_path)
        size = max((tmp_path / "image-whole" / f"pages-{number}.img").stat().st_size for number in (1, 2))
        with pytest.raises(DynacutError, match="cannot be written"), file_size_limit(max(0, size - missing)):
            write(image, tmp_path / "new", flat=flat)
    assert snapshot(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("image")]


def test_an_output_that_is_not_free_is_refused(tmp_path: Path) -> None:
    source = original(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    with Image(source) as image:
        for name in ("full", "file", "loop", "dangling", "file/below", "image", "image/new", "image/parent", "a" * 256):
            before = snapshot(tmp_path)
            with pytest.raises(DynacutError):
                write(image, tmp_path / name)
            assert snapshot(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "full", "image", "loop"]


def test_an_empty_output_directory_is_used(tmp_path: Path) -> None:
    source = original(tmp_path)
    (tmp_path / "new").mkdir()
    disabled(source, tmp_path / "new")
    assert len(reopened(tmp_path / "new")) == 2


def test_a_plan_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    source = original(tmp_path)
    plan = Plan("plan", (PlannedFeature("x", OnHit.parse("terminate"), Scope.ENTRY, (PlannedSite("alpha+2"),)),))
    with Image(source) as image, pytest.raises(DynacutError):
        change(image, lambda target, table: resolve.disable(plan, target, table), tmp_path / "new", dry_run=False,
               flat=False)  # fmt: skip
    assert list(tmp_path.iterdir()) == [tmp_path / "image"]


def test_a_thread_amid_the_bytes_is_refused(tmp_path: Path) -> None:
    built = build_image()
    built.write(tmp_path / "image")
    with Image(tmp_path / "image") as image:
        process = image.processes[0]
        alpha = process.modules[0].base + 0x1129
        process.threads[0].core.thread_info.gpregs.ip = alpha + 1
        with pytest.raises(DynacutError, match="amid the bytes to change"):
            change(image, disable, tmp_path / "new", dry_run=False, flat=False)
        process.threads[0].core.thread_info.gpregs.ip = alpha
        process.write(STACK + 8 * PAGE_SIZE - 64, (alpha + 4).to_bytes(8, "little"))
        with pytest.raises(DynacutError, match="amid the bytes to change"):
            change(image, disable, tmp_path / "new", dry_run=False, flat=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "image"]
