"""What a trace finds while it runs: one line on a terminal, elsewhere a line for each phase."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

from dynacut.cli.steps import Steps
from dynacut.shared.errors import printable

_RATE_SECONDS = 1.0
"""New blocks per second are those of so many last seconds."""
_WORTH_SAYING = 2.0
"""Seconds without a new block."""


class Progress:
    """Blocks of the phase that runs. names: what to call each module, by its path; one needs no name.

    several: processes with counters of their own are watched, so that a block counts once for each that has hit it.
    """

    def __init__(self, names: Mapping[str, str], *, shown: bool, several: bool = False) -> None:
        self._names = names
        self._what = "first hits in all processes" if several else "blocks"
        self._shown = shown
        self._line = Steps(shown=shown)
        self._seen: deque[tuple[float, int]] = deque()
        self._modules = ""
        self.last_new = time.monotonic()
        """When a new block was last seen, or the phase began."""

    def begin(self) -> None:
        """A phase begins: nothing is found yet."""
        self._seen.clear()
        self._modules = ""
        self.last_new = time.monotonic()

    def is_new(self, blocks: int) -> bool:
        """Notes how many blocks the phase has; whether these are other ones than at the last time."""
        now = time.monotonic()
        before = self._seen[-1][1] if self._seen else 0
        self._seen.append((now, blocks))
        while len(self._seen) > 2 and self._seen[1][0] < now - _RATE_SECONDS:
            self._seen.popleft()
        if blocks != before:
            self.last_new = now
        return blocks != before

    def show(self, phase: str, modules: Mapping[str, int] | None) -> None:
        """Shows what was noted last. modules: blocks by path; None: as before."""
        if not self._seen:
            return
        if modules is not None:
            self._modules = self.by_module(modules)
        now, blocks = self._seen[-1]
        then, before = self._seen[0]
        rate = (blocks - before) / (now - then) if now > then else 0.0
        quiet = now - self.last_new
        news = f"nothing new for {quiet:.0f} s" if quiet > _WORTH_SAYING else f"{rate:,.0f} new per second"
        self._line.show(f"phase {phase}: {blocks:,} {self._what}{self._modules}, {news}")

    def by_module(self, modules: Mapping[str, int]) -> str:
        """` (redis-server 812, libssl.so.3 45)`, the most first; empty where there is one module only."""
        if len(self._names) < 2:
            return ""
        most_first = sorted(modules.items(), key=lambda item: -item[1])
        return f" ({', '.join(f'{printable(self._names[path])} {count:,}' for path, count in most_first if count)})"

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._shown:
            self._line.say(line)

    def say_for_now(self, line: str) -> None:
        """A line that goes with the next one; nothing where there is no terminal."""
        self._line.show(line)
