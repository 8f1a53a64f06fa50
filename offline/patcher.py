"""Applies a patch set to a process of an image, in memory: the same table, handler, action and masks as live."""

from __future__ import annotations

from dynacut.offline.images.process import ImageProcess
from dynacut.shared.apply import ThreadAmidError
from dynacut.shared.apply import apply as apply_to_stopped
from dynacut.shared.errors import DynacutError
from dynacut.shared.patch_set import PatchSet


def apply(process: ImageProcess, patches: PatchSet) -> None:
    """Applies a patch set that was resolved against the process as it is in the image.

    Raises:
        DynacutError: it is not possible; the process in memory is then of no more use, the image is as it was.
    """
    library = patches.library
    for address in {*(edit.address for edit in patches.edits), *(library.bound_to if library else ())}:
        process.check_file(address)
    try:
        apply_to_stopped(process, patches)
    except ThreadAmidError as error:
        raise DynacutError(
            error.problem,
            "use --scope entry, which needs only first bytes, or leave out what --standing lists (dynacut plan --keep)",
        ) from None
