"""Load on a server while it is patched: threads that ask all the time and count what comes back."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from typing import Self

from .servers import RedisError, wait_until

_UNSET = object()


class _Worker:
    """One thread's counters: only that thread writes them."""

    def __init__(self) -> None:
        self.count = self.failures = self.wrong = 0
        self.longest = 0.0
        self.thread: threading.Thread | None = None


class Load:
    """Threads that call `call` in a loop, from start() to stop().

    count: right replies. failures: calls that raised. wrong: replies other than `expect`, or without it False
    and RedisError values. longest: seconds of the slowest call. first: the first failure or wrong reply.
    With `each`, each thread makes a call of its own, for a connection of its own: `make` returns it.
    """

    def __init__(self, call: Callable[[], object], threads: int = 2, expect: object = _UNSET) -> None:
        self._make: Callable[[], Callable[[], object]] = lambda: call
        self._expect = expect
        self._workers = [_Worker() for _ in range(threads)]
        self._stop = threading.Event()
        self.first = ""

    @classmethod
    def each(cls, make: Callable[[], Callable[[], object]], threads: int = 2, expect: object = _UNSET) -> Self:
        """A load whose threads each call what their own call of make() returned."""
        load = cls(make, threads, expect)
        load._make = make
        return load

    @property
    def count(self) -> int:
        """Right replies so far."""
        return sum(worker.count for worker in self._workers)

    @property
    def failures(self) -> int:
        """Calls that raised, so far."""
        return sum(worker.failures for worker in self._workers)

    @property
    def wrong(self) -> int:
        """Wrong replies so far."""
        return sum(worker.wrong for worker in self._workers)

    @property
    def longest(self) -> float:
        """Seconds that the slowest call took."""
        return max(worker.longest for worker in self._workers)

    def start(self) -> Self:
        """Starts the threads and returns when each has had a reply or a failure."""
        for worker in self._workers:
            worker.thread = threading.Thread(target=self._run, args=(worker,), daemon=True)
            worker.thread.start()
        wait_until(
            lambda: all(worker.count + worker.failures + worker.wrong for worker in self._workers),
            "a first reply in each thread",
        )
        return self

    def wait_for(self, more: int, timeout: float = 10.0) -> None:
        """Returns when `more` further replies have come, right or wrong or failed."""
        target = self._total() + more
        wait_until(lambda: self._total() >= target, f"{more} more replies", timeout)

    def stop(self) -> Self:
        """Ends the threads; the counters stay."""
        self._stop.set()
        for worker in self._workers:
            if worker.thread is not None:
                worker.thread.join(30.0)
                assert not worker.thread.is_alive(), "a call under load hangs"
        return self

    def _total(self) -> int:
        return self.count + self.failures + self.wrong

    def _is_right(self, reply: object) -> bool:
        if self._expect is _UNSET:
            return reply is not False and not isinstance(reply, RedisError)
        return reply == self._expect

    def _run(self, worker: _Worker) -> None:
        call: Callable[[], object] | None = None
        while not self._stop.is_set():
            before = time.monotonic()
            try:
                if call is None:
                    call = self._make()
                reply = call()
            except (OSError, http.client.HTTPException, AssertionError) as error:
                worker.failures += 1
                self.first = self.first or repr(error)
                call = None  # a broken connection is made anew
                time.sleep(0.001)
                continue
            worker.longest = max(worker.longest, time.monotonic() - before)
            if self._is_right(reply):
                worker.count += 1
            else:
                worker.wrong += 1
                self.first = self.first or repr(reply)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
