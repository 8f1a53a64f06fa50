"""The options of CRIU that a process tree needs both when it is dumped and when it is restored."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dynacut.shared.errors import DynacutError, shortened

RECORD_NAME = "dynacut.json"
"""In the image directory; what dynacut knows of an image besides CRIU's own files."""
SCHEMA = 1
_MAX_SIZE = 1 << 16
_ADVICE = "delete the file: dynacut then finds the options by looking at the image"


@dataclass(frozen=True)
class CriuOptions:
    """Each is the option of criu(8) of that name."""

    tcp_established: bool = False
    """There are TCP sockets, and with them perhaps connections, which go on after a restore."""
    file_locks: bool = False
    """Files are locked."""
    ext_unix_sk: bool = False
    """Unix datagram sockets lead to processes outside the tree, such as the system's logger."""
    shell_job: bool = False
    """The root of the tree leads no session: it was started by a shell that goes on."""

    def arguments(self) -> list[str]:
        """For CRIU's command line."""
        return [f"--{name.replace('_', '-')}" for name, wanted in asdict(self).items() if wanted]


@dataclass(frozen=True)
class Record:
    """The contents of dynacut.json.

    original: the image directory that a rewritten one was made from, absolute or relative to the one it stands in;
    what is restored when the rewritten one cannot be. None for an image that was not rewritten.
    """

    options: CriuOptions
    original: str | None = None

    def packed(self) -> bytes:
        """The contents of the file."""
        document: dict[str, Any] = {"schema": SCHEMA, "options": asdict(self.options)}
        if self.original is not None:
            document["original"] = self.original
        return json.dumps(document, indent=2).encode() + b"\n"


def read_record(directory: Path) -> Record | None:
    """The image directory's dynacut.json; None if it has none, as if made by `criu dump` itself.

    Raises:
        DynacutError: it is not as dynacut writes it. It may come from elsewhere, so nothing else is accepted.
    """
    path = directory / RECORD_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DynacutError(f"{path} cannot be read: {error.strerror}", _ADVICE) from None
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(_MAX_SIZE + 1) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    try:
        document = json.loads(data) if len(data) <= _MAX_SIZE else None
    except (ValueError, RecursionError):
        document = None
    return _checked(document, path)


def _checked(document: object, path: Path) -> Record:
    if not isinstance(document, dict):
        raise DynacutError(f"{path} is no JSON object of at most {_MAX_SIZE >> 10} KiB", _ADVICE)
    if document.get("schema") != SCHEMA:
        raise DynacutError(f"{path} has another schema than {SCHEMA}: it is a newer dynacut's", _ADVICE)
    options = document.get("options")
    known = {field.name for field in fields(CriuOptions)}
    if not isinstance(options, dict) or not all(isinstance(value, bool) for value in options.values()):
        raise DynacutError(f"{path}: its options are not all true or false", _ADVICE)
    if unknown := sorted(set(options) - known):
        raise DynacutError(f"{path}: unknown option {shortened(unknown[0])}", _ADVICE)
    original = document.get("original")
    if original is not None and (not isinstance(original, str) or not original or "\0" in original):
        raise DynacutError(f"{path}: its original is no path", _ADVICE)
    return Record(CriuOptions(**options), original)
