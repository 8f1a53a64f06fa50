"""Changing a running process by way of a checkpoint: dumped, rewritten as a layer, restored with the pids it had.

Once it is dumped, the process exists only as an image. So everything that can be verified is verified before, and
whatever fails afterwards leads back to the original image.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynacut.offline import processes
from dynacut.offline.change import Outcome, change
from dynacut.offline.checkpoint import Checkpoint, Progress, checkpoint
from dynacut.offline.criu import Criu
from dynacut.offline.dumpable import admit
from dynacut.offline.images.image import Image
from dynacut.offline.reaping import check_reaped
from dynacut.offline.restore import Restored, restore
from dynacut.offline.wanted_options import look
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.patch_set import Resolve

IMAGE, REWRITTEN = "image", "rewritten"
"""The directories that a round trip makes."""
_INVENTORY = "inventory.img"
"""Is there as soon as a dump has succeeded, and is cleared away where one has failed."""
_REAP_TIMEOUT = 30.0


@dataclass(frozen=True)
class RoundTrip:
    """What was done. rewrite_ms: for reading the image and writing the layer; frozen_ms: from the freezing of the
    processes to the end of the restore, in milliseconds."""

    dumped: Checkpoint
    changed: Outcome
    restored: Restored
    rewrite_ms: float
    frozen_ms: float


def check(pid: int) -> None:
    """Returns if a process can be dumped, and restored afterwards, as far as that can be told; touches nothing.

    Raises:
        DynacutError: it cannot.
    """
    look(admit(pid))
    check_reaped(pid)


def round_trip(
    pid: int,
    resolve: Resolve,
    folder: Path,
    *,
    pids: Sequence[int] = (),
    criu: Criu,
    timeout: float | None = None,
    progress: Progress | None = None,
) -> RoundTrip:
    """Dumps a process with its descendants, applies a change to the image and restores it.

    folder: a new or empty one of this user's alone; it gets the image and the rewritten one, and is left so. pids: what
    to change, by default all processes; see change(). timeout: seconds in which the processes must be frozen. The
    caller has asked check(), and keeps interrupts away.

    Raises:
        DynacutError: with status REFUSED the processes run as before, be it that they were never dumped, be it that the
            original was restored; with UNKNOWN they are gone, and the advice says how to get them back.
    """
    tell = progress or (lambda _: None)
    end = _End(pid)
    began = {member: processes.start_time(member) for member in admit(pid)}
    image, rewritten = folder / IMAGE, folder / REWRITTEN
    try:
        dumped = checkpoint(pid, image, criu=criu, timeout=timeout, progress=tell)
        tell("rewriting the image")
        started = time.perf_counter()
        with Image(image) as opened:
            changed = change(opened, resolve, rewritten, pids=pids, dry_run=False, flat=False)
        rewrite_ms = (time.perf_counter() - started) * 1000
    except BaseException as failure:
        if not (image / _INVENTORY).exists():
            raise
        processes.wait_until_gone(began, _REAP_TIMEOUT)
        raise _bring_back(image, criu, tell, failure) from None
    if dumped.remaining:
        tell("waiting for the parent to take note")
        processes.wait_until_gone(began, _REAP_TIMEOUT)
    restored = _restored(rewritten, criu, tell)
    frozen_ms = dumped.frozen_us / 1000 + (time.monotonic() - end.seen()) * 1000
    return RoundTrip(dumped, changed, restored, rewrite_ms, frozen_ms)


def _bring_back(image: Path, criu: Criu, tell: Progress, failure: BaseException) -> BaseException:
    """Restores the original after a failure; returns the error to raise.

    Raises:
        DynacutError: it cannot be restored.
    """
    tell("it failed; restoring the original")
    _restored(image, criu, tell)
    if isinstance(failure, OSError):
        failure = DynacutError(f"{image} cannot be written: {failure.strerror}", "give another folder by --images DIR")
    if isinstance(failure, DynacutError):
        failure.details = (*failure.details, "it was dumped and restored, unchanged: it runs as before")
    return failure


def _restored(image: Path, criu: Criu, tell: Progress) -> Restored:
    try:
        return restore(image, criu=criu, progress=tell)
    except DynacutError as error:
        raise DynacutError(
            f"the dumped process cannot be restored, and does not run: {error.problem}",
            f"{error.advice}; then: dynacut restore {image}",
            details=error.details,
            status=ExitStatus.UNKNOWN,
        ) from None


class _End:
    """Sees when a process ends, whoever's child it is (pidfd_open(2))."""

    def __init__(self, pid: int) -> None:
        """Raises:
        DynacutError: there is no such process.
        """
        try:
            descriptor = os.pidfd_open(pid)
        except OSError as error:
            raise DynacutError(f"process {pid} cannot be watched: {error.strerror}", "see whether it runs") from None
        self._seen = 0.0
        self._thread = threading.Thread(target=self._watch, args=(descriptor,), daemon=True)
        self._thread.start()

    def seen(self) -> float:
        """When it ended, as time.monotonic(); it must have ended."""
        self._thread.join()
        return self._seen

    def _watch(self, descriptor: int) -> None:
        select.select([descriptor], [], [])
        self._seen = time.monotonic()
        os.close(descriptor)
