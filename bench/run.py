"""Measures dynacut beside its peers: a table, and JSON. `make bench` runs it, as root."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(_ROOT)

from bench import arm, checkpoint, hit, redis_command, stop, trace, trim  # noqa: E402
from bench.figures import Claim, Table  # noqa: E402
from bench.machine import describe, take_cores  # noqa: E402
from bench.programs import BenchmarkError  # noqa: E402

SCHEMA = 1
BENCHMARKS = {
    "stop": stop.run,
    "redis": redis_command.run,
    "hit": hit.run,
    "trace": trace.run,
    "arm": arm.run,
    "checkpoint": checkpoint.run,
    "trim": trim.run,
}


def main() -> int:
    """Runs the benchmarks that were asked for; 0 also where a claim does not hold."""
    arguments = _arguments()
    if os.geteuid() != 0:
        print("bench: patching other processes needs root: sudo make bench", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cores = take_cores()
    machine = describe(cores)
    repeat = arguments.repeat or (2 if arguments.quick else 10)
    names = [name for name in BENCHMARKS if not arguments.only or name in arguments.only]
    started = time.time()
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "machine": machine,
        "repeat": repeat,
        "quick": arguments.quick,
        "load": [round(os.getloadavg()[0], 1)],
    }
    figures: list[dict[str, Any]] = []
    claims: list[Claim] = []
    print(_head(machine, repeat), flush=True)
    progress = _Progress()
    for name in names:
        with tempfile.TemporaryDirectory(prefix="dynacut-bench-") as folder:
            _use_caches(Path(folder))
            try:
                result = BENCHMARKS[name](cores, Path(folder), repeat, quick=arguments.quick, progress=progress)
            except KeyboardInterrupt:
                progress("")
                print("bench: interrupted", file=sys.stderr)
                return 130
            except (BenchmarkError, OSError, subprocess.SubprocessError, TimeoutError) as error:
                progress("")
                print(f"bench: {name}: {error}", file=sys.stderr)
                return 1
        progress("")
        figures.extend(result.figures.as_json())
        claims.extend(result.claims)
        for table in result.tables:
            _print_table(table)
    for claim in claims:
        print(f"claim {claim.text}: {claim.figure}: {'holds' if claim.holds else 'DOES NOT HOLD'}")
    document["load"].append(round(os.getloadavg()[0], 1))
    document |= {"seconds": round(time.time() - started), "figures": figures, "claims": [c.as_json() for c in claims]}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    print(f"bench: {arguments.json}", file=sys.stderr)
    return 0


def _use_caches(folder: Path) -> None:
    """Caches of its own, filled by a first run: what earlier runs, or this environment, left or forbid does not matter.

    dynacut keeps block maps; Python keeps bytecode, which every installed command has.
    """
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases and repetitions: a minute")
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--repeat", type=int, metavar="N", help="repetitions (default: 10, with --quick 2)")
    parser.add_argument(
        "--json", type=Path, default=_ROOT / "build/bench.json", metavar="FILE", help="default: build/bench.json"
    )
    return parser.parse_args()


def _head(machine: dict[str, Any], repeat: int) -> str:
    kind = "virtual machine" if machine["virtual"] else "machine"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {kind}, Linux {machine['kernel']}, Python {machine['python']}, "
        f"{machine['gdb'] or 'no gdb'}; {repeat} repetitions; load {os.getloadavg()[0]:.1f} at the start"
    )


class _Progress:
    """One line that changes, on a terminal; elsewhere a line for each repetition."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, line: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
            return
        step = line.partition(",")[0]
        if step not in ("", self._last):
            print(step, file=sys.stderr, flush=True)
        self._last = step


def _print_table(table: Table) -> None:
    if sys.stdout.isatty():
        _print_rich(table)
    else:
        _print_plain(table.title, [table.columns, *table.rows])
    for note in table.notes:
        print(f"  {note}")
    print()


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


if __name__ == "__main__":
    sys.exit(main())
