"""An image directory: the process tree that `criu dump` wrote."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from dynacut.offline.images.files import ImageFolder
from dynacut.offline.images.memory import ImageFile
from dynacut.offline.images.pages import pages_ids
from dynacut.offline.images.process import ImageProcess
from dynacut.offline.images.schema import FileEntry, MemfdInodeEntry, PstreeEntry
from dynacut.shared.errors import DynacutError

_PSTREE_MAGIC, _FILES_MAGIC, _MEMFD_MAGIC = 0x50273030, 0x56303138, 0x48453499
_MAX_PID = 1 << 22
_MAX_TASKS = 1 << 16


class Image:
    """An image, opened: its processes, the root of the tree first. Use as a context manager or close() it.

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
            for pid, tids in self._tree():
                self.processes.append(ImageProcess(self.folder, pid, tids, files.get, root))
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
        files = {}
        memfds = self._memfds()
        for entry in self.folder.parse("files.img", _FILES_MAGIC, FileEntry):
            if entry.HasField("reg"):
                name = bytes(entry.reg.name)
                if b"\0" in name:
                    raise self.folder.broken("files.img", "a file's name has a null byte")
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
        entries = self.folder.parse("memfd.img", _MEMFD_MAGIC, MemfdInodeEntry)
        return {
            int(entry.inode_id): ImageFile(f"/memfd:{os.fsdecode(bytes(entry.name))}", 0, b"", int(entry.shmid))
            for entry in entries
        }

    def _tree(self) -> list[tuple[int, list[int]]]:
        """The pid and the threads of every process that is alive."""
        tree: list[tuple[int, list[int]]] = []
        seen: set[int] = set()
        for entry in self.folder.parse("pstree.img", _PSTREE_MAGIC, PstreeEntry):
            pid, tids = int(entry.pid), [int(tid) for tid in entry.threads]
            if tree and entry.ppid not in seen:
                raise self.folder.broken(
                    "pstree.img", f"process {pid} is the child of {entry.ppid}, which is not there"
                )
            if not all(0 < tid < _MAX_PID for tid in (pid, *tids)) or seen.intersection(tids) or pid in seen:
                raise self.folder.broken("pstree.img", f"process {pid}: an id is not possible, or occurs twice")
            if len(set(tids)) != len(tids) or (tids and pid not in tids):
                raise self.folder.broken("pstree.img", f"process {pid}: its threads do not fit it")
            seen |= {pid, *tids}
            if len(seen) > _MAX_TASKS:
                raise self.folder.broken("pstree.img", f"more than {_MAX_TASKS} tasks")
            if tids:  # a zombie has none, and nothing to patch
                tree.append((pid, tids))
        if not tree:
            raise DynacutError(f"{self.path / 'pstree.img'}: no process in it", "make a new image")
        return tree


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
