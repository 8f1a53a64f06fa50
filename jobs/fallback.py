"""What cannot be changed while it runs is dumped, rewritten and restored: `dynacut live --fallback checkpoint`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacut.shared.errors import DynacutError, ExitStatus, printable
from dynacut.shared.interrupts import uninterrupted

if TYPE_CHECKING:
    from dynacut.live.change import Outcome
    from dynacut.offline.criu import Criu
    from dynacut.offline.round_trip import RoundTrip
    from dynacut.shared.patch_set import Resolve
    from dynacut.shared.report import Inspection

_FOLDER = "/var/tmp"


@dataclass(frozen=True)
class Fallback:
    """The way that was gone instead. refused: why it could not be done live. trip: None if nothing had to be done.

    images: where the image still lies, if the change was taken back.
    """

    refused: str
    trip: RoundTrip | None
    images: Path | None

    @property
    def status(self) -> ExitStatus:
        """The command's exit status."""
        return ExitStatus.DONE if self.images is None else ExitStatus.CHECK_FAILED

    @property
    def error(self) -> DynacutError | None:
        """Why the change was taken back, if it was."""
        if self.trip is None or self.images is None:
            return None
        return DynacutError(
            "the rewritten image could not be restored; the original was, and the process runs as before",
            f"see why, and what was to be restored: {self.images}",
            details=self.trip.restored.errors,
        )

    @property
    def warnings(self) -> Sequence[str]:
        """What CRIU's dump left to be told."""
        return () if self.trip is None else self.trip.dumped.warnings

    @property
    def summary(self) -> str:
        """How long it took, for people."""
        if self.trip is None:
            return "by checkpoint"
        times = f"dumped in {self.trip.dumped.wall_ms:.0f} ms, rewritten in {self.trip.rewrite_ms:.0f} ms"
        return (
            f"by checkpoint: {times}, restored in {self.trip.restored.wall_ms:.0f} ms; it stood still for "
            f"{self.trip.frozen_ms:.0f} ms"
        )

    def document(self) -> dict[str, Any]:
        """For --json."""
        document: dict[str, Any] = {"refused": self.refused}
        if self.trip is not None:
            document |= {
                "checkpoint": round(self.trip.dumped.wall_ms, 1),
                "rewrite": round(self.trip.rewrite_ms, 1),
                "restore": round(self.trip.restored.wall_ms, 1),
                "frozen_ms": round(self.trip.frozen_ms, 1),
                "rolled_back": self.images is not None,
                "images": None if self.images is None else str(self.images),
                "errors": self.trip.restored.errors,
                "warnings": self.trip.dumped.warnings,
            }
        return document


def by_checkpoint(
    pid: int,
    resolve: Resolve,
    refused: DynacutError,
    *,
    tree: bool,
    dry_run: bool,
    timeout: float,
    images: Path | None,
    tell: Callable[[str], None],
) -> tuple[Outcome, Fallback]:
    """Makes a change that was refused live; the outcome is as live.change() gives it.

    timeout: in seconds. images: where the image lies meanwhile. tell: is told in a few words what is being done.

    Raises:
        DynacutError: refused as well, with the processes as they were; or they could not be restored.
    """
    from dynacut.live.rehearsal import rehearsed
    from dynacut.offline.criu import find_criu
    from dynacut.offline.round_trip import check

    with rehearsed(pid, resolve, tree=tree) as rehearsal:
        trip, left = None, None
        if rehearsal.changes:
            criu = find_criu()
            check(pid)
            if not dry_run:
                folder = _new_folder(pid, images)
                trip = _go(pid, resolve, criu, folder, timeout, tell, pids=[] if tree else [pid])
                left = folder if trip.restored.rolled_back_from is not None else None
    outcome = _look_again(pid, trip, tree=tree)
    outcome.edits = rehearsal.edits
    if trip is not None:
        outcome.edits, outcome.skipped, outcome.changed = trip.changed.edits, trip.changed.skipped, left is None
        outcome.clock.add(int(trip.frozen_ms * 1e6))
    return outcome, Fallback(refused.problem, trip, left)


def _go(
    pid: int,
    resolve: Resolve,
    criu: Criu,
    folder: Path,
    timeout: float,
    tell: Callable[[str], None],
    *,
    pids: Sequence[int],
) -> RoundTrip:
    """Makes the round trip; the folder stays if the original had to be restored.

    Raises:
        DynacutError: see round_trip(); images that are left are named.
    """
    from dynacut.offline.round_trip import round_trip

    with uninterrupted():
        try:
            trip = round_trip(pid, resolve, folder, pids=pids, criu=criu, timeout=timeout, progress=tell)
        except DynacutError as error:
            if _is_left(folder):
                error.details = (*error.details, f"left for you to look at: {printable(str(folder))}")
            raise
        if trip.restored.rolled_back_from is None:
            shutil.rmtree(folder)
    return trip


def _new_folder(pid: int, where: Path | None) -> Path:
    """A folder of this user's alone; images lie in it side by side, so that a layer can share files."""
    parent = where or Path(os.environ.get("TMPDIR") or _FOLDER)
    try:
        return Path(tempfile.mkdtemp(prefix=f"dynacut-{pid}-", dir=parent.absolute()))
    except OSError as error:
        raise DynacutError(
            f"no image can be written to {parent}: {error.strerror}", "give another folder by --images DIR"
        ) from None


def _is_left(folder: Path) -> bool:
    """Removes what is empty of it; whether anything is left."""
    for each in (*folder.iterdir(), folder):
        with suppress(OSError):
            each.rmdir()
    return folder.exists()


def _look_again(pid: int, trip: RoundTrip | None, *, tree: bool) -> Outcome:
    """The processes as they are now.

    Raises:
        DynacutError: after a round trip the process is gone, or other features are in force than in the image.
    """
    from dynacut.live.change import look

    try:
        outcome = look(pid, tree=tree)
    except DynacutError:
        if trip is None:
            raise
        raise DynacutError(
            f"process {pid} was restored and has ended since, perhaps by a hit of the change",
            "look at its log, and start it again without the change",
            status=ExitStatus.CHECK_FAILED,
        ) from None
    if trip is not None and trip.restored.rolled_back_from is None:
        wanted, there = _states(trip.changed.processes), _states(outcome.processes)
        if any(there[each] != wanted.get(each) for each in there):
            raise DynacutError(
                f"process {pid} was restored, but not all features are as in the image",
                f"`dynacut live --pid {pid}` shows what is in force",
                status=ExitStatus.CHECK_FAILED,
            )
    return outcome


def _states(processes: Sequence[Inspection]) -> dict[int, dict[str, str]]:
    """The features of each process with their states. Sites to be learned are put back by the first hit."""
    return {
        process.pid: {
            feature.name: feature.state
            for feature in process.features
            if not any(site.on_hit == "learn" for site in feature.sites)
        }
        for process in processes
    }
