"""The program gdb: which of them will do."""

from __future__ import annotations

import subprocess

from dynacut.shared.errors import DynacutError

INTERPRETER = "mi3"
"""The version of the machine interface that is spoken with it: that of gdb 9 and newer."""
ADVICE = "install gdb 9 or newer (Debian: apt-get install gdb)"
_TIMEOUT = 10.0


def speaks_mi(path: str) -> bool:
    """Whether a gdb has this version of the machine interface; tried."""
    command = [path, "-nx", "-batch", f"--interpreter={INTERPRETER}"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def unusable(path: str, reason: str) -> DynacutError:
    """The error for a gdb that cannot be started, or ends at once."""
    return DynacutError(f"{path} cannot be used: {reason}", f"{ADVICE}, or use --engine ptrace")
