"""The page shared with the C programs in targets/: see targets/control.h."""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FIELDS = ("asked", "answered", "largest", "any", "stopped", "lost", "preempted", "thread", "sites")
_ANSWER_TIMEOUT = 10.0
_REST = 0.05
"""Seconds in which others catch up: the kernel takes the core from a real-time thread that leaves them none."""


class Control:
    """Asks a program to measure anew and reads what it has measured since; close() it."""

    def __init__(self, path: Path) -> None:
        """Makes the file; give its path to the program."""
        self.path = path
        path.write_bytes(struct.pack("<Q", 2).ljust(mmap.PAGESIZE, b"\0"))  # asks to rest
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), mmap.PAGESIZE)

    def close(self) -> None:
        self._page.close()

    def __getitem__(self, name: str) -> int:
        (field,) = struct.unpack_from("<Q", self._page, 8 * _FIELDS.index(name))
        assert isinstance(field, int)
        return field

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """For its time the program measures anew; before and after it rests, and leaves its core to others.

        Raises:
            TimeoutError: it does not answer.
        """
        time.sleep(_REST)
        self._ask(measure=True)
        try:
            yield
        finally:
            self._ask(measure=False)

    def _ask(self, *, measure: bool) -> None:
        asked = self["asked"] + 1
        if asked % 2 != measure:
            asked += 1
        struct.pack_into("<Q", self._page, 8 * _FIELDS.index("asked"), asked)
        self.wait_for("answered", asked)

    def wait_for(self, name: str, least: int) -> None:
        """Returns when a field has reached a value."""
        deadline = time.monotonic() + _ANSWER_TIMEOUT
        while self[name] < least:
            if time.monotonic() > deadline:
                raise TimeoutError(f"a program in bench/targets does not answer ({name})")
            time.sleep(0.0005)

    @property
    def largest_us(self) -> float:
        """The largest gap in the last measuring, in µs; without gaps in which the thread only made way for another."""
        return self["largest"] / 1000

    @property
    def any_us(self) -> float:
        """The largest gap of all."""
        return self["any"] / 1000

    @property
    def stopped_us(self) -> float:
        """The largest gap in which the thread was stopped, and not just interrupted; 0 if it never was."""
        return self["stopped"] / 1000

    @property
    def lost_us(self) -> float:
        """The sum of the gaps of 10 µs or more; as largest_us."""
        return self["lost"] / 1000


def stay_busy(seconds: float) -> None:
    """Keeps this process's core busy, as the tools do: hypervisors take time from a machine that is busy."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass
