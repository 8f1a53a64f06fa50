"""Rounds of the workload: repeated until it brings nothing new, then the service left to its timers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_STEP = 0.5


@dataclass(frozen=True)
class Patience:
    """How long a round goes on.

    passes: of the workload at most. quiet: so many in a row must bring nothing new, as the same requests take other
    paths when their packets come at other times. least: seconds for which the workload is repeated in any case.
    linger: seconds left to the service afterwards, for what its timers do; again if that brings something, but no more
    than `lingers` times.
    """

    passes: int
    quiet: int
    linger: float
    lingers: int = 1
    least: float = 0.0


@dataclass(frozen=True)
class Round:
    """What a round has seen: how far its result can be trusted.

    seconds: all of it. blocks: at its end. last_new: seconds from its begin to the last new block. quiet_passes,
    quiet_linger: whether the last passes, and the time without requests, brought nothing new.
    """

    passes: int
    seconds: float
    blocks: int
    last_new: float
    quiet_passes: bool
    quiet_linger: bool

    @property
    def is_quiet(self) -> bool:
        """Whether nothing new came at its end."""
        return self.quiet_passes and self.quiet_linger

    def as_json(self) -> dict[str, Any]:
        """The round as a step notes it, and --json shows it."""
        return {
            "passes": self.passes,
            "seconds": round(self.seconds, 1),
            "blocks": self.blocks,
            "last_new_seconds": round(self.last_new, 1),
            "quiet": self.is_quiet,
        }


class _News:
    """The blocks so far, and when the last one came."""

    def __init__(self, poll: Callable[[], int]) -> None:
        self._poll = poll
        self._began = time.monotonic()
        self.blocks = 0
        self.last = 0.0

    @property
    def seconds(self) -> float:
        """Since the begin."""
        return time.monotonic() - self._began

    def came(self) -> bool:
        """Whether there are other blocks than at the last look."""
        blocks = self._poll()
        if blocks == self.blocks:
            return False
        self.blocks, self.last = blocks, self.seconds
        return True


def run_round(
    patience: Patience, work: Callable[[], None], poll: Callable[[], int], tell: Callable[[str], None], title: str
) -> Round:
    """Runs a round, and tells what it is about to do.

    work: one pass of the workload, with the pause after it. poll: how many blocks there are so far.

    Raises:
        DynacutError: of the workload.
    """
    news = _News(poll)
    number = quiet = 0
    while news.seconds < patience.least or (number < patience.passes and quiet < patience.quiet):
        number += 1
        tell(f"{title}, pass {number}: {news.blocks:,} blocks so far")
        work()
        quiet = 0 if news.came() else quiet + 1
    came = True
    for _ in range(patience.lingers):
        came = _linger(patience.linger, news, tell)
        if not came:
            break
    return Round(number, news.seconds, news.blocks, news.last, quiet >= patience.quiet, not came)


def _linger(duration: float, news: _News, tell: Callable[[str], None]) -> bool:
    """Leaves the service to itself; whether that brought something new."""
    end, came = news.seconds + duration, False
    while (left := end - news.seconds) > 0:
        tell(f"left to itself for {left:.0f} s: {news.blocks:,} blocks so far")
        time.sleep(min(_STEP, left))
        came = news.came() or came
    return news.came() or came
