"""Measures dynacut beside its peers: tables, JSON and a page for a browser. `make bench` runs it, as root."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(_ROOT)

from bench import arm, checkpoint, hit, kill, library, redis_command, stop, trace, trim, ways  # noqa: E402
from bench.figures import Result  # noqa: E402
from bench.machine import Cores, describe, take_cores  # noqa: E402
from bench.page import page_of  # noqa: E402
from bench.peers import peers  # noqa: E402
from bench.programs import BenchmarkError  # noqa: E402
from bench.tables import print_claims, print_tables  # noqa: E402
from dynacut.shared.errors import DynacutError  # noqa: E402

SCHEMA = 1
QUICK_REPEAT = 2
_FAILURES = (BenchmarkError, DynacutError, OSError, subprocess.SubprocessError, TimeoutError)
"""What a benchmark raises that cannot do its work; anything else is a mistake in it, and traced back."""


@dataclass(frozen=True)
class Benchmark:
    """run(cores, folder, repeat, quick=…, progress=…) measures. repeat: repetitions that fit into a few minutes."""

    name: str
    title: str
    run: Callable[..., Result]
    repeat: int


BENCHMARKS = (
    Benchmark("stop", "The stop that the target sees", stop.run, 4),
    Benchmark("redis", "One command of redis-server", redis_command.run, 6),
    Benchmark("ways", "Live, gdb/MI and checkpoint on redis-server", ways.run, 3),
    Benchmark("library", "Loading a library", library.run, 6),
    Benchmark("kill", "Killed at any instant", kill.run, 1),
    Benchmark("hit", "What a hit costs", hit.run, 6),
    Benchmark("checkpoint", "Dump, rewriting and restore of an image", checkpoint.run, 3),
    Benchmark("trace", "What tracing costs", trace.run, 3),
    Benchmark("arm", "How long clients wait while blocks are armed", arm.run, 4),
    Benchmark("trim", "A server without its start-up code", trim.run, 3),
)


def main() -> int:
    """Runs the benchmarks that were asked for; 0 also where a claim does not hold, 1 where a benchmark has failed."""
    arguments = _arguments()
    if os.geteuid() != 0:
        print("bench: patching other processes needs root: sudo make bench", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cores = take_cores()
    document = _begun(arguments, describe(cores))
    print(_head(document["machine"]), flush=True)
    status = 0
    for benchmark in BENCHMARKS:
        if arguments.only and benchmark.name not in arguments.only:
            continue
        try:
            measured = _measured(benchmark, arguments, cores)
        except KeyboardInterrupt:
            print("bench: interrupted", file=sys.stderr)
            status = 130
            break
        _replace(document, measured)
        _write(document, arguments)  # what has been measured is not lost with what comes after
        status = max(status, int(measured["error"] is not None))
    claims = [claim for each in document["benchmarks"] for claim in each["claims"]]
    print(f"bench: {sum(claim['holds'] for claim in claims)} of {len(claims)} claims hold", file=sys.stderr)
    print(f"bench: {arguments.json}, {arguments.html}", file=sys.stderr)
    return status


def _begun(arguments: argparse.Namespace, machine: dict[str, Any]) -> dict[str, Any]:
    """The document, with what an earlier run on the same machine has measured if that is to be kept."""
    document = {
        "schema": SCHEMA,
        "machine": machine,
        "peers": [peer.as_json() for peer in peers()],
        "benchmarks": [],
    }
    if arguments.keep and arguments.json.exists():
        before = json.loads(arguments.json.read_text())
        if (before.get("schema"), before.get("machine")) == (SCHEMA, machine):
            document["benchmarks"] = before["benchmarks"]
        else:
            print(f"bench: {arguments.json} is of another machine, or version: nothing is kept", file=sys.stderr)
    return document


def _measured(benchmark: Benchmark, arguments: argparse.Namespace, cores: Cores) -> dict[str, Any]:
    """Runs one benchmark, prints its tables and gives its part of the document, also if it has failed."""
    repeat = arguments.repeat or (QUICK_REPEAT if arguments.quick else benchmark.repeat)
    started = time.time()
    load = [round(os.getloadavg()[0], 1)]
    progress = _Progress()
    result, error = None, None
    with tempfile.TemporaryDirectory(prefix="dynacut-bench-") as folder:
        _use_caches(Path(folder))
        try:
            result = benchmark.run(cores, Path(folder), repeat, quick=arguments.quick, progress=progress)
        except _FAILURES as failure:
            error = str(failure)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
            progress("")
            traceback.print_exc()
    progress("")
    if error is not None:
        print(f"bench: {benchmark.name}: {error}", file=sys.stderr)
    if result is not None:
        print_tables(result.tables)
        for line in result.not_measured:
            print(f"NOT MEASURED: {line}")
        print_claims(result.claims)
    return {
        "name": benchmark.name,
        "title": benchmark.title,
        "about": (sys.modules[benchmark.run.__module__].__doc__ or "").strip(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started),
        "repeat": repeat,
        "quick": arguments.quick,
        "load": [*load, round(os.getloadavg()[0], 1)],
        "error": error,
        "not_measured": list(result.not_measured) if result else [],
        "tables": [table.as_json() for table in result.tables] if result else [],
        "claims": [claim.as_json() for claim in result.claims] if result else [],
        "figures": list(result.figures.as_json()) if result else [],
    }


def _replace(document: dict[str, Any], measured: dict[str, Any]) -> None:
    """Puts a benchmark's part where it belongs, instead of an older one."""
    order = [benchmark.name for benchmark in BENCHMARKS]
    others = [each for each in document["benchmarks"] if each["name"] != measured["name"]]
    document["benchmarks"] = sorted([*others, measured], key=lambda each: order.index(each["name"]))


def _write(document: dict[str, Any], arguments: argparse.Namespace) -> None:
    for path in (arguments.json, arguments.html):
        path.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    arguments.html.write_text(page_of(document))


def _use_caches(folder: Path) -> None:
    """Caches of its own, filled by a first run: what earlier runs, or this environment, left or forbid does not matter.

    dynacut keeps block maps; Python keeps bytecode, which every installed command has.
    """
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def _arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__)
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument("--quick", action="store_true", help="fewer cases and repetitions: for trying, not for figures")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--keep", action="store_true", help="keep what the JSON has of the other benchmarks")
    parser.add_argument("--repeat", type=int, metavar="N", help="repetitions (default: each benchmark's own)")
    parser.add_argument(
        "--json", type=Path, default=_ROOT / "build/bench.json", metavar="FILE", help="default: build/bench.json"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="default: as the JSON, with .html")
    arguments = parser.parse_args(words)
    arguments.html = arguments.html or arguments.json.with_suffix(".html")
    return arguments


def _head(machine: dict[str, Any]) -> str:
    kind = "virtual machine" if machine["virtual"] else "machine"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {kind}, Linux {machine['kernel']}, Python {machine['python']}, "
        f"{machine['gdb'] or 'no gdb'}; load {os.getloadavg()[0]:.1f} at the start"
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


if __name__ == "__main__":
    sys.exit(main())
