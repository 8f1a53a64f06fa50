"""Charts of bars on a logarithmic scale for pages that load nothing and run no script: bars.html.j2 draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from statistics import median
from typing import Any, NamedTuple

from dynacut.cli.quantities import in_us, is_time, shown

_DECIMAL = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_MOST_TICKS = 5
"""So many have a text, and the others only a line."""


_MOST_LETTERS = 44
"""So long names are shown as a whole."""


class Mark(NamedTuple):
    """A place on a scale: at, in percent of its width."""

    at: float
    text: str


@dataclass(frozen=True)
class Bar:
    """What is drawn in a row. look: the class of its colour. values: at least one, in the unit of the chart.

    after: what is said behind the median, such as how many times that of another it is.
    """

    name: str
    look: str
    values: Sequence[float]
    after: str = ""


@dataclass(frozen=True)
class Group:
    """Bars under a title of their own, to be compared with each other."""

    title: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Chart:
    """All bars have one scale. unit: a unit of time, "B" for bytes, or none."""

    title: str
    about: str
    unit: str
    groups: Sequence[Group]

    def drawn(self) -> dict[str, Any]:
        """For the template. A bar ends at the median, each value is a dot; a value of zero lies at the left edge."""
        values = [value for group in self.groups for bar in group.bars for value in bar.values if value > 0] or [1.0]
        low = floor(log10(min(values)))
        high = max(ceil(log10(max(values))), low + 1)

        def mark(value: float, text: str = "") -> Mark:
            place = (log10(value) - low) / (high - low) if value > 0 else 0.0
            return Mark(round(100 * min(max(place, 0.0), 1.0), 2), text)

        step = 1 + (high - low) // _MOST_TICKS
        return {
            "title": self.title,
            "about": self.about,
            "name_width": min(
                max((len(bar.name) for group in self.groups for bar in group.bars), default=0), _MOST_LETTERS
            ),
            "ticks": [
                mark(10.0**power, "" if (power - low) % step else _power(power, self.unit))
                for power in range(low, high + 1)
            ],
            "groups": [
                {
                    "title": group.title,
                    "rows": [
                        {
                            "look": bar.look,
                            "name": bar.name,
                            "at": mark(median(bar.values)).at,
                            "text": shown(median(bar.values), self.unit),
                            "after": bar.after,
                            "dots": [mark(value, shown(value, self.unit)) for value in bar.values],
                        }
                        for bar in group.bars
                    ],
                }
                for group in self.groups
            ],
        }


def _power(power: int, unit: str) -> str:
    """A power of ten of a unit, without digits behind the point where there is a smaller unit."""
    value = 10.0**power
    if unit == "B":
        factor, name = next(((factor, name) for factor, name in _DECIMAL if value >= factor), (1.0, "B"))
        return f"{value / factor:,.0f} {name}"
    if not is_time(unit):
        return shown(value, unit)
    for factor, name in ((1e6, "s"), (1e3, "ms"), (1.0, "µs")):
        if in_us(value, unit) >= factor * 0.999:
            return f"{in_us(value, unit) / factor:,.0f} {name}"
    return f"{in_us(value, unit) * 1e3:.3g} ns"
