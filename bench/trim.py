"""Start-up code removed from real servers: what goes, and whether they are as quick as before.

Each server is trimmed once, live, by the workload that the tests have too. Then the trimmed one and two that are
untouched are asked in turns, in random order: the two tell what the machine's noise is.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.figures import DYNACUT, Claim, Figures, Result, Table, case, number
from bench.machine import Cores, isolate
from bench.programs import BenchmarkError, compile_program
from bench.tools import DYNACUT as COMMAND
from dynacut.offline import processes
from dynacut.shared.proc import tree_of
from tests.integration.servers import Lighttpd, Nginx, Redis, Server, ServerFailed, ServerMissing

REMOVED_LEAST = 0.9
_KINDS: tuple[type[Server], ...] = (Redis, Nginx, Lighttpd)
_WORKLOAD = Path(__file__).parent.parent / "tests/integration/http_workload.py"
_UNTOUCHED, _ANOTHER = "untouched", "another untouched"
_SECONDS = 0.8
_REQUESTS = 60_000
_CLIENTS = 20
_TRIM_TIMEOUT = 300
_HOW = ("--live", "--scope", "page", "--on-hit", "terminate", "--passes", "20", "--idle", "0.3", "--linger", "6")


def run(cores: Cores, folder: Path, repeat: int, *, quick: bool, progress: Callable[[str], None]) -> Result:
    """One server after the other; with quick, redis alone."""
    getter = compile_program("getter", folder)
    figures = Figures("trim")
    reports: dict[str, dict[str, Any]] = {}
    try:
        for kind in _KINDS[:1] if quick else _KINDS:
            progress(f"trim: {kind.program}, trimming")
            with ExitStack() as stack:
                (folder / kind.program).mkdir()
                trimmed, reports[kind.program] = stack.enter_context(_trimmed(kind, folder / kind.program))
                servers = {DYNACUT: trimmed}
                for name in (_UNTOUCHED, _ANOTHER):
                    server = stack.enter_context(kind())
                    servers[name] = (server.pid, server.port)
                for pid, _ in servers.values():
                    for each in tree_of(pid):
                        isolate(each, Cores(cores.measured, cores.measured))
                for repetition in range(repeat + 1):  # the first one warms up
                    progress(f"trim: {kind.program}, repetition {repetition} of {repeat}")
                    _measure(figures if repetition else Figures("trim"), kind, servers, getter)
    except (ServerMissing, ServerFailed) as error:
        raise BenchmarkError(str(error)) from None
    _add_reports(figures, reports)
    return Result(figures, [_rates(figures), _removed(reports)], _claims(figures, reports))


@contextmanager
def _trimmed(kind: type[Server], folder: Path) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """A trimmed server's pid and port, and the report."""
    with kind() as server:
        assert server._process is not None
        command, port = server._process.args, server.port
        server.end()
        assert isinstance(command, list)
        processes.become_subreaper()
        words = [str(COMMAND), "trim", "-o", str(folder / "trim"), "--json", "-q", *_HOW]
        words += ["--ready-port", str(port), *_workload(kind, port), "--", *command]
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TRIM_TIMEOUT, check=False
        )
        if done.returncode != 0:
            raise BenchmarkError(f"dynacut trim of {kind.program} ended with {done.returncode}: {done.stderr.strip()}")
        report = json.loads(done.stdout)
        pid = report["target"]["pid"]
        try:
            yield (pid, port), report
        finally:
            processes.end_tree(pid)


def _workload(kind: type[Server], port: int) -> Sequence[str]:
    if kind is Redis:
        save = (
            f"redis-cli -p {port} bgsave; until redis-cli -p {port} info | grep -q in_progress:0; do sleep 0.05; done"
        )
        return ("--workload", f"redis-benchmark -p {port} -n 1000 -q", "--serve", save)
    work = f"{sys.executable} {_WORKLOAD} {port}"
    if kind is Nginx:
        return ("--workload", f"{work} --reload $DYNACUT_PID", "--shutdown", "kill -QUIT $DYNACUT_PID")
    return ("--workload", work)


def _measure(figures: Figures, kind: type[Server], servers: dict[str, tuple[int, int]], getter: Path) -> None:
    """One turn: each server is asked once, in random order."""
    rates: dict[str, dict[str, float]] = {}
    for name in random.sample(list(servers), len(servers)):
        pid, port = servers[name]
        rates[name] = _redis_rates(port) if kind is Redis else _http_rates(getter, port)
        if not Path(f"/proc/{pid}").exists():
            raise BenchmarkError(f"{kind.program}, {name}, has ended")
    for name, rate_of in rates.items():
        for test, rate in rate_of.items():
            measured = case(server=kind.program, test=test)
            figures.add(measured, name, "per_s", rate)
            if name != _UNTOUCHED:
                figures.add(measured, name, "share", rate / rates[_UNTOUCHED][test])


