"""Tables and claims for a terminal, or for a file."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from bench.figures import Claim, Table


def print_tables(tables: Sequence[Table]) -> None:
    """Drawn on a terminal, in plain columns elsewhere; the notes of each below it."""
    for table in tables:
        if sys.stdout.isatty():
            _print_rich(table)
        else:
            _print_plain(table.title, [table.columns, *table.rows])
        for note in table.notes:
            print(f"  {note}")
        print()


def print_claims(claims: Sequence[Claim]) -> None:
    """A line each."""
    for claim in claims:
        print(f"claim {claim.text}: {claim.figure}: {'holds' if claim.holds else 'DOES NOT HOLD'}")


def _print_rich(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    rich = RichTable(title=table.title, title_justify="left")
    for index, column in enumerate(table.columns):
        rich.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in table.rows:
        rich.add_row(*row)
    # Cells are not to be folded on a narrow terminal.
    width = max(
        shutil.get_terminal_size().columns, 3 * len(table.columns) + 1 + sum(_widths([table.columns, *table.rows]))
    )
    Console(width=width).print(rich)


def _print_plain(title: str, rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}")
    widths = _widths(rows)
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
