"""The report of `dynacut trim`: report.json, report.html with the picture of the code, and what is printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacut.cli.console import SCHEMA, print_table
from dynacut.shared.errors import printable
from dynacut.shared.proc import is_alive

if TYPE_CHECKING:
    from dynacut.jobs.trim.steps import Trim
    from dynacut.shared.coverage.coverage import Coverage
    from dynacut.shared.coverage.painter import Phase


def write_report(trim: Trim, steps: Sequence[str]) -> dict[str, Any]:
    """Writes report.json and report.html, from the files and the notes of the steps; returns what is in the former.

    Raises:
        DynacutError: a file is gone, or one cannot be written.
    """
    from dynacut.cli.pages import write_text
    from dynacut.cli.picture import page_of
    from dynacut.jobs.trim import outcome
    from dynacut.shared.coverage.drcov import read_union
    from dynacut.shared.coverage.keep import planned_code
    from dynacut.shared.coverage.painter import picture_of
    from dynacut.shared.coverage.startup import startup_code
    from dynacut.shared.plan_file import load

    init, serving, learned, standing = (
        read_union([trim.path(f"{name}.drcov")], trim.warn) for name in ("init", "serving", "learned", "standing")
    )
    last = trim.instance.state.details(steps[-1]) or {}
    parts = startup_code(init, [serving], trim.modules)
    gadgets = {path: (before, after) for path, (before, after) in last["gadgets"].items()}
    plan = load(trim.path("plan.toml"))
    modules = outcome.module_reports(parts, plan, learned, standing, gadgets)
    noted = {name: trim.instance.state.details(name) or {} for name in steps}
    rounds = outcome.rounds_of(noted)
    summary = outcome.summary_of(modules, noted, trim.on_hit, last["pid"])
    tables = [
        {"columns": outcome.CODE_COLUMNS, "rows": outcome.code_rows(modules)},
        {"columns": outcome.CHANGE_COLUMNS, "rows": outcome.change_rows(modules, last)},
        {"columns": outcome.ROUND_COLUMNS, "rows": outcome.round_rows(rounds)},
    ]
    document = {
        "schema": SCHEMA,
        "target": {"pid": last["pid"], "exe": last["exe"]},
        "modules": [module.as_json() for module in modules],
        "memory": {"before": last["memory_before"], "after": last["memory_after"]},
        "text_pages": last["text_pages"],
        "unmapped_pages": last["unmapped_pages"],
        "hits": last["hits"],
        "on_hit": str(trim.on_hit),
        "rounds": rounds,
        "summary": summary,
        "steps": noted,
        "plan": str(trim.path("plan.toml")),
        "html": str(trim.path("report.html")),
        "tables": tables,
    }
    write_text(trim.path("report.json"), json.dumps(document, indent=2) + "\n")
    phases = _phases(init, serving, planned_code(plan))
    picture = picture_of(phases, [module.path for module in modules])
    program = Path(trim.tracer.service.command[0] if trim.tracer.service.command else last["exe"])
    title = f"{program.name}, trimmed"
    write_text(trim.path("report.html"), page_of(picture, tables, title=title, summary=summary))
    return document


def _phases(init: Coverage, serving: Coverage, removed: Coverage) -> list[Phase]:
    """What the picture shows of start-up and service."""
    from dynacut.shared.coverage.painter import Phase

    return [
        Phase("kept start-up", init.difference(removed)),
        Phase("serving", serving),
        Phase("removed start-up", removed),
    ]


def print_report(document: dict[str, Any], *, ended: bool) -> None:
    """Prints the tables, and where everything is."""
    titles = ("start-up code", "the service, before and after", "rounds of the workload")
    for title, table in zip(titles, document["tables"], strict=True):
        print_table(title, table["columns"], table["rows"], right=frozenset({2, 3, 4}))
    for line in document["summary"]:
        print(printable(line))
    print(f"the plan: {printable(document['plan'])}; the picture: {printable(document['html'])}")
    pid = document["target"]["pid"]
    if ended:
        print(f"process {pid} was ended")
    else:
        print(f"process {pid} runs on, trimmed" if is_alive(pid) else f"process {pid}, trimmed, has ended since")
