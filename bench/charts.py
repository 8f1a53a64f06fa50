"""Which figures are drawn, and how: peers side by side, a group for each case."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from bench.figures import DYNACUT
from dynacut.cli.bars import Bar, Chart, Group
from dynacut.cli.quantities import times

_UNITS = {"_us": "µs", "_ms": "ms", "_ns": "ns", "_bytes": "B", "_per_s": ""}
"""What a measure's name ends in, of those that can be drawn."""
_LOOKS = {
    "nobody": "quiet",
    "undisturbed": "quiet",
    "floor": "quiet",
    "image": "quiet",
    DYNACUT: "dynacut",
    "layer": "dynacut",
    "flat": "gdb-best",
    "crit": "criu",
    "crit, in one run": "criu",
    "gdb": "gdb",
    "gdb, best": "gdb-best",
    "gdb, dlopen": "gdb",
    "gdb/MI": "gdb-best",
    "CRIU": "criu",
    "pyinjector": "injector",
    "callgrind": "callgrind",
}
_OTHER_LOOK = "other"

Case = dict[str, Any]


def _any_case(_: Case) -> bool:
    return True


def _alone_or_waiting(case: Case) -> bool:
    """Of the settings of `stop`: those in which gdb was measured as well, the extremes of the sites."""
    return bool(case["observer"] == ("main" if case["threads"] == 1 else "other") and case["sites"] != 100)


@dataclass(frozen=True)
class _Drawn:
    """A chart of one measure.

    noise: a measure of dynacut's rows that shows what there is with nobody at work. own: whose figures the others are
    compared with.
    """

    title: str
    about: str
    measure: str
    noise: str = ""
    cases: Callable[[Case], bool] = _any_case
    own: str = DYNACUT


_DRAWN = {
    "stop": [
        _Drawn(
            "The stop, switching off",
            "the longest gap that a spinning thread of the target saw, in any of its threads",
            "on_stop_us",
            "quiet_us",
            _alone_or_waiting,
        ),
        _Drawn("The whole command, switching off", "wall time", "on_wall_ms", cases=_alone_or_waiting),
    ],
    "redis": [
        _Drawn(
            "The slowest PING, switching SET off",
            "of a client that sends one after the other",
            "on_ping_us",
            "quiet_us",
        ),
        _Drawn("The whole command, switching SET off", "wall time", "on_wall_ms"),
    ],
    "ways": [
        _Drawn("A client waited", "on an open connection, at the longest", "client_us"),
        _Drawn("Threads stopped", "as each way says itself", "stopped_us"),
        _Drawn("The whole command", "wall time", "wall_us"),
        _Drawn("Written to files", "the image and the rewritten layer", "written_bytes"),
    ],
    "library": [
        _Drawn("The stop, loading a library", "the longest gap that the spinning main thread saw", "load_stop_us"),
        _Drawn("The whole command", "wall time", "load_wall_ms"),
    ],
    "hit": [_Drawn("A call of a disabled function", "", "call_ns")],
    "checkpoint": [
        _Drawn("Rewriting", "inside the rewriter; by crit through JSON", "rewrite_ms", own="layer"),
        _Drawn("Written to files", "for the rewritten image", "written_bytes", own="layer"),
        _Drawn("CRIU’s restore", "image: of the unmodified one", "restore_ms", own="layer"),
    ],
    "trace": [
        _Drawn("Requests per second while tracing: SET", "redis-benchmark; more is better", "set_per_s"),
        _Drawn("Requests per second while tracing: GET", "redis-benchmark; more is better", "get_per_s"),
    ],
    "arm": [
        _Drawn("The slowest PING while blocks are armed", "of a client of redis", "arm_ping_us", "quiet_ping_us"),
        _Drawn("… when a new phase begins", "all are armed again", "phase_ping_us", "quiet_ping_us"),
    ],
}


def charts_of(benchmark: str, figures: Sequence[dict[str, Any]]) -> list[Chart]:
    """The charts of a benchmark's figures, as Figures.as_json() gives them. What is not listed here is drawn as well,
    if it is a time or a size and there is something to compare it with."""
    wanted = _DRAWN.get(benchmark)
    if wanted is None:
        wanted = [_Drawn(_words(measure), "", measure) for measure in _comparable(figures)]
    found = (_chart(each, figures) for each in wanted)
    return [chart for chart in found if chart is not None]


def _comparable(figures: Sequence[dict[str, Any]]) -> list[str]:
    """The measures that can be drawn, and that several were measured by."""
    by_measure: dict[str, set[str]] = {}
    for each in figures:
        by_measure.setdefault(each["measure"], set()).add(each["peer"])
    return [name for name, measured in by_measure.items() if len(measured) > 1 and _unit(name) is not None]


def _unit(measure: str) -> str | None:
    return next((unit for suffix, unit in _UNITS.items() if measure.endswith(suffix)), None)


def _chart(drawn: _Drawn, figures: Sequence[dict[str, Any]]) -> Chart | None:
    unit = _unit(drawn.measure)
    rows = [
        each
        for each in figures
        if drawn.cases(each["case"])
        and (
            each["measure"] == drawn.measure
            or (drawn.noise == each["measure"] and each["peer"] in (drawn.own, "nobody"))
        )
    ]
    if unit is None or not any(each["peer"] == drawn.own for each in rows):
        return None
    cases = sorted({_name(each["case"]): each["case"] for each in rows}.values(), key=_order(rows))
    groups = [Group(_name(case), list(_bars([each for each in rows if each["case"] == case], drawn))) for case in cases]
    if all(len(group.bars) == 1 for group in groups):
        bars = [replace(group.bars[0], name=group.title) for group in groups]
        groups = [Group("", sorted(bars, key=lambda bar: median(bar.values)))]
    return Chart(drawn.title, drawn.about, unit, groups)


def _order(rows: Sequence[dict[str, Any]]) -> Callable[[Case], list[int]]:
    """A key to sort cases by: numbers by their size, words as they come first."""
    words = list(dict.fromkeys(str(value) for row in rows for value in row["case"].values()))
    return lambda case: [value if isinstance(value, int) else words.index(str(value)) for value in case.values()]


def _bars(rows: Sequence[dict[str, Any]], drawn: _Drawn) -> Iterable[Bar]:
    """Those of nobody first, then dynacut, then its peers; these with how many times dynacut's it is."""
    own = next((row["median"] for row in rows if row["peer"] == drawn.own and row["measure"] == drawn.measure), 0)
    named = [("nobody" if row["measure"] == drawn.noise else row["peer"], row) for row in rows]
    order = list(_LOOKS)
    named.sort(key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    for name, row in named:
        look = _LOOKS.get(name, _OTHER_LOOK)
        is_peer = look not in ("quiet", "dynacut") and own and row["median"]
        yield Bar(name, look, row["values"], times(row["median"] / own) if is_peer else "")


def _name(case: Case) -> str:
    """In words: "8 threads, 10,000 sites"."""
    words = []
    for key, value in case.items():
        if isinstance(value, int):
            words.append(f"{value:,} {key.removesuffix('s') if value == 1 else key}".replace("_", " "))
        elif key == "observer":
            continue
        else:
            words.append(str(value))
    return ", ".join(words)


def _words(measure: str) -> str:
    suffix = next(suffix for suffix in _UNITS if measure.endswith(suffix))
    text = measure.removesuffix(suffix).replace("_", " ")
    return f"{text[:1].upper()}{text[1:]}"
