"""What has to be known of an image before CRIU may restore it: its tasks, the options, and that it holds together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dynacut.offline.criu_options import CriuOptions, Record, read_record
from dynacut.offline.images.files import ImageFolder
from dynacut.offline.images.pages import Pages
from dynacut.offline.images.tree import Task, read_tree
from dynacut.shared.errors import DynacutError

_EMPTY_SIZE = 8  # the two magic numbers


@dataclass(frozen=True)
class ImageTasks:
    """pids: the processes, zombies too, the root first. tids: all ids that a restore takes, those of threads included.

    size: bytes of memory in this directory. record: dynacut.json's, or what looking at the image gives.
    """

    pids: tuple[int, ...]
    tids: frozenset[int]
    size: int
    record: Record


def read_tasks(directory: Path) -> ImageTasks:
    """Reads and checks an image.

    A page marked as the parent's without a parent that has it would make CRIU search for ever, so all pagemaps are
    checked, those of the parents included.

    Raises:
        DynacutError: it is no image, or does not hold together.
    """
    folder = ImageFolder(directory)
    try:
        tree = read_tree(folder)
        tids = frozenset(tid for task in tree for tid in task.tids)
        if 1 in tids:
            raise DynacutError(
                f"{directory} is a container's image: its processes have a pid namespace of their own",
                "let the container's runtime restore it, such as `podman container restore`",
            )
        size = _checked_pages(folder)
        record = read_record(directory) or Record(_options_of(folder, tree[0]))
    finally:
        folder.close()
    return ImageTasks(tuple(task.pid for task in tree), tids, size, record)


def read_options(directory: Path) -> CriuOptions:
    """The options of an image that is known to hold together, as for read_tasks()."""
    record = read_record(directory)
    if record is not None:
        return record.options
    with ImageFolder(directory) as folder:
        return _options_of(folder, read_tree(folder)[0])


def _checked_pages(folder: ImageFolder) -> int:
    size = 0
    for name in folder.names():
        if name.startswith("pagemap-") and name.endswith(".img"):
            pages = Pages(folder, name.removeprefix("pagemap-").removesuffix(".img"))
            size += pages.size
            pages.close()
    return size


def _options_of(folder: ImageFolder, root: Task) -> CriuOptions:
    """The options of an image that `criu dump` made by hand."""
    return CriuOptions(
        tcp_established=any(name.startswith("tcp-stream-") for name in folder.names()),
        file_locks=folder.has("filelocks.img") and len(folder.read("filelocks.img")) > _EMPTY_SIZE,
        ext_unix_sk=True,  # permits them only; it does nothing to an image without
        shell_job=root.session != root.pid,
    )
