"""Restoring a checkpoint, with the original image as the way back when a rewritten one cannot be restored."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from dynacut.offline import processes
from dynacut.offline.checkpoint import Progress
from dynacut.offline.criu import Criu, CriuRun, find_criu
from dynacut.offline.criu_options import read_record
from dynacut.offline.image_tasks import ImageTasks, read_tasks
from dynacut.shared.errors import DynacutError
from dynacut.shared.proc import is_alive, tree_of

_LOG_NAME = "restore.log"
_REAP_TIMEOUT = 5.0
_LEAST_TIMEOUT = 60.0
_LEAST_BYTES_PER_SECOND = 20e6
_TAKEN = ("Unable to create a thread: -17", ": File exists")
"""Errors in CRIU's log when somebody else has got an id meanwhile that the image needs; each new process gets one."""
_TRIES = 5
_ADVICE = (
    ("has bad size", "a file has changed since the dump: put it back, or make a new checkpoint"),
    ("has bad build-ID", "a program or library was replaced since the dump: put it back, or make a new checkpoint"),
    ("Address already in use", "another process uses an address of the image: end it first"),
    ("Cannot assign requested address", "a connection in the image is not over at its other end: use --tcp-close"),
    ("No such file or directory", "a file or directory that the process used is gone: put it back"),
    ("Found existing process", "end the process that has its pid first"),
    ("inherit slave", "it was dumped as a job of a shell: restore it at a terminal"),
)
"""What to do about an error in CRIU's log."""


@dataclass(frozen=True)
class Restored:
    """What was restored: the pid of its root, and how long CRIU, and all of it, took, in milliseconds.

    rolled_back_from: the image that could not be restored, where its original, directory, was; errors: why not.
    """

    pid: int
    exe: str
    directory: Path
    criu_ms: float
    wall_ms: float
    rolled_back_from: Path | None = None
    errors: tuple[str, ...] = ()


def restore(
    directory: Path,
    *,
    criu: Criu | None = None,
    timeout: float | None = None,
    rollback: bool = True,
    tcp_close: bool = False,
    progress: Progress | None = None,
) -> Restored:
    """Restores an image: the processes run again with the pids that they had, when this returns.

    timeout: seconds for CRIU; by default as the image's size needs. rollback: when it fails and dynacut.json names an
    original, restore that. tcp_close: connections in the image are restored as closed ones, for an image whose clients
    are gone, or that is restored a second time. From here on orphaned descendants of this process become its children
    (PR_SET_CHILD_SUBREAPER), the restored processes among them.

    Raises:
        DynacutError: nothing was restored, and nothing of an attempt is left.
    """
    started = time.perf_counter()
    processes.require_root("a restore")
    attempts = _Attempts(criu or find_criu(), timeout, tcp_close, progress or (lambda _: None))
    directory = directory.absolute()
    if directory.exists() and not directory.is_dir():
        raise DynacutError(f"{directory} is no directory", "give the one that `dynacut checkpoint` wrote an image to")
    processes.become_subreaper()
    rolled_back_from: Path | None = None
    errors: tuple[str, ...] = ()
    try:
        pid, criu_ms = attempts.restore(directory)
    except _PidTakenError:
        raise  # the original needs the same
    except DynacutError as error:
        record = read_record(directory) if rollback else None
        if record is None or record.original is None:
            raise
        rolled_back_from, directory = directory, directory / record.original
        errors = (error.problem, *error.details)
        pid, criu_ms = attempts.roll_back(directory, errors)
    return Restored(
        pid=pid,
        exe=processes.exe_of(pid),
        directory=directory,
        criu_ms=criu_ms,
        wall_ms=(time.perf_counter() - started) * 1000,
        rolled_back_from=rolled_back_from,
        errors=errors,
    )


class _PidTakenError(DynacutError):
    """A process has a pid of the image."""


