"""How the commands speak: errors and logs on stderr, tables on a terminal, JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from dynacut.cli.steps import clear_line
from dynacut.shared.errors import DynacutError, printable

SCHEMA = 1
"""Of every JSON document that a command prints."""


def print_error(error: DynacutError) -> None:
    """One line saying what is wrong, the details a line each, one line saying what to do."""
    clear_line()
    print(f"dynacut: {error.problem}", file=sys.stderr)
    for detail in error.details:
        print(f"  - {detail}", file=sys.stderr)
    if error.advice:
        print(f"dynacut: {error.advice}", file=sys.stderr)


def print_error_json(problem: str, advice: str, details: Sequence[str], status: int) -> None:
    """The same as a JSON document on stdout, so that a script that reads one gets one; unless stdout takes none."""
    error = {"problem": problem, "details": list(details), "advice": advice, "status": int(status)}
    with suppress(OSError, ValueError):
        print_json({"schema": SCHEMA, "error": error})
        sys.stdout.flush()


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document, indent=2 if sys.stdout.isatty() else None))


def print_table(title: str, columns: list[str], rows: list[list[str]], *, right: frozenset[int] = frozenset()) -> None:
    """A table: drawn on a terminal, tab-separated without title elsewhere. right: columns aligned to the right."""
    if not sys.stdout.isatty():
        print("\t".join(column.upper() for column in columns))
        for row in rows:
            print("\t".join(map(printable, row)))
        return
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    Console().print(table)


def warn(line: str) -> None:
    """A warning on stderr."""
    clear_line()
    print(f"dynacut: warning: {printable(line)}", file=sys.stderr)
