"""Making a checkpoint: a process with its descendants, dumped by CRIU into a directory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from dynacut.offline import processes
from dynacut.offline.criu import Criu, CriuRun, find_criu
from dynacut.offline.criu_options import RECORD_NAME, CriuOptions, Record
from dynacut.offline.dumpable import admit
from dynacut.offline.stats import DumpStats, read_dump_stats
from dynacut.offline.wanted_options import Wanted, look
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.private_folder import private_folder
from dynacut.shared.proc import resident_bytes, task_status, tree_of

Progress = Callable[[str], None]
"""Is told in a few words what is being done."""

LOG_NAME = "dump.log"
_IN_FLIGHT = "In-flight connection"
_IN_FLIGHT_TRIES = 4
_REAP_TIMEOUT = 5.0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was made.

    pids: all processes in it, the root first. frozen_us: how long they stood still, in microseconds. dumped_bytes:
    memory that was written. size_bytes: of all files of the image. criu_ms, wall_ms: how long the dump, and all of it,
    took. remaining: pids that are still there as zombies, because their parent has not reaped them; as long as they
    are, the image cannot be restored.
    """

    directory: Path
    pids: tuple[int, ...]
    exe: str
    options: CriuOptions
    left_running: bool
    frozen_us: int
    dumped_bytes: int
    size_bytes: int
    criu_ms: float
    wall_ms: float
    remaining: tuple[int, ...]
    warnings: tuple[str, ...]

    @property
    def pid(self) -> int:
        """The root of the tree."""
        return self.pids[0]


def checkpoint(
    pid: int,
    directory: Path,
    *,
    leave_running: bool = False,
    criu: Criu | None = None,
    timeout: float | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Dumps a process and its descendants into a new or empty directory.

    leave_running: they go on afterwards; else they are gone, and their pids free, when this returns. timeout: seconds
    in which they must be frozen, by default CRIU's own 10. From then on the dump is finished, whatever it takes and
    also when interrupted: half of one would leave connections blocked. Call processes.become_subreaper() before
    starting a service that is to be checkpointed and restored by the same program.

    Raises:
        DynacutError: it cannot be dumped, or the dump failed; the processes run on, and the directory holds no image.
            Its status is UNKNOWN where the processes were lost.
    """
    started = time.perf_counter()
    tell = progress or (lambda _: None)
    processes.require_root("a checkpoint")
    criu = criu or find_criu()
    tell("looking at the process")
    pids = admit(pid)
    wanted = look(pids)
    exe = processes.exe_of(pid)
    began = {member: processes.start_time(member) for member in pids}
    _prepare(directory)
    warnings = [*wanted.warnings, *_lock_warnings(criu, wanted.options)]
    run = _dump(criu, pid, directory, wanted, warnings, leave_running=leave_running, timeout=timeout, tell=tell)
    if not run.succeeded:
        _clear(directory)
        raise _failure(run, pid, began[pid], directory)
    remaining: list[int] = []
    if not leave_running:
        tell("waiting for the processes to be gone")
        remaining = processes.wait_until_gone(began, _REAP_TIMEOUT)
        warnings += map(_remains, remaining)
    stats = read_dump_stats(directory / "stats-dump") or DumpStats(0, 0)
    return Checkpoint(
        directory=directory,
        pids=tuple(pids),
        exe=exe,
        options=wanted.options,
        left_running=leave_running,
        frozen_us=stats.frozen_us,
        dumped_bytes=stats.dumped_bytes,
        size_bytes=size_of(directory),
        criu_ms=run.wall_ms,
        wall_ms=(time.perf_counter() - started) * 1000,
        remaining=tuple(remaining),
        warnings=tuple(warnings),
    )


def _dump(
    criu: Criu,
    pid: int,
    directory: Path,
    wanted: Wanted,
    warnings: list[str],
    *,
    leave_running: bool,
    timeout: float | None,
    tell: Progress,
) -> CriuRun:
    """Dumps; again while connections wait in the backlog, which CRIU does not dump."""
    resident = sum(map(_resident, tree_of(pid)))
    # Where nothing is to be kept away, the lock would be a rule in the firewall until the restore, for nothing.
    lock = criu.network_lock if wanted.options.tcp_established else "skip"
    arguments = ["-t", str(pid), "--network-lock", lock, *wanted.options.arguments(), *wanted.for_dump]
    if timeout is not None:
        arguments += ["--timeout", str(max(1, ceil(timeout)))]
    if leave_running:
        arguments.append("--leave-running")
    for attempt in range(_IN_FLIGHT_TRIES):
        last = attempt == _IN_FLIGHT_TRIES - 1
        if last:
            arguments.append("--skip-in-flight")
            warnings.append("connections that the process had not yet accepted are not in the image")
        _record(directory, wanted.options)
        tell("dumping")
        run = criu.run(
            "dump",
            directory,
            arguments,
            log=directory / LOG_NAME,
            timeout=None,
            on_wait=lambda: tell(f"dumping: {size_of(directory) >> 20} of at most {resident >> 20} MiB"),
        )
        if run.succeeded or last or not run.says(_IN_FLIGHT):
            return run
        _clear(directory)
    raise AssertionError("the last attempt returns")


def _record(directory: Path, options: CriuOptions) -> None:
    """Writes dynacut.json, before the dump: a disk that is full afterwards must not fail what has ended the process."""
    try:
        (directory / RECORD_NAME).write_bytes(Record(options).packed())
    except OSError as error:
        raise DynacutError(
            f"{directory / RECORD_NAME} cannot be written: {error.strerror}", "check the folder and its space"
        ) from None


def size_of(directory: Path) -> int:
    """The bytes of all files of an image directory."""
    return sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(directory) if entry.is_file())


def _prepare(directory: Path) -> None:
    """Makes the directory. What is in an image is as secret as the memory of the process."""
    advice = "give a new or empty directory"
    is_new = private_folder(directory, advice, "change the image")
    if not is_new and any(entry.name != LOG_NAME for entry in directory.iterdir()):
        raise DynacutError(f"{directory} is not empty", advice)


def _clear(directory: Path) -> None:
    """Removes half an image, which nobody should restore; the log stays."""
    for entry in directory.iterdir():
        if entry.name != LOG_NAME:
            entry.unlink()


def _lock_warnings(criu: Criu, options: CriuOptions) -> list[str]:
    if options.tcp_established and criu.network_lock == "skip":
        return ["this machine has neither nftables nor iptables: open connections may break during the dump"]
    return []


def _remains(pid: int) -> str:
    try:
        parent = task_status(pid).ppid
    except OSError:
        return f"process {pid} took long to end"
    return (
        f"{processes.described(pid)} is left, because its parent, {processes.described(parent)}, has not reaped it: "
        "the image cannot be restored until it does, or ends"
    )


def _resident(pid: int) -> int:
    """Bytes of memory."""
    try:
        return resident_bytes(pid)
    except OSError:
        return 0


def _failure(run: CriuRun, pid: int, began: int | None, directory: Path) -> DynacutError:
    details = run.errors
    log = directory / LOG_NAME
    if processes.start_time(pid) != began or task_status(pid).state in "ZXTt":
        return DynacutError(
            f"the dump of process {pid} failed, and the process no longer runs as before",
            f"see {log}; start the service again",
            details=details,
            status=ExitStatus.UNKNOWN,
        )
    problem = f"CRIU cannot dump process {pid}, which runs on as before"
    return DynacutError(problem, f"see {log}", details=details or ("it says nothing",))
