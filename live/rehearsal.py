"""Verifying a change against a running process that is changed by other means: by way of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from dynacut.live.admission import admit
from dynacut.live.lock import locked
from dynacut.live.process import Process
from dynacut.live.tree import descendants
from dynacut.shared.errors import DynacutError
from dynacut.shared.patch_set import Resolve
from dynacut.shared.proc import is_alive
from dynacut.shared.region import find_region


@dataclass(frozen=True)
class Rehearsal:
    """edits: the places that the change would edit; changes: whether anything would be different afterwards."""

    edits: int
    changes: bool


@contextmanager
def rehearsed(pid: int, resolve: Resolve, *, tree: bool) -> Iterator[Rehearsal]:
    """Verifies a change without a stop, and keeps other dynacuts from these processes until the end of the context.

    Descendants that run another executable are passed over where the change does not fit them, as in an image.

    Raises:
        DynacutError: the change does not fit; nothing has been touched.
    """
    edits, changes = 0, False
    with ExitStack() as stack:
        admit(pid, changing=False)
        root = stack.enter_context(Process(pid))
        for each in descendants(pid) if tree else [pid]:
            try:
                process = root if each == pid else stack.enter_context(Process(each))
                stack.enter_context(locked(each))
                found = find_region(process)
            except DynacutError:
                if each == pid or is_alive(each):
                    raise
                continue  # a child that ended meanwhile
            try:
                patches = resolve(process, found.table if found else None)
            except DynacutError:
                if process.exe == root.exe:
                    raise
                continue
            edits += len(patches.edits)
            changes = changes or patches.changes
        yield Rehearsal(edits, changes)
