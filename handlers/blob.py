"""The built handler: position-independent code that starts with the signal return trampoline."""

from __future__ import annotations

from functools import cache
from pathlib import Path

HANDLER_RESTORER = 0
"""Offset of the signal return trampoline in the blob, for sa_restorer."""
HANDLER_ENTRY = 16
"""Offset of the handler's entry in the blob, for sa_handler."""


@cache
def handler_code() -> bytes:
    """The handler's code, at most one page.

    Raises:
        FileNotFoundError: the package was laid out without its build step (handlers/build.py).
    """
    return Path(__file__).with_name("trap.bin").read_bytes()
