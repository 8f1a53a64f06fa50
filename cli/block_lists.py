"""Lists of code: the blocks that `learn` has put back, and where threads stand; printed, and written as drcov logs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacut.cli.console import SCHEMA, print_json, print_table
from dynacut.cli.quantities import counted

if TYPE_CHECKING:
    from dynacut.shared.coverage.coverage import Coverage

_SHOWN = 40


@dataclass(frozen=True)
class Kind:
    """name: in JSON. title: of the table. unit: what is counted, and done: how. nothing: said of an empty list."""

    name: str
    title: str
    unit: str
    done: str
    nothing: str


LEARNED = Kind("learned", "learned blocks, by their hits", "block", "learned", "nothing was learned")
STANDING = Kind(
    "standing", "where threads are, or return to", "place", "in use by threads", "no thread is in code of a file"
)


def show_blocks(
    listed: Coverage,
    kind: Kind,
    target: dict[str, Any],
    output: Path | None,
    *,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Shows the blocks; writes them, as drcov, where there is an output.

    target: what they are of, for JSON. verbose: all blocks of the table, not the first ones only.

    Raises:
        DynacutError: the log cannot be written.
    """
    from dynacut.shared.coverage.drcov import write

    if output is not None:
        write(output, listed)
    blocks = [(module.name, offset, size) for module in listed.modules for offset, size in module.blocks.items()]
    if as_json:
        rows = [{"at": f"{name}+{offset:#x}", "size": size} for name, offset, size in blocks]
        print_json({"schema": SCHEMA, "target": target, kind.name: rows, "log": str(output) if output else None})
    elif not quiet:
        _print(blocks, kind, output, limit=len(blocks) if verbose else _SHOWN)


def _print(blocks: Sequence[tuple[str, int, int]], kind: Kind, output: Path | None, *, limit: int) -> None:
    if blocks:
        rows = [[str(index), f"{name}+{offset:#x}", str(size)] for index, (name, offset, size) in enumerate(blocks, 1)]
        print_table(kind.title, ["", "at", "bytes"], rows[:limit], right=frozenset({0, 2}))
        if len(rows) > limit:
            print(f"… and {len(rows) - limit} more; -v shows them all")
    count = len(blocks)
    written = f" → {output}" if output is not None else ""
    print(f"{counted(count, kind.unit)} {kind.done}{written}" if count else kind.nothing + written)
