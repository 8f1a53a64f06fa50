"""Where dynacut keeps what it need not find out twice."""

from __future__ import annotations

import os
import pwd
from pathlib import Path


def cache_folder() -> Path:
    """Return dynacut's folder below XDG_CACHE_HOME, by default below the user's ~/.cache; it may not exist yet.

    The home is that of the effective user: under sudo, HOME may still be somebody else's.
    """
    configured = os.environ.get("XDG_CACHE_HOME", "")
    if configured.startswith("/"):
        return Path(configured) / "dynacut"
    try:
        home = Path(pwd.getpwuid(os.geteuid()).pw_dir)
    except KeyError:
        home = Path(os.environ.get("HOME", "/nonexistent"))
    return home / ".cache" / "dynacut"
