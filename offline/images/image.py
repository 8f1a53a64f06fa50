"""An image directory: the process tree that `criu dump` wrote."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from types import TracebackType

from dynacut.offline.images.files import ImageFolder
from dynacut.offline.images.memory import ImageFile
from dynacut.offline.images.pages import pages_ids
from dynacut.offline.images.process import ImageProcess
from dynacut.offline.images.schema import FileEntry, MemfdInodeEntry
from dynacut.offline.images.tree import is_zombie, read_tree
from dynacut.shared.errors import DynacutError

_FILES_MAGIC, _MEMFD_MAGIC = 0x56303138, 0x48453499
_FILES_EACH = 4
"""Open at once for a process: its pages, the programs it runs; besides, for each parent the directory and its pages."""
_SPARE_FILES = 128
_MAX_BUILD_ID = 16
"""In words of four bytes; linkers write five at most."""


class Image:
    """An image, opened: its living processes, the root of the tree first. Use as a context manager or close() it.

    depth: how many parents it has, one below the other.
    """

    def __init__(self, path: Path, root: str = "") -> None:
        """Opens and checks all of it but the pages themselves.

        root: the folder that the paths of mapped files begin in, for an image of another machine or container.

        Raises:
            DynacutError: it is no image, or does not hold together.
        """
        self.folder = ImageFolder(path)
        self.path = path
        self.processes: list[ImageProcess] = []
        try:
            if not self.folder.has("pstree.img"):
                raise DynacutError(
                    f"{path} is no image: it has no pstree.img", "give the directory that `dynacut checkpoint` wrote"
                )
            self.depth = _checked_depth(self.folder)
            files = self._files()
            tree = read_tree(self.folder)
            _make_room(len(tree) * (_FILES_EACH + 2 * self.depth))
            for task in tree:
                if not is_zombie(self.folder, task):  # which has nothing to patch
                    self.processes.append(ImageProcess(self.folder, task.pid, task.tids, files.get, root))
            if not self.processes:
                raise DynacutError(f"{path / 'pstree.img'}: no process in it is alive", "make a new image")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Image:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes all files."""
        for process in self.processes:
            process.close()
        self.folder.close()

    def _files(self) -> dict[int, ImageFile]:
        files: dict[int, ImageFile] = {}
        memfds = self._memfds()
        for entry in self.folder.parse("files.img", _FILES_MAGIC, FileEntry):
            if entry.id in files:  # CRIU would perhaps take the other one
                raise self.folder.broken("files.img", f"two files have the number {entry.id}")
            if entry.HasField("reg"):
                name = bytes(entry.reg.name)
                if b"\0" in name:
                    raise self.folder.broken("files.img", "a file's name has a null byte")
                if len(entry.reg.build_id) > _MAX_BUILD_ID:
                    raise self.folder.broken("files.img", "a file's build-id is too long")
                words = b"".join(int(word).to_bytes(4, "little") for word in entry.reg.build_id)
                path = name.decode(errors="surrogateescape")
                files[int(entry.id)] = ImageFile(path, int(entry.reg.size), words)
            elif entry.HasField("memfd") and entry.memfd.inode_id in memfds:
                files[int(entry.id)] = memfds[entry.memfd.inode_id]
        return files

    def _memfds(self) -> dict[int, ImageFile]:
        """The memfds by inode, anonymous shared memory among them."""
        if not self.folder.has("memfd.img"):
            return {}
        found: dict[int, ImageFile] = {}
        for entry in self.folder.parse("memfd.img", _MEMFD_MAGIC, MemfdInodeEntry):
            if entry.inode_id in found:
                raise self.folder.broken("memfd.img", f"two files have the number {entry.inode_id}")
            name = os.fsdecode(bytes(entry.name))
            found[int(entry.inode_id)] = ImageFile(f"/memfd:{name}", 0, b"", int(entry.shmid))
        return found


def _make_room(files: int) -> None:
    """Lets this process have so many files open: 1,024 would do for a tree of some hundred processes only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


def _checked_depth(folder: ImageFolder) -> int:
    """Checks what any use of a directory and its parents relies on; how many parents there are.

    Two pagemaps that name the same pages file would each lose it to the other's change.
    """
    pagemaps = [name for name in folder.image_names() if name.startswith("pagemap-")]
    known: dict[int, str] = {}
    for name, pages_id in pages_ids(folder, pagemaps):
        if known.setdefault(pages_id, name) != name:
            raise folder.broken(name, f"it has the same pages file as {known[pages_id]}")
    parent = folder.parent()
    if parent is None:
        return 0
    with parent:
        return 1 + _checked_depth(parent)
