"""Whether a process tree can be dumped: every reason against it that can be seen is named before it is frozen."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dynacut.offline import processes
from dynacut.shared.address_space import shares_memory
from dynacut.shared.errors import DynacutError
from dynacut.shared.proc import TaskStatus, task_status, tree_of
from dynacut.shared.running import program_status
from dynacut.shared.target import SIGTRAP

_CAP_SYS_RESOURCE = 24
"""The kernel's include/uapi/linux/capability.h."""


def admit(pid: int) -> list[int]:
    """The processes of the tree that begins with a process, the root first.

    Raises:
        DynacutError: CRIU could not dump it; nothing has been touched.
    """
    status = program_status(pid)
    label = processes.described(pid)
    tree = tree_of(pid)
    if os.getpid() in tree:
        raise DynacutError(f"dynacut descends from {label} and would be frozen with it", "start it from elsewhere")
    _check_namespace(pid, label)
    for member in tree:
        _check_session(member, tree)
        _check_process(member, status.ppid if member == pid else None)
    return tree


def _check_namespace(pid: int, label: str) -> None:
    if _namespace(pid) != _namespace("self"):
        raise DynacutError(
            f"{label} lives in a container: in another pid namespace",
            "let the container's runtime make the checkpoint, such as `podman container checkpoint`",
        )


def _namespace(pid: int | str) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError as error:
        problem = f"process {pid} cannot be looked at: {error.strerror}"
        raise DynacutError(problem, "see whether it still runs") from None


def _check_session(pid: int, tree: Sequence[int]) -> None:
    """CRIU makes sessions anew on restore and needs the leader's pid; one from outside has none in this namespace.

    Another session than the root's whose leader is not in the tree is made by a helper, which ends (prepare_pstree_ids
    in criu/pstree.c): its processes would then be children of whoever restores, and their parent would not have them.
    """
    try:
        session = os.getsid(pid)
        own = os.getsid(tree[0])
    except OSError:
        return  # it has ended meanwhile
    if session == 0:
        raise DynacutError(
            f"{processes.described(pid)} belongs to a session that was begun outside of its pid namespace, which CRIU "
            "cannot dump",
            "start the program in a session of its own, by `setsid`; or patch it by `dynacut live`",
        )
    if session != own and session not in tree:
        raise DynacutError(
            f"{processes.described(pid)} belongs to a session whose leader, process {session}, has ended: a restore "
            "would take it away from its parent",
            "give the process itself by --pid; or patch it by `dynacut live --tree`",
        )


def _check_process(pid: int, outer_parent: int | None) -> None:
    """Checks one process. outer_parent: of the root of the tree."""
    try:
        status = task_status(pid)
    except OSError:
        return  # it has ended meanwhile
    if status.has_ended:
        return  # CRIU dumps zombies
    label = processes.described(pid)
    parent = status.ppid if outer_parent is None else outer_parent
    if parent and shares_memory(pid, parent):
        raise DynacutError(
            f"{processes.described(parent)} has just started {label} by vfork, and CRIU cannot dump the two meanwhile",
            "try again: this takes an instant as a rule",
        )
    _check_limits_access(label, status)
    for tid in processes.threads_of(pid):
        _check_thread(pid, tid, label)


def _check_thread(pid: int, tid: int, label: str) -> None:
    try:
        status = task_status(pid, tid)
    except OSError:
        return
    if status.tracer:
        raise DynacutError(
            f"{label} is traced by {processes.described(status.tracer)}", "end that debugger or tracer first"
        )
    pending = status.thread_pending | status.shared_pending
    if pending >> (SIGTRAP - 1) & 1:
        raise DynacutError(
            f"a SIGTRAP waits for thread {tid} of {label}, which CRIU cannot dump",
            "see why the thread blocks the signal: `grep Sig /proc/PID/status`",
        )


def _check_limits_access(label: str, status: TaskStatus) -> None:
    """CRIU reads resource limits by prlimit(2), which asks for the same ids or for CAP_SYS_RESOURCE."""
    if _has_capability(_CAP_SYS_RESOURCE):
        return
    for kind, ids, mine in (("uid", status.uids, os.getuid()), ("gid", status.gids, os.getgid())):
        others = set(ids[:3]) - {mine}
        if others:
            raise DynacutError(
                f"{label} runs as {kind} {min(others)}, and dynacut lacks CAP_SYS_RESOURCE, without which CRIU "
                "can dump processes of its own user only",
                "run dynacut with this capability, outside of the container; or patch the process by `dynacut live`",
            )


def _has_capability(number: int) -> bool:
    return bool(task_status(os.getpid()).capabilities >> number & 1)
