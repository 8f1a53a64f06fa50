"""The process tree of an image, pstree.img: which processes and threads there are, and which of them are zombies."""

from __future__ import annotations

from dataclasses import dataclass

from dynacut.offline.images.files import ImageFolder
from dynacut.offline.images.schema import CoreEntry, Message, PstreeEntry

CORE_MAGIC = 0x55053847
_PSTREE_MAGIC = 0x50273030
_MAX_PID = 1 << 22
_MAX_TASKS = 1 << 16
_TC = CoreEntry.DESCRIPTOR.fields_by_name["tc"].number
_DEAD = 2
"""The state of a zombie, CRIU's compel/include/uapi/task-state.h."""


@dataclass(frozen=True)
class Task:
    """A process, zombies too. tids: its threads, the first one, which has the process's id, at the head."""

    pid: int
    session: int
    tids: tuple[int, ...]


def read_tree(folder: ImageFolder) -> list[Task]:
    """The processes of an image, the root first, parents before their children.

    Of the first thread CRIU reads the process's id only (read_one_pstree_item in criu/pstree.c), and of a zombie it
    writes whatever lay in its memory there (collect_threads in criu/seize.c).

    Raises:
        DynacutError: there is none, or the ids are not possible.
    """
    tree: list[Task] = []
    pids: set[int] = set()
    seen: set[int] = set()
    for entry in folder.parse("pstree.img", _PSTREE_MAGIC, PstreeEntry):
        pid = int(entry.pid)
        if len(entry.threads) > _MAX_TASKS:
            raise folder.broken("pstree.img", f"more than {_MAX_TASKS} tasks")
        tids = (pid, *map(int, entry.threads[1:]))
        if tree and entry.ppid not in pids:
            raise folder.broken("pstree.img", f"process {pid} is the child of {entry.ppid}, which is not there")
        if not all(0 < tid < _MAX_PID for tid in tids) or len(set(tids)) != len(tids) or seen.intersection(tids):
            raise folder.broken("pstree.img", f"process {pid}: an id is not possible, or occurs twice")
        pids.add(pid)
        seen.update(tids)
        if len(seen) > _MAX_TASKS:
            raise folder.broken("pstree.img", f"more than {_MAX_TASKS} tasks")
        tree.append(Task(pid, int(entry.sid), tids))
    if not tree:
        raise folder.broken("pstree.img", "there is no process in it")
    return tree


def is_zombie(folder: ImageFolder, task: Task) -> bool:
    """Whether a process had ended, and is there for its parent to ask how only: it has neither threads nor memory.

    Raises:
        DynacutError: its core image is missing or malformed.
    """
    return bool(read_core(folder, task.pid).tc.task_state == _DEAD)


def read_core(folder: ImageFolder, tid: int) -> Message:
    """What is kept of a thread alone.

    Raises:
        DynacutError: the image file is missing or malformed.
    """
    return folder.parse_one(f"core-{tid}.img", CORE_MAGIC, CoreEntry, within=_TC)
