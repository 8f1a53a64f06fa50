"""Folders whose contents nobody else may choose: what lies in them is restored, resumed and executed."""

from __future__ import annotations

import os
from pathlib import Path

from dynacut.shared.errors import DynacutError


def private_folder(directory: Path, advice: str, danger: str) -> bool:
    """Makes a directory for its owner alone, or looks at one that is there; returns whether it is new.

    advice: which one to give instead. danger: what others could do who can write to it, or own it.

    Raises:
        DynacutError: it cannot be made, is no directory, or others can write to it.
    """
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise DynacutError(f"{directory} cannot be made: {error.strerror}", "give another directory") from None
    else:
        return True
    if not directory.is_dir():
        raise DynacutError(f"{directory} is no directory", advice)
    status = directory.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise DynacutError(f"{directory} belongs to, or can be written by, others, who could {danger}", advice)
    return False
