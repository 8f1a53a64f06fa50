"""What a process tree needs of CRIU to be dumped, found by looking at its open files, locks and sockets."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dynacut.offline import processes
from dynacut.offline.criu_options import CriuOptions
from dynacut.offline.sockets import has_tcp_sockets, unix_sockets
from dynacut.shared.errors import DynacutError, shortened

_GHOST_LIMIT = 1 << 20
"""CRIU's own limit for deleted files that it takes into the image, in bytes."""
_UNSUPPORTED = {
    "anon_inode:[io_uring]": "an io_uring instance",
    "anon_inode:[perf_event]": "a perf event",
    "anon_inode:[userfaultfd]": "a userfaultfd",
    "anon_inode:kvm-vm": "a virtual machine",
}
"""Open files that CRIU has no image for."""
_O_WRONLY, _O_RDWR = 1, 2


@dataclass(frozen=True)
class OpenFile:
    """link: where /proc/PID/fd/N leads, such as socket:[INODE]."""

    pid: int
    number: int
    link: str

    @property
    def inode(self) -> int:
        """Of a socket or pipe."""
        return int(self.link.partition("[")[2].rstrip("]"))

    def information(self) -> str:
        """The lines of its fdinfo (proc_pid_fdinfo(5)); none if it was closed meanwhile."""
        try:
            return Path(f"/proc/{self.pid}/fdinfo/{self.number}").read_text()
        except OSError:
            return ""

    @property
    def access(self) -> int:
        """O_RDONLY, O_WRONLY or O_RDWR."""
        _, _, flags = self.information().partition("flags:\t")
        return int(flags.split("\n")[0] or "0", 8) & (_O_WRONLY | _O_RDWR)


@dataclass(frozen=True)
class Wanted:
    """options: also for the restore. for_dump: further arguments of criu dump. warnings: what will not be as before."""

    options: CriuOptions
    for_dump: tuple[str, ...]
    warnings: tuple[str, ...]


def look(pids: Sequence[int]) -> Wanted:
    """What a tree needs; pids: its processes, the root first.

    Raises:
        DynacutError: something is open that CRIU cannot dump.
    """
    files = [file for pid in pids for file in _open_files(pid)]
    for file in files:
        if file.link in _UNSUPPORTED:
            raise DynacutError(
                f"{processes.described(file.pid)} has {_UNSUPPORTED[file.link]} open (descriptor {file.number}), "
                "which CRIU cannot dump",
                "configure the program not to use it",
            )
    sockets = {file.inode: file for file in files if file.link.startswith("socket:[")}
    options = CriuOptions(
        # Also for a socket that only listens: a client may connect between this look and the freeze.
        tcp_established=bool(sockets) and has_tcp_sockets(pids[0], set(sockets)),
        file_locks=_has_locks(files),
        ext_unix_sk=bool(sockets) and _talks_to_others(sockets),
        shell_job=os.getsid(pids[0]) != pids[0],
    )
    ghosts = _largest_deleted(pids, files)
    for_dump = ("--ghost-limit", str(ghosts)) if ghosts > _GHOST_LIMIT else ()
    return Wanted(options, for_dump, tuple(_half_pipes(files)))


def _open_files(pid: int) -> list[OpenFile]:
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                found.append(OpenFile(pid, int(entry.name), str(Path(entry.path).readlink())))
    return found


def _has_locks(files: Sequence[OpenFile]) -> bool:
    if not Path("/proc/locks").read_bytes():
        return False
    return any(file.link.startswith("/") and "\nlock:\t" in file.information() for file in files)


def _talks_to_others(sockets: dict[int, OpenFile]) -> bool:
    """Whether unix datagram sockets are connected to sockets outside the tree.

    Raises:
        DynacutError: another kind of unix socket is, which CRIU cannot dump half of.
    """
    mine, this = (os.stat(f"/proc/{pid}/ns/net") for pid in (next(iter(sockets.values())).pid, "self"))  # noqa: PTH116
    if (mine.st_dev, mine.st_ino) != (this.st_dev, this.st_ino):
        return False  # in a network namespace of its own; CRIU will say what it needs
    known = unix_sockets()
    outside = False
    for inode, file in sockets.items():
        unix = known.get(inode)
        if unix is None or not unix.peer or unix.peer in sockets:
            continue
        if unix.kind != socket.SOCK_DGRAM:
            name = unix.name or (known[unix.peer].name if unix.peer in known else "")
            raise DynacutError(
                f"{processes.described(file.pid)} is connected to a process outside by a unix socket (descriptor "
                f"{file.number}{f', {shortened(name)}' if name else ''}), and CRIU cannot dump one half of it",
                "end that connection first",
            )
        outside = True
    return outside


def _largest_deleted(pids: Sequence[int], files: Sequence[OpenFile]) -> int:
    """The size in bytes of the largest deleted file that is open or mapped: CRIU takes them into the image."""
    paths = {f"/proc/{file.pid}/fd/{file.number}" for file in files if _is_deleted(file.link)}
    for pid in pids:
        if b" (deleted)\n" not in _read(Path(f"/proc/{pid}/maps")):
            continue
        with suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/map_files"):
                with suppress(OSError):
                    if _is_deleted(str(Path(entry.path).readlink())):
                        paths.add(entry.path)
    sizes = [0]
    for path in paths:
        with suppress(OSError):
            status = Path(path).stat()
            if stat.S_ISREG(status.st_mode):
                sizes.append(status.st_size)
    return max(sizes)


def _is_deleted(link: str) -> bool:
    return link.endswith(" (deleted)") and not link.startswith(("/memfd:", "/dev/zero", "/SYSV", "/dev/shm/"))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _half_pipes(files: Sequence[OpenFile]) -> list[str]:
    """Warnings of pipes whose other end is a process outside: it will not be there after a restore."""
    ends: dict[int, dict[int, OpenFile]] = {}
    for file in files:
        if file.link.startswith("pipe:["):
            ends.setdefault(file.inode, {})[file.access] = file
    return [
        f"descriptor {file.number} of {processes.described(file.pid)} is a pipe from or to a process outside: a "
        "restored process has nobody at its other end"
        for by_access in ends.values()
        if len(by_access) == 1 and _O_RDWR not in by_access
        for file in by_access.values()
    ]
