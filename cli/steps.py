"""What a command is doing at the moment, on one line of the terminal that is gone when it has ended."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from dynacut.shared.errors import printable

_CLEAR_LINE = "\r\x1b[K"


class Steps:
    """Use as a context manager, and tell() as a progress function. Nothing is shown where stderr is no terminal."""

    def __init__(self, *, shown: bool = True) -> None:
        self._shown = shown and sys.stderr.isatty()

    def tell(self, step: str) -> None:
        """Shows the step instead of the one before."""
        if self._shown:
            print(f"{_CLEAR_LINE}{printable(step)} …", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)
