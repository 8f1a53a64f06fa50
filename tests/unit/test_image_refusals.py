"""Images that lie, lead astray or do not hold together in files, trees, VMAs and mapped files: a clear error."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from image_builder import (
    ANONYMOUS,
    CHILD_PID,
    FILES_MAGIC,
    HEAP,
    PSTREE_MAGIC,
    ROOT_PID,
    SHARED_ID,
    VSYSCALL,
    ZOMBIE_PID,
    BuiltImage,
    build_image,
    memory_of,
    vma,
)
from image_refusal import CORE, MM, PAGEMAP, changed, refused, with_vmas
from image_trial import limited_memory
from test_sites import BASE

from dynacut.offline.change import look
from dynacut.offline.images.files import MAX_MESSAGES, packed
from dynacut.offline.images.image import Image
from dynacut.offline.images.process import MM_MAGIC
from dynacut.offline.images.schema import FileEntry, MemfdInodeEntry, Message, PstreeEntry
from dynacut.offline.images.tree import CORE_MAGIC
from dynacut.offline.layer import write_image
from dynacut.shared.errors import DynacutError
from dynacut.shared.target import PAGE_SIZE

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")


# What is not there, or not what it should be.


@pytest.mark.parametrize("kind", ["missing", "file", "fifo", "empty", "loop", "null"])
def test_what_is_no_image_directory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image"
    match kind:
        case "file":
            path.write_text("x")
        case "fifo":
            os.mkfifo(path)
        case "empty":
            path.mkdir()
        case "loop":
            path.symlink_to("image")
        case "null":
            path = tmp_path / "ima\0ge"
    with pytest.raises(DynacutError) as caught:
        Image(path)
    assert caught.value.problem.isprintable()


@pytest.mark.parametrize("name", ["pstree.img", "files.img", CORE, MM, PAGEMAP, "pages-1.img", "fs.img"])
@pytest.mark.parametrize("kind", ["link", "outside", "loop", "fifo", "directory", "device"])
def test_something_else_in_a_file_s_place(image: Path, name: str, kind: str) -> None:
    path = image / name
    if path.exists():
        shutil.move(path, image.parent / name)
    match kind:
        case "link":
            (image.parent / name).touch()
            path.symlink_to(image.parent / name)
        case "outside":
            path.symlink_to("/etc/passwd")
        case "loop":
            path.symlink_to(name)
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
    assert "not a regular file" in refused(image)


@pytest.mark.parametrize("name", ["pstree.img", "files.img", CORE, MM, PAGEMAP, "pages-1.img"])
def test_a_file_that_is_missing_or_cut_off_anywhere(image: Path, name: str) -> None:
    """At every length up to some: at the end of a message, what is left may be a smaller image that is sound."""
    data = (image / name).read_bytes()
    places = {8}
    while name != "pages-1.img" and max(places) < len(data):
        last = max(places)
        places.add(last + 4 + struct.unpack_from("<I", data, last)[0])
    for size in range(0, len(data), 1 + len(data) // 61):
        if size not in places:
            (image / name).write_bytes(data[:size])
            assert name in refused(image)
    (image / name).unlink()
    missing = refused(image)
    assert name in missing
    assert ("no image: it has no" if name == "pstree.img" else "No such file") in missing


@pytest.mark.parametrize("name", ["pstree.img", "files.img", CORE, MM, PAGEMAP])
@pytest.mark.parametrize("length", [1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_length_that_lies(image: Path, name: str, length: int) -> None:
    data = (image / name).read_bytes()
    (image / name).write_bytes(data[:8] + struct.pack("<I", length) + data[12:])
    assert name in refused(image)


@pytest.mark.parametrize("name", ["pstree.img", "files.img", CORE, MM, PAGEMAP])
def test_a_file_of_another_kind(image: Path, name: str) -> None:
    shutil.copy(image / "inventory.img", image / name)
    assert "magic number" in refused(image)


def test_a_sparse_file_of_a_terabyte_costs_nothing(image: Path) -> None:
    for name in ("files.img", MM):
        os.truncate(image / name, 1 << 40)
    assert "larger than" in refused(image)


@pytest.mark.parametrize("magic", [PSTREE_MAGIC, FILES_MAGIC])
def test_millions_of_messages(image: Path, magic: int) -> None:
    name = {PSTREE_MAGIC: "pstree.img", FILES_MAGIC: "files.img"}[magic]
    (image / name).write_bytes(packed(magic, []) + bytes(4) * 3_000_000)
    problem = refused(image)
    assert f"more than {MAX_MESSAGES}" in problem or "not possible" in problem


@pytest.mark.parametrize(
    ("name", "magic", "what", "why"),
    [
        (MM, MM_MAGIC, b"\x72\0", "more than 524288 fields"),  # VMAs
        (CORE, CORE_MAGIC, b"\x1a\0", "more than 524288 fields"),
        (CORE, CORE_MAGIC, b"\x0b\x0c", "cannot be decoded"),  # groups
        ("pstree.img", PSTREE_MAGIC, b"\x28\x05", "more than 65536 tasks"),
        ("files.img", FILES_MAGIC, b"\x1a\x02\x58\x01", "build-id is too long"),
    ],
)
def test_a_message_of_millions_of_fields(image: Path, name: str, magic: int, what: bytes, why: str) -> None:
    """Each of two bytes, of which decoding makes a hundred."""
    (image / name).write_bytes(packed(magic, [what * 20_000_000]))
    assert why in refused(image)


def test_a_thread_with_millions_of_signal_actions(image: Path) -> None:
    task = b"\x7a\0" * 20_000_000
    size = b"\x80\xb4\x89\x13"
    (image / CORE).write_bytes(packed(CORE_MAGIC, [b"\x1a" + size + task]))
    assert "more than 524288 fields" in refused(image)


def test_two_files_of_one_number(image: Path) -> None:
    def repeat(messages: list[Message]) -> None:
        messages.append(FileEntry(type=1, id=messages[0].id, reg={"id": messages[0].id, "name": b"/bin/true"}))

    changed(image, "files.img", FILES_MAGIC, repeat, FileEntry)
    assert "two files have the number 1" in refused(image)


def test_two_memfds_of_one_number(image: Path) -> None:
    memfds = [MemfdInodeEntry(name=name, shmid=shmid, inode_id=7) for name, shmid in ((b"one", 1), (b"two", SHARED_ID))]
    (image / "memfd.img").write_bytes(packed(0x48453499, memfds))
    assert "two files have the number 7" in refused(image)


@pytest.mark.parametrize("name", [CORE, MM])
def test_two_messages_where_one_belongs(image: Path, name: str) -> None:
    data = (image / name).read_bytes()
    (image / name).write_bytes(data + data[8:])
    assert "more than 1 message" in refused(image)
    (image / name).write_bytes(data[:8])
    assert "no message" in refused(image)


# Trees and threads.


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        ([], "no process"),
        ([], "no process"),
        ([PstreeEntry(pid=ZOMBIE_PID)], "no process in it is alive"),
        ([PstreeEntry(pid=0, threads=[0])], "not possible"),
        ([PstreeEntry(pid=1 << 31, threads=[1 << 31])], "not possible"),
        ([PstreeEntry(pid=ROOT_PID, threads=[ROOT_PID, ROOT_PID])], "twice"),
        ([PstreeEntry(pid=ROOT_PID, threads=[ROOT_PID, ROOT_PID + 1, ROOT_PID + 1])], "twice"),
        ([PstreeEntry(pid=ROOT_PID, threads=[ROOT_PID, 1 << 23])], "not possible"),
        ([PstreeEntry(pid=ROOT_PID, threads=[ROOT_PID])] * 2, "not there"),
        ([PstreeEntry(pid=ROOT_PID, threads=[ROOT_PID]), PstreeEntry(pid=ROOT_PID, ppid=ROOT_PID)], "twice"),
        (
            [
                PstreeEntry(pid=ROOT_PID, threads=[ROOT_PID, ROOT_PID + 1]),
                PstreeEntry(pid=CHILD_PID, ppid=ROOT_PID, threads=[CHILD_PID, ROOT_PID + 1]),
            ],
            "twice",
        ),
        (
            [
                PstreeEntry(pid=ROOT_PID, threads=[ROOT_PID]),
                PstreeEntry(pid=CHILD_PID, ppid=CHILD_PID, threads=[CHILD_PID]),
            ],
            "not there",
        ),
        ([PstreeEntry(pid=ROOT_PID, threads=[ROOT_PID, 99])], "core-99.img: No such file"),
        ([PstreeEntry(pid=ROOT_PID, threads=range(ROOT_PID, ROOT_PID + 1_000_000))], "tasks"),
    ],
)
def test_a_tree_that_is_not_possible(image: Path, tree: list[Message], why: str) -> None:
    (image / "pstree.img").write_bytes(packed(PSTREE_MAGIC, tree))
    assert why in refused(image)


def test_a_container_s_process_1(tmp_path: Path) -> None:
    image = build_image()
    image.processes, image.zombies = image.processes[:1], []
    root = image.processes[0]
    root.pid, root.tids = 1, [1, 2, 3]
    with Image(image.write(tmp_path / "image")) as opened:
        assert [process.pid for process in opened.processes] == [1]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda core: core.ClearField("tc"), "lacks the task's part"),
        (lambda core: core.ClearField("thread_info"), "not of an x86-64 thread"),
        (lambda core: setattr(core, "mtype", 3), "not of an x86-64 thread"),
        (lambda core: core.tc.sigactions.pop(), "61 signal actions"),
        (lambda core: core.tc.sigactions.extend(list(core.tc.sigactions)), "124 signal actions"),
    ],
)
def test_a_core_that_lacks_something(image: Path, change: Callable[[Message], object], why: str) -> None:
    from dynacut.offline.images.schema import CoreEntry

    changed(image, CORE, CORE_MAGIC, lambda messages: change(messages[0]), CoreEntry)
    assert why in refused(image)


@pytest.mark.parametrize("name", [b"\x1b[2Jhi\n", b"\xff\xfe", b"x" * 300, b"x" * 1_000_000, b"../..", b"\0", b""])
def test_names_do_nothing(tmp_path: Path, name: bytes) -> None:
    image = build_image()
    image.processes[0].name = name
    with Image(image.write(tmp_path / "image")) as opened, pytest.raises(DynacutError) as caught:
        look(opened)
        opened.processes[0].read(0, 1)
    assert caught.value.problem.isprintable()


# VMAs.


@pytest.mark.parametrize(
    ("new", "why"),
    [
        (vma(HEAP + 1, 1, 3, 0x22, 0x200), "no range of pages"),
        (vma(HEAP, 0, 3, 0x22, 0x200), "no range of pages"),
        (vma(1 << 46, (1 << 34) + 1, 3, 0x22, 0x200), "outside of user space"),
        (vma(VSYSCALL - PAGE_SIZE, 1, 3, 0x22, 0x200), "outside of user space"),
        (vma(HEAP, 1, 3, 0x22, 0x200), "overlap or do not ascend"),
        (vma(BASE - PAGE_SIZE, 1, 3, 0x22, 0x200), "overlap or do not ascend"),
        (vma(1 << 46, 1, 3, 2, 0x40, shmid=99), "maps file 99"),
        (vma(1 << 46, 1, 3, 2, 0x40, shmid=1, pgoff=5), "amid a page"),
        (vma(1 << 46, 1, 3, 2, 0x40, shmid=1, pgoff=(1 << 64) - PAGE_SIZE), "behind any file's end"),
        (vma(1 << 46, 1, 3, 1, 0x100, shmid=SHARED_ID, pgoff=1 << 63), "behind any file's end"),
    ],
)
def test_a_vma_that_is_not_possible(image: Path, new: Message, why: str) -> None:
    assert why in refused(with_vmas(image, lambda vmas: vmas.append(new)))


def test_a_vma_of_64_tib_is_only_as_large_as_what_is_read(tmp_path: Path, built_image: BuiltImage) -> None:
    """The stack, so that a change looks for return addresses in it, and the arguments lie at its end."""
    root = built_image.processes[0]
    root.vmas.insert(0, vma(PAGE_SIZE * 16, (1 << 46) // PAGE_SIZE - 16, 7, 0x22, 0x200))
    with limited_memory(), Image(built_image.write(tmp_path / "image")) as image:
        look(image)
        process = image.processes[0]
        assert process.read(1 << 40, 10) == bytes(10)
        with pytest.raises(DynacutError, match="more than is read at once"):
            process.read(1 << 40, 1 << 40)
        process.write(1 << 40, b"x")
        process.memory.unmap(1 << 41, 1 << 42)
        write_image(image, tmp_path / "new", flat=False, extra={})
    with Image(tmp_path / "new") as image:
        assert image.processes[0].read(1 << 40, 1) == b"x"
        assert image.processes[0].memory.vma_at(1 << 41) is None


def test_pages_outside_of_all_vmas(image: Path) -> None:
    def without_heap(vmas: Message) -> None:
        (index,) = [index for index, each in enumerate(vmas) if each.start == HEAP]
        del vmas[index]

    assert f"the page at {HEAP:#x} lies in no VMA" in refused(with_vmas(image, without_heap))


def test_pages_that_are_neither_private_nor_shared_are_kept(tmp_path: Path, built_image: BuiltImage) -> None:
    """Such as those of a ring for asynchronous I/O."""
    root = built_image.processes[0]
    (ring,) = [each for each in root.vmas if each.start == ANONYMOUS]
    ring.status = 1 << 13
    with Image(built_image.write(tmp_path / "image")) as image:
        expected = memory_of(image.processes[0])
        image.processes[0].memory.vmas_changed = True
        write_image(image, tmp_path / "new", flat=True, extra={})
    with Image(tmp_path / "new") as image:
        assert memory_of(image.processes[0]) == expected


# Mapped files.


def with_file(image: Path, **fields: object) -> Path:
    """Changes the entry of the program's file."""

    def change(messages: list[Message]) -> None:
        for name, value in fields.items():
            setattr(messages[0].reg, name, value)

    return changed(image, "files.img", FILES_MAGIC, change, FileEntry)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (b"/nowhere/to/be\x1b[2J/found", r"/nowhere/to/be\x1b[2J/found, which the image maps, cannot be read"),
        (b"/dev/zero", "not a regular file"),
        (b"/tmp", "not a regular file"),
        (b"/etc/passwd", "is not the file that the image maps"),
        (b"/" + b"x" * 5000, "cannot be read: File name too long"),
        (b"\xff", "cannot be read"),
    ],
)
def test_a_mapped_file_that_is_not_there(image: Path, name: bytes, why: str) -> None:
    """The image can be looked at all the same."""
    with Image(with_file(image, name=name)) as opened:
        look(opened)
        with pytest.raises(DynacutError) as caught:
            opened.processes[0].read(BASE, 4)
        assert why in caught.value.problem and caught.value.problem.isprintable()


def test_a_null_byte_in_a_path(image: Path) -> None:
    assert "null byte" in refused(with_file(image, name=b"/usr/bin\0/x"))


def test_a_file_of_another_size(image: Path) -> None:
    with Image(with_file(image, size=1 << 63)) as opened, pytest.raises(DynacutError, match="instead of"):
        opened.processes[0].read(BASE, 4)


def test_a_file_of_another_build_id_is_not_patched(image: Path) -> None:
    def change(messages: list[Message]) -> None:
        messages[0].reg.build_id[1] ^= 1

    changed(image, "files.img", FILES_MAGIC, change, FileEntry)
    with Image(image) as opened, pytest.raises(DynacutError, match="the image was made with"):
        opened.processes[0].check_file(BASE)
