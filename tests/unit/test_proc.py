"""What /proc tells, where names and paths are chosen to mislead: only a line feed is escaped there."""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
import subprocess
from pathlib import Path

import pytest

from dynacut.shared.proc import read_mappings, task_status, tree_of

_PR_SET_NAME = 15


@pytest.mark.parametrize("name", [b"a\rb", b"a\x0bb", b"a\x0cb", b"a b", b"end\r"])
def test_a_path_with_an_end_of_line_is_one_mapping(tmp_path: Path, name: bytes) -> None:
    path = os.fsencode(tmp_path) + b"/" + name + b" 00400000-00500000 r-xp 00000000 00:00 1"
    Path(os.fsdecode(path)).write_bytes(bytes(4096))
    with Path(os.fsdecode(path)).open("rb") as file, mmap.mmap(file.fileno(), 4096, access=mmap.ACCESS_READ):
        found = [mapping.path for mapping in read_mappings(os.getpid())]
    assert os.fsdecode(path) in found


@pytest.mark.parametrize("ending", [b"\x0c", b"\r", b"\x1c"])
def test_a_process_cannot_name_itself_a_zombie(ending: bytes) -> None:
    name = b"x" + ending + b"State:Z"
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name, 0, 0, 0)
        os.kill(os.getpid(), 19)  # SIGSTOP
        os._exit(0)
    try:
        os.waitpid(child, os.WUNTRACED)
        assert task_status(child).state == "T"
        assert task_status(child).name == name.decode()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_tree_has_zombies_and_each_parent_before_its_children() -> None:
    inner = "sleep 60 >&- & echo grandchild $!; exec sleep 60 >&-"
    outer = f"sleep 60 >&- & sh -c '{inner}' & echo child $!; exec sleep 60 >&-"
    with subprocess.Popen(["sh", "-c", outer], stdout=subprocess.PIPE, start_new_session=True) as root:
        try:
            assert root.stdout is not None
            told = dict(line.split() for line in root.stdout)  # to its end: all are `sleep` now, which reaps nobody
            child, grandchild = int(told[b"child"]), int(told[b"grandchild"])
            ending = os.pidfd_open(grandchild)
            os.kill(grandchild, signal.SIGKILL)
            select.select([ending], [], [])
            os.close(ending)
            assert task_status(grandchild).has_ended
            tree = tree_of(root.pid)
            assert tree[0] == root.pid and len(tree) == 4
            assert 0 < tree.index(child) < tree.index(grandchild)
            assert set(tree) < set(tree_of(os.getpid()))
        finally:
            os.killpg(root.pid, signal.SIGKILL)
    assert tree_of(root.pid) == [root.pid]
