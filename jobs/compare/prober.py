"""A process of its own that asks a server all the time, and remembers the longest wait for a reply."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

from dynacut.jobs.compare.probes import FAILURES, Conversation, Probe
from dynacut.shared.errors import DynacutError

_PR_SET_PDEATHSIG = 1
_RETRY_SECONDS = 0.001
_POLL_SECONDS = 0.0002
_START_TIMEOUT = 10.0


class _Cell(IntEnum):
    """What the two processes share: numbers of 8 bytes, each written by one of them only. Times are in nanoseconds."""

    WINDOW = 0
    """Counted up by the parent: everything behind counts from zero."""
    SEEN_WINDOW = 1
    REPLIES = 2
    FAILED = 3
    LOST = 4
    LONGEST = 5
    WANTED_SINCE = 6
    """When the request that is not answered yet was first made; 0 between requests."""


@dataclass(frozen=True)
class Seen:
    """What a client saw in a window of time.

    longest_us: the longest time from a request, all its repetitions included, to its reply. failed: requests that were
    refused, reset or not answered in time. lost: connections that broke. seconds: how long the window was. answered:
    whether the last request was answered, if only after the window.
    """

    longest_us: float
    replies: int
    failed: int
    lost: int
    seconds: float
    answered: bool


class Prober:
    """Asks from start to close(). keep: over one connection, else each request has one of its own."""

    def __init__(self, probe: Probe, *, keep: bool) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._cells = memoryview(self._memory).cast("Q")
        self._label = probe.label
        self._began = 0.0
        pause = probe.kept_pause if keep else probe.fresh_pause
        assert pause is not None
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                _prepare(parent)
                _ask_for_ever(probe.open, self._cells, pause, keep=keep)
            finally:
                os._exit(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self) -> None:
        """Begins a new window; returns when its first request is being made.

        Raises:
            DynacutError: the server does not answer.
        """
        self._cells[_Cell.WINDOW] += 1
        window = self._cells[_Cell.WINDOW]
        if not self._wait(lambda: self._cells[_Cell.SEEN_WINDOW] == window, _START_TIMEOUT):
            raise DynacutError(f"the server does not answer: {self._label}", "try the request by hand")
        self._began = time.monotonic()

    def end(self, patience: float) -> Seen:
        """Ends the window when the request that is under way is answered; after that many seconds in any case."""
        seconds = time.monotonic() - self._began
        replies = self._cells[_Cell.REPLIES]
        answered = self._wait(lambda: self._cells[_Cell.REPLIES] > replies, patience)
        since = self._cells[_Cell.WANTED_SINCE]
        waiting = time.monotonic_ns() - since if since else 0
        return Seen(
            longest_us=max(self._cells[_Cell.LONGEST], waiting) / 1000,
            replies=self._cells[_Cell.REPLIES],
            failed=self._cells[_Cell.FAILED],
            lost=self._cells[_Cell.LOST],
            seconds=seconds,
            answered=answered,
        )

    def close(self) -> None:
        """Ends the process."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)
        self._cells.release()
        self._memory.close()

    def _wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True


def _prepare(parent: int) -> None:
    """Ends with the parent, is not ended by Ctrl-C before it, and is not what other work on the machine delays."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    gc.disable()


def _ask_for_ever(open_one: Callable[[], Conversation], cells: memoryview, pause: float, *, keep: bool) -> None:
    conversation: Conversation | None = None
    is_established = False
    while True:
        if cells[_Cell.SEEN_WINDOW] != cells[_Cell.WINDOW]:
            for cell in (_Cell.REPLIES, _Cell.FAILED, _Cell.LOST, _Cell.LONGEST):
                cells[cell] = 0
            cells[_Cell.SEEN_WINDOW] = cells[_Cell.WINDOW]
        wanted = cells[_Cell.WANTED_SINCE] = time.monotonic_ns()
        answered = False
        while not answered:
            try:
                conversation = conversation or open_one()
                conversation.ask()
                answered = True
            except FAILURES:
                cells[_Cell.FAILED] += 1
                cells[_Cell.LOST] += is_established
                if conversation is not None:
                    conversation.close()
                conversation, is_established = None, False
                time.sleep(_RETRY_SECONDS)
        assert conversation is not None
        cells[_Cell.LONGEST] = max(cells[_Cell.LONGEST], time.monotonic_ns() - wanted)
        cells[_Cell.WANTED_SINCE] = 0
        cells[_Cell.REPLIES] += 1
        is_established = keep and not conversation.ended
        if not is_established:
            conversation.close()
            conversation = None
        if pause:
            time.sleep(pause)
