"""What is left of a change that failed half-way: the edits that put the old bytes back, as far as they are ours."""

from __future__ import annotations

from collections.abc import Iterable

from dynacut.shared.errors import DynacutError
from dynacut.shared.patch_set import ByteEdit
from dynacut.shared.target import Target


def standing_edits(target: Target, edits: Iterable[ByteEdit]) -> list[ByteEdit]:
    """The edits that take back those that were made, wholly or in part.

    Where memory is gone, or has bytes that are neither the old nor the new ones, a module was unloaded meanwhile:
    nothing of this change is there any more.
    """
    standing = []
    for edit in edits:
        try:
            found = target.read(edit.address, len(edit.old))
        except DynacutError:
            standing += _standing_bytes(target, edit)
            continue
        if found != edit.old and all(byte in pair for byte, *pair in zip(found, edit.old, edit.new, strict=True)):
            standing.append(ByteEdit(edit.address, found, edit.old))
    return standing


def _standing_bytes(target: Target, edit: ByteEdit) -> list[ByteEdit]:
    """As standing_edits(), of an edit that lies over the end of what is mapped."""
    if len(edit.old) == 1:
        return []
    bytewise = zip(edit.old, edit.new, strict=True)
    return standing_edits(
        target,
        (ByteEdit(edit.address + place, bytes([old]), bytes([new])) for place, (old, new) in enumerate(bytewise)),
    )
