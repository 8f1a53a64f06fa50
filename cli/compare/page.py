"""The results of `dynacut compare` as one page for a browser, which loads nothing and runs no script."""

from __future__ import annotations

from math import ceil, floor, log10
from pathlib import Path
from typing import Any, NamedTuple

from dynacut.cli.compare.document import MEASURES, Measure, counted, extent_of, rows_of, shown, verdicts_of

_FILES = Path(__file__).parent
_CHARTS = ("client_us", "new_client_us", "stopped_us", "wall_us")
_LEAST_US = 1.0


class _Mark(NamedTuple):
    """A place on a scale: at, in percent of its width."""

    at: float
    text: str


def page_of(document: dict[str, Any]) -> str:
    """The page for a document of document.document_of()."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_FILES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = "".join(file.read_text("utf-8") for file in (_FILES.parent / "picture.css", _FILES / "page.css"))
    target = document["target"]
    columns = rows_of(document)
    return environment.get_template("page.html.j2").render(
        style=Markup(style),
        target=target["name"],
        features=document["features"],
        extent=extent_of(target),
        probe=document["probe"],
        repeat=counted(document["repeat"], "time"),
        left_out=document["left_out"],
        warnings=document["warnings"],
        ways=[
            {"name": way["way"], "description": way["title"], "verdicts": verdicts_of(way)} for way in document["ways"]
        ],
        charts=[_chart(measure, columns) for measure in MEASURES if measure.name in _CHARTS],
        columns=[{"way": way, "name": f"{way} {step}".strip()} for way, step, _ in columns],
        rows=[_row(measure, columns) for measure in MEASURES],
        facts=_facts(document),
    )


def _chart(measure: Measure, columns: list[tuple[str, str, dict[str, Any]]]) -> dict[str, Any]:
    """Bars on a logarithmic scale, of whole powers of ten."""
    drawn = [
        (way, f"{way} {step}".strip(), figures[measure.name])
        for way, step, figures in columns
        if measure.name in figures
    ]
    values = [max(_LEAST_US, value) for _, _, figure in drawn for value in figure["values"]] or [_LEAST_US]
    low = floor(log10(min(values)))
    high = max(ceil(log10(max(values))), low + 1)

    def mark(value: float, text: str) -> _Mark:
        return _Mark(round(100 * (log10(max(_LEAST_US, value)) - low) / (high - low), 2), text)

    return {
        "title": f"{measure.title[0].upper()}{measure.title[1:]}",
        "about": measure.about,
        "ticks": [mark(10.0**power, _power(power)) for power in range(low, high + 1)],
        "rows": [
            {
                "way": way,
                "name": name,
                "at": mark(figure["median"], "").at,
                "text": shown(figure["median"], measure.unit),
                "dots": [mark(value, shown(value, measure.unit)) for value in figure["values"]],
            }
            for way, name, figure in drawn
        ],
    }


def _power(power: int) -> str:
    """A power of ten in µs, without digits behind the point."""
    name = ("µs", "ms", "s")[min(power // 3, 2)]
    return f"{10 ** (power - 3 * min(power // 3, 2))} {name}"


def _row(measure: Measure, columns: list[tuple[str, str, dict[str, Any]]]) -> dict[str, Any]:
    cells = []
    for _, _, figures in columns:
        figure = figures.get(measure.name)
        values = [shown(value, measure.unit) for value in figure["values"]] if figure else []
        cells.append(
            {
                "median": shown(figure["median"], measure.unit) if figure else "",
                "singles": ", ".join(values) if len(set(values)) > 1 else "",
            }
        )
    return {"title": measure.title, "about": measure.about, "cells": cells}


def _facts(document: dict[str, Any]) -> list[tuple[str, str]]:
    machine = document["machine"]
    virtual = ", virtual" if machine["virtual"] else ""
    facts = [
        ("machine", f"{counted(machine['cores'], 'core')}, {machine['cpu']}{virtual}; {machine['memory_mib']:,} MiB"),
        *((name, machine[name.lower()] or "not found") for name in ("kernel", "Python", "gdb", "CRIU")),
        ("plan", document["plan"]),
        ("taken", document["taken"]),
    ]
    return [(name, str(text)) for name, text in facts]
