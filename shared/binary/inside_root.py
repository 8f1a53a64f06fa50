"""Files below another root directory, found as a process would find them that has it as its root.

Links in there may be anybody's: followed from here, an absolute one would lead to a file of this machine. openat2(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from pathlib import Path

_SYS_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x02, 0x10


def open_inside(root: Path, path: Path) -> int:
    """Opens a regular file for reading; path: as seen by a process with that root. The caller closes it.

    What it is, is known before it is opened: opening a device may do something.

    Raises:
        OSError: there is none, or it may not be read.
    """
    folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = _found(folder, os.fsencode(path))
    finally:
        os.close(folder)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    finally:
        os.close(found)


def _found(folder: int, path: bytes) -> int:
    """A descriptor that only tells where a file is (O_PATH)."""
    library = ctypes.CDLL(None, use_errno=True)
    how = (ctypes.c_uint64 * 3)(os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    result = int(library.syscall(_SYS_OPENAT2, folder, path, ctypes.byref(how), ctypes.sizeof(how)))
    if result >= 0:
        return result
    number = ctypes.get_errno()
    if number == errno.ENOSYS:  # before Linux 5.6: a file without links in its way is found all the same
        return _found_without_links(folder, path)
    raise OSError(number, os.strerror(number), os.fsdecode(path))


def _found_without_links(folder: int, path: bytes) -> int:
    descriptor = os.dup(folder)
    for part in path.strip(b"/").split(b"/"):
        if part == b"..":
            os.close(descriptor)
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        try:
            deeper = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = deeper
    return descriptor
