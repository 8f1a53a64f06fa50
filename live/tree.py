"""A process with its descendants, for programs that work in several processes: a master and its workers."""

from __future__ import annotations

import os

from dynacut.shared.errors import DynacutError, shortened
from dynacut.shared.proc import start_time, tree_of
from dynacut.shared.running import gone


def descendants(pid: int) -> list[int]:
    """The process and all that descend from it, parents before children.

    A parent is patched before its children: what it forks from then on inherits the patch. This process is left out.

    Raises:
        DynacutError: there is no such process.
    """
    try:
        start_time(pid)
    except OSError:
        raise gone(pid) from None
    return [pid, *(each for each in tree_of(pid)[1:] if each != os.getpid())]


def by_name(name: str) -> int:
    """The one process of a name: its command (comm), or the file name of its argv[0] or executable.

    Of a tree in which several processes have the name, its root.

    Raises:
        DynacutError: there is none, or several that are not of one tree; they are listed.
    """
    import psutil  # takes 25 ms, which a command for one pid need not spend

    matches: dict[int, tuple[int, str]] = {}
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            with process.oneshot():
                line = process.cmdline()
                called = line[0].split()[0].rstrip(":").rpartition("/")[2] if line and line[0].split() else ""
                names = {process.name(), called}
                if line:  # kernel threads and zombies have none
                    names.add(process.exe().rpartition("/")[2])
                if name in names and line:
                    matches[process.pid] = (process.ppid(), shortened(" ".join(line).strip()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    roots = [pid for pid, (parent, _) in matches.items() if parent not in matches]
    if len(roots) == 1:
        return roots[0]
    if not roots:
        raise DynacutError(f"no process is called {name!r}", "`ps -e` lists the processes; use --pid")
    raise DynacutError(
        f"several processes are called {name!r}",
        "use --pid with one of them",
        details=[f"{pid} ({matches[pid][1]})" for pid in roots],
    )
