"""Measured values, and what is said of them: median, minimum, 90th percentile, maximum, ratio to a peer.

A measure's name ends in its unit, as the fields of dynacut's JSON do: stop_us, wall_ms, call_ns.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Case = tuple[tuple[str, str | int], ...]
"""What was varied: (("threads", 8), ("sites", 100))."""

DYNACUT = "dynacut"
PEERS = ("gdb", "gdb, best")


def case(**varied: str | int) -> Case:
    """case(threads=8, sites=100)."""
    return tuple(varied.items())


@dataclass(frozen=True)
class Summary:
    """Of one measure's values. p90: the smallest value that 90% of all do not exceed."""

    count: int
    median: float
    min: float
    p90: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        ordered = sorted(values)
        p90 = ordered[math.ceil(0.9 * len(ordered)) - 1]
        return cls(len(ordered), statistics.median(ordered), ordered[0], p90, ordered[-1])


class Figures:
    """All values of one benchmark, by case, by who was measured and by measure."""

    def __init__(self, benchmark: str) -> None:
        self.benchmark = benchmark
        self._values: dict[tuple[Case, str, str], list[float]] = {}

    def add(self, case: Case, peer: str, measure: str, value: float) -> None:
        self._values.setdefault((case, peer, measure), []).append(value)

    def values(self, case: Case, peer: str, measure: str) -> Sequence[float]:
        """In the order they were measured; none where that was not measured."""
        return self._values.get((case, peer, measure), ())

    def median(self, case: Case, peer: str, measure: str) -> float | None:
        values = self.values(case, peer, measure)
        return statistics.median(values) if values else None

    def medians(self, peer: str, measure: str) -> dict[Case, float]:
        """Of every case in which that was measured."""
        return {
            case: statistics.median(values)
            for (case, of_peer, of_measure), values in self._values.items()
            if (of_peer, of_measure) == (peer, measure)
        }

    def as_json(self) -> Iterator[dict[str, Any]]:
        """An object for each measure; its ratio is the peer's median over dynacut's."""
        for (case, peer, measure), values in self._values.items():
            summary = Summary.of(values)
            ratios = {
                other: round(median / summary.median, 2)
                for other in PEERS
                if peer == DYNACUT and summary.median and (median := self.median(case, other, measure)) is not None
            }
            yield {
                "benchmark": self.benchmark,
                "case": dict(case),
                "peer": peer,
                "measure": measure,
                "count": summary.count,
                "median": round(summary.median, 3),
                "min": round(summary.min, 3),
                "p90": round(summary.p90, 3),
                "max": round(summary.max, 3),
                **({"ratio": ratios} if ratios else {}),
                "values": [round(value, 3) for value in values],
            }


@dataclass(frozen=True)
class Table:
    """For people. notes: what one must know to read it, a line each."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        return {"title": self.title, "columns": self.columns, "rows": self.rows, "notes": self.notes}


@dataclass(frozen=True)
class Claim:
    """What is claimed of dynacut, and what was measured."""

    text: str
    figure: str
    holds: bool

    def as_json(self) -> dict[str, Any]:
        return {"claim": self.text, "figure": self.figure, "holds": self.holds}


@dataclass(frozen=True)
class Result:
    """What a benchmark gives. not_measured: what could not be, and why, a line each."""

    figures: Figures
    tables: Sequence[Table]
    claims: Sequence[Claim]
    not_measured: Sequence[str] = ()


def number(value: float | None) -> str:
    """Three digits: 0.12, 1.23, 12.3, 123, 12,345; a dash for what was not measured."""
    if value is None:
        return "-"
    for limit, digits in ((10, 2), (100, 1)):
        if abs(value) < limit:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"


def spread(values: Sequence[float]) -> str:
    """Median, and in brackets the 90th percentile."""
    if not values:
        return "-"
    summary = Summary.of(values)
    return f"{number(summary.median)} ({number(summary.p90)})"