@dataclass(frozen=True)
class _Attempts:
    """How images are restored; each attempt returns the root's pid and the milliseconds that CRIU took."""

    criu: Criu
    timeout: float | None
    tcp_close: bool
    tell: Progress

    def restore(self, directory: Path) -> tuple[int, float]:
        """Checks and restores an image.

        Raises:
            DynacutError: it failed, and what was left of it has been ended.
        """
        self.tell("checking the image")
        tasks = read_tasks(directory)
        for attempt in range(_TRIES):
            _make_free(tasks)
            # Its log and statistics do not go to the image, which may be read-only, or be restored by two at once.
            work = Path(tempfile.mkdtemp(prefix="dynacut-restore-"))
            try:
                run = self._run(directory, tasks, work / _LOG_NAME)
            except BaseException:
                shutil.rmtree(work)
                raise
            pid = tasks.pids[0]
            if run.succeeded and is_alive(pid):
                shutil.rmtree(work)
                return pid, run.wall_ms
            left = processes.end(_leftovers(tasks))
            if attempt == _TRIES - 1 or left or run.interrupted or not any(map(run.says, _TAKEN)):
                break
            shutil.rmtree(work)
            self.tell("an id was taken meanwhile; restoring again")
        if run.interrupted:
            raise KeyboardInterrupt
        raise _failure(run, directory, work / _LOG_NAME, left)

    def _run(self, directory: Path, tasks: ImageTasks, log: Path) -> CriuRun:
        options = tasks.record.options
        arguments = replace(options, tcp_established=options.tcp_established and not self.tcp_close).arguments()
        if self.tcp_close:
            arguments.append("--tcp-close")
        self.tell("restoring")
        return self.criu.run(
            "restore",
            directory,
            ["-d", *arguments],
            log=log,
            timeout=_LEAST_TIMEOUT + tasks.size / _LEAST_BYTES_PER_SECOND if self.timeout is None else self.timeout,
            keep_terminal=options.shell_job and os.getsid(0) != 0 and sys.stdin is not None and sys.stdin.isatty(),
        )

    def roll_back(self, original: Path, errors: tuple[str, ...]) -> tuple[int, float]:
        """Restores the original of an image that could not be restored. errors: why not.

        Raises:
            DynacutError: it cannot be restored either.
        """
        self.tell(f"it failed; restoring the original, {original}")
        try:
            return self.restore(original)
        except DynacutError as error:
            raise DynacutError(
                f"neither the image nor its original, {original}, could be restored; nothing of them runs",
                error.advice,
                details=(*errors, error.problem, *error.details),
            ) from None


def _make_free(tasks: ImageTasks) -> None:
    """Reaps what this process has not reaped yet of the dumped processes.

    Raises:
        DynacutError: one of the pids is taken.
    """
    taken = {tid: processes.start_time(tid) for tid in tasks.tids if Path(f"/proc/{tid}").exists()}
    zombies = {tid: began for tid, began in taken.items() if not is_alive(tid)}
    remaining = processes.wait_until_gone(zombies, _REAP_TIMEOUT) if zombies.keys() == taken.keys() else sorted(taken)
    if remaining:
        raise _PidTakenError(
            f"{processes.described(remaining[0])} has a pid that the image needs"
            f"{f', and so have {len(remaining) - 1} others' if len(remaining) > 1 else ''}",
            "end it first: if it is the process that was dumped, it still runs, or its parent has not reaped it",
        )


def _leftovers(tasks: ImageTasks) -> list[int]:
    """What a failed restore has left: our own descendants with pids of the image, which were free before."""
    descendants = set(tree_of(os.getpid()))
    return [pid for pid in tasks.pids if pid in descendants]


def _failure(run: CriuRun, directory: Path, log: Path, left: list[int]) -> DynacutError:
    if run.succeeded:
        problem = f"the process of {directory} ended as soon as it was restored"
    elif run.timed_out:
        problem = f"restoring {directory} took too long and was given up"
    else:
        problem = f"CRIU cannot restore {directory}"
    advice = next((words for text, words in _ADVICE if run.says(text)), "the log says more")
    details = [*run.errors, f"CRIU's log: {log}"]
    details += [f"{processes.described(pid)} is left of it and cannot be ended" for pid in left]
    return DynacutError(problem, advice, details=details)
