"""The built handler: position-independent code that starts with the signal return trampoline."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

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
    return (files("dynacut.handlers") / "trap.bin").read_bytes()
