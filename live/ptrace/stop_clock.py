"""How long threads were stopped, by dynacut's own clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StopClock:
    """The sum over all stops, and the longest one, in nanoseconds."""

    total_ns: int = 0
    longest_ns: int = 0
    stops: int = 0

    def add(self, stopped_ns: int) -> None:
        """Counts one stop."""
        self.total_ns += stopped_ns
        self.longest_ns = max(self.longest_ns, stopped_ns)
        self.stops += 1
