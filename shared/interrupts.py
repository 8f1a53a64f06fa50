"""Ctrl-C and the like, kept away from what must not be left half done."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that would interrupt come into force at the end of the context. In the main thread only."""
    caught: list[int] = []
    before = [(number, signal.signal(number, lambda number, _: caught.append(number))) for number in _SIGNALS]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
        for each in caught:
            signal.raise_signal(each)
