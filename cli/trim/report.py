"""The report of `dynacut trim`: report.json, report.html with the picture of the code, and what is printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dynacut.cli.console import print_table
from dynacut.shared.errors import printable
from dynacut.shared.report import SCHEMA

if TYPE_CHECKING:
    from dynacut.cli.trim.steps import Trim

_COLUMNS = ["", "module", "blocks", "bytes"]


def write_report(trim: Trim, steps: Sequence[str]) -> dict[str, Any]:
    """Writes report.json and report.html, from the files and the notes of the steps; returns what is in the former.

    Raises:
        DynacutError: a file is gone, or one cannot be written.
    """
    from dynacut.cli.plan_startup import read_union
    from dynacut.cli.show import page_of, write_page
    from dynacut.shared.picture import Phase, picture_of
    from dynacut.shared.plan import load
    from dynacut.shared.startup import startup_code
    from dynacut.shared.trim_report import module_reports, table_rows

    init, serving, learned, standing = (
        read_union([trim.path(f"{name}.drcov")]) for name in ("init", "serving", "learned", "standing")
    )
    last = trim.state.details(steps[-1]) or {}
    parts = startup_code(init, [serving], trim.tracer.modules)
    gadgets = {path: (before, after) for path, (before, after) in last["gadgets"].items()}
    modules = module_reports(parts, load(trim.path("plan.toml")), learned, standing, gadgets)
    rows = table_rows(modules, last)
    document = {
        "schema": SCHEMA,
        "target": {"pid": last["pid"], "exe": last["exe"]},
        "modules": [module.as_json() for module in modules],
        "memory": {"before": last["memory_before"], "after": last["memory_after"]},
        "unmapped_pages": last["unmapped_pages"],
        "hits": last["hits"],
        "steps": {name: trim.state.details(name) for name in steps},
        "plan": str(trim.path("plan.toml")),
        "html": str(trim.path("report.html")),
        "table": rows,
    }
    write_page(trim.path("report.json"), json.dumps(document, indent=2) + "\n")
    phases = [Phase("start-up", init), Phase("serving", serving)]
    picture = picture_of(phases, [module.path for module in modules])
    write_page(trim.path("report.html"), page_of(picture, (_COLUMNS, rows)))
    return document


def print_report(document: dict[str, Any], *, ended: bool) -> None:
    """Prints the table, and where everything is."""
    print_table("trimmed", _COLUMNS, document["table"], right=frozenset({2, 3}))
    print(f"the plan: {printable(document['plan'])}; the picture: {printable(document['html'])}")
    pid = document["target"]["pid"]
    print(f"process {pid} was ended" if ended else f"process {pid} runs on, trimmed")
