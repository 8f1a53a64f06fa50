"""The instance that the steps of `dynacut trim` work on: started, guarded, dumped, restored, and put back or ended."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dynacut.jobs.trim.service import Service
from dynacut.jobs.trim.state import State
from dynacut.offline.processes import end_tree
from dynacut.shared import resolve
from dynacut.shared.coverage.startup import FEATURE
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.proc import is_alive

if TYPE_CHECKING:
    from dynacut.handlers.table import Table
    from dynacut.offline.criu import Criu
    from dynacut.shared.patch_set import PatchSet
    from dynacut.shared.target import Target

Tell = Callable[[str], None]
TIMEOUT = 30.0
"""Seconds for one change of a running process."""


def put_back(target: Target, table: Table | None) -> PatchSet:
    """The patch set that puts start-up code back, and leaves alone what else is disabled in the target."""
    if table is None or FEATURE not in table.features:
        return resolve.enable((), target, table)
    return resolve.undo(target, table) if table.features == (FEATURE,) else resolve.enable([FEATURE], target, table)


@dataclass(frozen=True)
class Instance:
    """The service as a process.

    given: the pid of one that ran before; None if instances are started for the trim. They are ended when something
    fails; the given one goes on, as it was. criu: the one to use; None finds one.
    """

    service: Service
    state: State
    tell: Tell
    given: int | None
    criu: Path | None

    def path(self, name: str) -> Path:
        """A file of the trim's directory."""
        return self.service.directory / name

    @property
    def was_dumped(self) -> bool:
        """Whether the given process is gone, as an earlier trim that was killed had it dumped."""
        return self.given is not None and not is_alive(self.given)

    def has_image(self, name: str) -> bool:
        """Whether an image is there as a whole: CRIU writes the inventory last."""
        return self.path(f"{name}/inventory.img").exists()

    @contextmanager
    def running(self) -> Iterator[int]:
        """The pid of the given process, without what an earlier trim may have left in it; or of one that is started."""
        if self.given is None:
            self.tell("starting the program")
            pid = self.service.start()
        else:
            pid = self.given
            self._put_back(pid)
        self.note(pid)
        try:
            yield pid
        except BaseException:
            if self.given is None:
                self.end(pid)
            elif is_alive(pid):
                self._put_back(pid)
            raise

    @contextmanager
    def restored(self, name: str) -> Iterator[int]:
        """The pid of an image's service; if something fails it is ended, and a given one is to fall back.

        A given one that runs already was restored by an earlier trim that was killed: it is left as it is.
        """
        from dynacut.offline.restore import restore

        if self.given is not None and is_alive(self.given):
            pid = self._restored_before(self.given)
        else:
            pid = restore(self.path(name), criu=self._find(), rollback=False, progress=self.tell).pid
        self.note(pid)
        try:
            yield pid
        except BaseException:
            self.end(pid)
            raise

    def fall_back(self) -> None:
        """Lets a given process that was dumped go on from its first image; it is to be dumped anew by a later trim.

        Raises:
            DynacutError: it cannot be restored.
        """
        from dynacut.offline.restore import restore

        if self.was_dumped and self.has_image("image"):
            self.tell("it failed; restoring the untouched service")
            self.state.forget("checkpoint", "learn", "remove")
            restore(self.path("image"), criu=self._find(), tcp_close=True)

    def _restored_before(self, pid: int) -> int:
        from dynacut.live.change import look

        if all(feature.name != FEATURE for feature in look(pid, tree=False).processes[0].features):
            raise DynacutError(
                f"process {pid} runs, but it is not the one that this trim has dumped",
                "end it, or begin anew in a new directory",
            )
        return pid

    def dump(self, pid: int, name: str) -> None:
        """Dumps it into a directory; it is gone afterwards.

        Raises:
            DynacutError: it cannot be dumped, or its parent does not reap it.
        """
        from dynacut.offline.checkpoint import checkpoint

        directory = self.cleared(name)
        done = checkpoint(pid, directory, criu=self._find(), progress=self.tell)
        if done.remaining:
            raise DynacutError(
                f"process {done.remaining[0]} was dumped, but its parent has not reaped it, so nothing can be restored",
                f"let the parent reap it, then `dynacut restore {directory}`; or use --live, which needs no checkpoint",
                status=ExitStatus.CHECK_FAILED,
            )
        self.state.process = None

    def cleared(self, name: str) -> Path:
        """The path of a directory that is to be made; what an earlier attempt has left there is removed."""
        directory = self.path(name)
        if directory.exists():
            shutil.rmtree(directory)
        return directory

    def note(self, pid: int) -> None:
        """Remembers an instance of the trim's own, so that a later command can end it."""
        from dynacut.offline import processes

        started = processes.start_time(pid)
        self.state.process = (pid, started) if started is not None and self.given is None else None

    def end(self, pid: int) -> None:
        """Kills it with its descendants."""
        end_tree(pid)
        self.state.process = None

    def _put_back(self, pid: int) -> None:
        from dynacut.live.change import change

        change(pid, put_back, tree=True, dry_run=False, timeout=TIMEOUT)

    def _find(self) -> Criu:
        from dynacut.offline.criu import find_criu

        return find_criu(self.criu)
