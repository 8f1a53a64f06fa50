"""The blocks that `learn` has put back, shown in the order of their hits, and written as a log of what has to stay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacut.cli.console import print_json, print_table
from dynacut.shared.report import SCHEMA

if TYPE_CHECKING:
    from dynacut.shared.coverage import Coverage

_SHOWN = 40


def show_learned(
    learned: Coverage, target: dict[str, Any], output: Path | None, *, as_json: bool, verbose: bool, quiet: bool
) -> None:
    """Shows the blocks; writes them, as drcov, where there is an output.

    target: what they are of, for JSON. verbose: all blocks of the table, not the first ones only.

    Raises:
        DynacutError: the log cannot be written.
    """
    from dynacut.shared.drcov import write

    if output is not None:
        write(output, learned)
    blocks = [(module.name, offset, size) for module in learned.modules for offset, size in module.blocks.items()]
    if as_json:
        rows = [{"at": f"{name}+{offset:#x}", "size": size} for name, offset, size in blocks]
        print_json({"schema": SCHEMA, "target": target, "learned": rows, "log": str(output) if output else None})
    elif not quiet:
        _print(blocks, output, limit=len(blocks) if verbose else _SHOWN)


def _print(blocks: Sequence[tuple[str, int, int]], output: Path | None, *, limit: int) -> None:
    if blocks:
        rows = [[str(index), f"{name}+{offset:#x}", str(size)] for index, (name, offset, size) in enumerate(blocks, 1)]
        print_table("learned blocks, by their hits", ["", "block", "bytes"], rows[:limit], right=frozenset({0, 2}))
        if len(rows) > limit:
            print(f"… and {len(rows) - limit} more; -v shows them all")
    count = len(blocks)
    written = f" → {output}" if output is not None else ""
    print(f"{count:,} block{'' if count == 1 else 's'} learned{written}" if count else f"nothing was learned{written}")
