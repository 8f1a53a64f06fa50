"""Files that are written as a whole or not at all, and nowhere else: what stands in their folder may be others'."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file under another name beside it and renames it; a device or pipe is written to as it is.

    A link is followed, not replaced, such as /dev/stdout, where the kernel follows it (protected_symlinks in
    proc_sys_fs(5)). The other name cannot be known before, so nobody can have put a link there.

    Raises:
        OSError, ValueError: it cannot be written; what was there before still is.
    """
    try:
        is_regular = stat.S_ISREG(path.stat().st_mode)  # by its own name: this is where the kernel refuses links
    except FileNotFoundError:
        is_regular = True
    if not is_regular:
        path.write_bytes(data)
        return
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:200]}.{os.getpid()}.{os.urandom(4).hex()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        temporary.rename(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