def _redis_rates(port: int) -> dict[str, float]:
    words = f"redis-benchmark -p {port} -c {_CLIENTS} -n {_REQUESTS} -t set,get --csv"
    rows = [line.replace('"', "").split(",") for line in _output(words.split()).splitlines()[1:]]
    return {row[0]: float(row[1]) for row in rows}


def _http_rates(getter: Path, port: int) -> dict[str, float]:
    return {"GET": float(_output([str(getter), str(port), "/index.html", str(_SECONDS)]))}


def _output(words: Sequence[str]) -> str:
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"{words[0]} ended with {done.returncode}: {done.stderr}{done.stdout}")
    return done.stdout


def _add_reports(figures: Figures, reports: dict[str, dict[str, Any]]) -> None:
    for server, report in reports.items():
        (module,) = report["modules"]
        measured = case(server=server)
        for name in ("init", "serving", "startup", "removed", "learned", "standing"):
            figures.add(measured, DYNACUT, f"{name}_blocks", module[name]["blocks"])
            figures.add(measured, DYNACUT, f"{name}_bytes", module[name]["bytes"])
        figures.add(measured, DYNACUT, "unmapped_pages", report["unmapped_pages"])
        for when in ("before", "after"):
            figures.add(measured, DYNACUT, f"gadgets_{when}_count", module["gadgets"][when])
            figures.add(measured, DYNACUT, f"rss_{when}_bytes", report["memory"][when]["rss"])


def _noise(figures: Figures, measured: tuple[tuple[str, str | int], ...]) -> float:
    """How far, in nine of ten turns at most, one untouched server's rate is from the other's."""
    apart = sorted(abs(share - 1) for share in figures.values(measured, _ANOTHER, "share"))
    return apart[round(0.9 * (len(apart) - 1))]


def _rates(figures: Figures) -> Table:
    rows = []
    for measured, share in figures.medians(DYNACUT, "share").items():
        varied = dict(measured)
        shares = figures.values(measured, DYNACUT, "share")
        rows.append(
            [
                f"{varied['server']} {varied['test']}",
                number(figures.median(measured, _UNTOUCHED, "per_s")),
                number(figures.median(measured, DYNACUT, "per_s")),
                f"{share:.3f} ({min(shares):.3f}-{max(shares):.3f})",
                f"{statistics.median(figures.values(measured, _ANOTHER, 'share')):.3f}",
                f"{_noise(figures, measured):.1%}",
            ]
        )
    return Table(
        "requests per second of trimmed servers",
        ["", "untouched/s", "trimmed/s", "trimmed: share", "another untouched: share", "noise"],
        rows,
        (
            "share: of the untouched server's rate in the same turn, median (least and most)",
            "noise: how far apart two untouched servers are in nine of ten turns",
        ),
    )


def _removed(reports: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for server, report in reports.items():
        (module,) = report["modules"]
        memory = report["memory"]
        rows.append(
            [
                server,
                f"{module['init']['blocks']:,}",
                f"{module['serving']['blocks']:,}",
                f"{module['startup']['blocks']:,}",
                f"{module['removed']['blocks']:,} ({module['removed_share']:.1%})",
                f"{module['removed']['bytes']:,}",
                f"{module['learned']['blocks']:,}",
                f"{report['unmapped_pages']}",
                f"{module['gadgets']['before']:,} → {module['gadgets']['after']:,}",
                f"{memory['before']['rss'] >> 10:,} → {memory['after']['rss'] >> 10:,}",
            ]
        )
    columns = ["", "ran at start-up", "in service", "start-up only", "removed", "bytes", "learned", "pages unmapped"]
    return Table(
        "what goes: blocks of the executable",
        [*columns, "ROP gadgets", "RSS, KiB"],
        rows,
        (
            "dynacut trim --live --scope page --on-hit terminate, with twenty passes of the workload at most",
            "each text page that is written to becomes the process's own, so RSS grows; every process of nginx counts",
        ),
    )


def _claims(figures: Figures, reports: dict[str, dict[str, Any]]) -> list[Claim]:
    claims = []
    for server, report in reports.items():
        (module,) = report["modules"]
        share = module["removed_share"]
        text = f"at least {REMOVED_LEAST:.0%} of {server}'s start-up-only blocks are removed"
        claims.append(Claim(text, f"{share:.1%}", share >= REMOVED_LEAST))
    for measured, share in figures.medians(DYNACUT, "share").items():
        varied, noise = dict(measured), _noise(figures, measured)
        text = (
            f"{varied['server']}'s {varied['test']} per second are no fewer than an untouched one's, within the noise"
        )
        claims.append(Claim(text, f"{share - 1:+.1%}, noise {noise:.1%}", 1 - share <= noise))
    return claims
