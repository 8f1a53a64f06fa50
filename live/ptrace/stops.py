"""Stops of many threads, one after the other, and what makes them short."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from dynacut.live.ptrace.stop_clock import StopClock
from dynacut.live.ptrace.tracee import (
    LATE_TIMEOUT,
    NoStopError,
    ThreadGoneError,
    Tracee,
    give_up,
    late_tids,
    release_late,
    wait_for_stops,
)
from dynacut.live.ptrace.urgency import processors_awake, urgent, without_collections

_ASKED_AT_ONCE = 32


def each_stopped(tids: Iterable[int], timeout: float, clock: StopClock) -> Iterator[Tracee]:
    """Stops threads, yields each as it stops and lets it go at once; clock counts the stops.

    A few are asked at a time: with more threads than processors each takes a while to stop, and one that has stopped
    must not wait for others. Threads that end, or do not stop within timeout seconds, are passed over.
    """
    release_late(0)
    late = late_tids()
    ahead = [tid for tid in tids if tid not in late]
    asked: list[Tracee] = []
    deadline = time.monotonic() + timeout
    with urgent():
        while (ahead or asked) and time.monotonic() < deadline:
            if ahead and len(asked) < _ASKED_AT_ONCE:
                with suppress(ThreadGoneError, NoStopError):
                    tracee = Tracee(ahead.pop(0))
                    tracee.request_interrupt()
                    asked.append(tracee)
            waiting = []
            for tracee in asked:
                try:
                    if not tracee.poll():
                        waiting.append(tracee)
                        continue
                    with tracee:
                        yield tracee
                    clock.add(tracee.stopped_ns)
                except (ThreadGoneError, NoStopError):
                    continue
            if len(waiting) == len(asked) and (not ahead or len(asked) == _ASKED_AT_ONCE):
                wait_for_stops(deadline - time.monotonic())
            asked = waiting
    give_up(asked)


@contextmanager
def prompt_stops() -> Iterator[None]:
    """For a series of stops: SIGCHLD is blocked, so that a stop can be waited for instead of polled, no garbage is
    collected meanwhile, processors stay awake, and threads that stopped too late are let go at the end."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    with without_collections():
        try:
            with processors_awake():
                release_late(LATE_TIMEOUT)
                yield
        finally:
            release_late(5 * LATE_TIMEOUT)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
