"""The results of `dynacut compare` as one page for a browser, which loads nothing and runs no script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynacut.cli.bars import Bar, Chart, Group
from dynacut.cli.compare.document import MEASURES, NOBODY, Measure, extent_of, rows_of, verdicts_of
from dynacut.cli.pages import FILES, page
from dynacut.cli.quantities import counted, shown, times
from dynacut.jobs.compare.ways import Step, Way

_HERE = Path(__file__).parent
_CHARTS = ("client_us", "new_client_us", "stopped_us", "wall_us")
_SUMMARY = ("client_us", "stopped_us")
_MOST_SINGLES = 5
_STYLES = (FILES / "picture.css", FILES / "bars.css", _HERE / "page.css")

Columns = list[tuple[str, str, dict[str, Any]]]
"""Way, step and figures."""


def page_of(document: dict[str, Any]) -> str:
    """The page for a document of document.document_of()."""
    target = document["target"]
    columns = rows_of(document)
    rows = [_row(measure, columns) for measure in MEASURES]
    return page(
        _HERE / "page.html.j2",
        _STYLES,
        target=target["name"],
        features=document["features"],
        extent=extent_of(target),
        probe=document["probe"],
        repeat=counted(document["repeat"], "time"),
        equal=document["equal"],
        left_out=document["left_out"],
        failed=document["failed"],
        broken_off=document["broken_off"],
        warnings=document["warnings"],
        summary=[measure.title for measure in MEASURES if measure.name in _SUMMARY],
        quiet=[shown(document[NOBODY][name]["median"], "µs") if name in document[NOBODY] else "" for name in _SUMMARY],
        ways=[_way(way, document["ways"]) for way in document["ways"]],
        charts=[_chart(measure, columns).drawn() for measure in MEASURES if measure.name in _CHARTS],
        columns=[{"way": way, "name": f"{way} {step}".strip()} for way, step, _ in columns],
        rows=[row for row in rows if any(cell["median"] for cell in row["cells"])],
        facts=_facts(document),
    )


def _way(way: dict[str, Any], ways: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the summary: the larger median of the two steps, and how many times that of the live way it is."""
    figures = []
    for measure in MEASURES:
        if measure.name in _SUMMARY:
            value = _larger(way, measure.name)
            ratio = _ratio(value, ways, measure.name) if way["way"] != Way.LIVE else ""
            text = "" if value is None else shown(value, measure.unit)
            figures.append({"title": measure.title, "text": text, "ratio": ratio})
    return {"name": way["way"], "description": way["title"], "figures": figures, "verdicts": verdicts_of(way)}


def _larger(way: dict[str, Any], name: str) -> float | None:
    return max((way[str(step)][name]["median"] for step in Step if name in way[str(step)]), default=None)


def _ratio(value: float | None, ways: list[dict[str, Any]], name: str) -> str:
    """Empty where the live way was not measured."""
    live = next((_larger(way, name) for way in ways if way["way"] == Way.LIVE), None)
    return f"{times(value / live)} live" if value and live else ""


def _chart(measure: Measure, columns: Columns) -> Chart:
    bars = [
        Bar(f"{way} {step}".strip(), way, figures[measure.name]["values"])
        for way, step, figures in columns
        if measure.name in figures
    ]
    title = f"{measure.title[0].upper()}{measure.title[1:]}"
    return Chart(title, measure.about, measure.unit, [Group("", bars)])


def _row(measure: Measure, columns: Columns) -> dict[str, Any]:
    cells = []
    for _, _, figures in columns:
        figure = figures.get(measure.name)
        values = [shown(value, measure.unit) for value in figure["values"]] if figure else []
        cells.append(
            {
                "median": shown(figure["median"], measure.unit) if figure else "",
                "singles": _singles(values, figure["values"]) if figure else [],
            }
        )
    return {"title": measure.title, "about": measure.about, "cells": cells}


def _singles(texts: list[str], values: list[float]) -> list[str]:
    """The single values, where they differ; of many the least and the largest."""
    if len(set(texts)) == 1:
        return []
    if len(texts) <= _MOST_SINGLES:
        return texts
    ends = [texts[values.index(end)] for end in (min(values), max(values))]
    return [f"{ends[0]} to {ends[1]}"]


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
