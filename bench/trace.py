"""Tracing a redis-server under load: what it costs when the blocks of the load have been hit once.

What attaches is compared with the same redis before and after, in pairs: the ratios' median is told, and beside it how
far apart two untraced rates of one redis are, which is the noise. redis's own processor time for a request has less of
that than requests per second, which are the clients' and the machine's as well. callgrind, which cannot attach, is
compared with the others' redis before they attached. redis has the measured core to itself, the tools and the clients
have the other one.
"""

from __future__ import annotations

import random
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.figures import DYNACUT, Claim, Figures, Result, Table, case, number
from bench.machine import Cores, isolate
from bench.programs import BenchmarkError
from bench.trace_peers import Collector, collectors
from tests.integration.servers import Redis, ServerFailed, ServerMissing
from tests.integration.tracer import Tracer

COST_LIMIT = 0.02
REQUESTS = 100_000
QUICK_REQUESTS = 40_000
CLIENTS = 20
_TESTS = ("SET", "GET")
_RATE = case(clients=CLIENTS)
NOBODY = "nobody"
_PAIRS = 3
"""Traces of one redis, one after the other, with untraced load before, between and after."""
_SLOW_REPETITIONS = 1
_BENCHMARK_TIMEOUT = 300


@dataclass(frozen=True)
class Cost:
    """Of one kind of request: how many a second, and redis's processor time for each, in µs."""

    per_second: float
    cpu_us: float


def run(cores: Cores, folder: Path, repeat: int, *, quick: bool, progress: Callable[[str], None]) -> Result:
    """All tools in turns, each with a fresh redis."""
    figures = Figures("trace")
    tools, missing = collectors()
    requests = QUICK_REQUESTS if quick else REQUESTS
    try:
        with Redis() as redis:
            fill_caches(redis, (), folder)
        for repetition in range(repeat):
            turns = [tool for tool in tools if tool.name == DYNACUT or repetition < (1 if quick else _SLOW_REPETITIONS)]
            random.shuffle(turns)
            for tool in turns:
                progress(f"trace: repetition {repetition + 1} of {repeat}, {tool.name}")
                _measure_cost(figures, tool, requests, cores, folder)
    except (ServerMissing, ServerFailed, AssertionError) as error:
        raise BenchmarkError(str(error)) from None
    return Result(figures, [_costs(figures, tools, missing)], _claims(figures))


def fill_caches(redis: Redis, options: Sequence[str], folder: Path) -> None:
    """A first trace, which finds the blocks."""
    with Tracer("--pid", redis.pid, *options, "--for", "0", "-o", folder / "redis.drcov") as tracer:
        tracer.process.communicate(timeout=_BENCHMARK_TIMEOUT)


def _measure_cost(figures: Figures, tool: Collector, requests: int, cores: Cores, folder: Path) -> None:
    borne = max(2000, int(requests * tool.share))
    with tool.server() as redis:
        isolate(redis.pid, cores)
        before: dict[str, Cost] = {}
        if tool.attaches:
            _ask(redis, requests // 4)
            before = _ask(redis, requests)
        for _ in range(_PAIRS if tool.name == DYNACUT else 1):
            with tool.collecting(redis, folder) as collected:
                isolate(redis.pid, cores)
                _ask(redis, borne // 4)
                during = _ask(redis, borne)
            after = _ask(redis, requests) if tool.name == DYNACUT else before
            figures.add(_RATE, tool.name, "attach_ms", collected.attach_ms)
            figures.add(_RATE, tool.name, "found_count", collected.found)
            for test in _TESTS:
                _note(figures, tool.name, test, before.get(test), during[test], after.get(test))
            before = after


def _note(figures: Figures, name: str, test: str, before: Cost | None, during: Cost, after: Cost | None) -> None:
    """The costs of requests, and what they are as shares of the untraced ones before and after, of the same redis."""
    measure = test.lower()
    figures.add(_RATE, name, f"{measure}_per_s", during.per_second)
    figures.add(_RATE, name, f"{measure}_cpu_us", during.cpu_us)
    if before is None or after is None:
        return
    per_second = (before.per_second + after.per_second) / 2
    cpu_us = (before.cpu_us + after.cpu_us) / 2
    figures.add(_RATE, name, f"{measure}_share", during.per_second / per_second)
    figures.add(_RATE, name, f"{measure}_cpu_ratio", during.cpu_us / cpu_us)
    figures.add(_RATE, NOBODY, f"{measure}_per_s", per_second)
    figures.add(_RATE, NOBODY, f"{measure}_cpu_us", cpu_us)
    if after is not before:
        figures.add(_RATE, NOBODY, f"{measure}_share", after.per_second / before.per_second)
        figures.add(_RATE, NOBODY, f"{measure}_cpu_ratio", after.cpu_us / before.cpu_us)


def _ask(redis: Redis, requests: int) -> dict[str, Cost]:
    """What a SET and a GET cost, by redis-benchmark and by redis's own processor time."""
    costs = {}
    for test in _TESTS:
        words = f"redis-benchmark -p {redis.port} -c {CLIENTS} -n {requests} -t {test.lower()} --csv"
        started = _cpu_ns(redis.pid)
        done = subprocess.run(
            words.split(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_BENCHMARK_TIMEOUT,
            check=False,
        )
        spent = _cpu_ns(redis.pid) - started
        rows = [line.replace('"', "").split(",") for line in done.stdout.splitlines()[1:]]
        if [row[0] for row in rows] != [test]:
            raise BenchmarkError(f"redis-benchmark has not measured {test}: {done.stdout}{done.stderr}")
        costs[test] = Cost(float(rows[0][1]), spent / 1000 / requests)
    return costs


def _cpu_ns(pid: int) -> int:
    """Nanoseconds that a process's threads have run: the first field of proc_pid_schedstat (sched-stats.rst)."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


def _costs(figures: Figures, tools: Sequence[Collector], missing: Sequence[str]) -> Table:
    rows = []
    for name in (NOBODY, *(tool.name for tool in tools)):
        rates = [figures.median(_RATE, name, f"{test.lower()}_per_s") for test in _TESTS]
        rows.append(
            [
                name,
                *(number(rate) for rate in rates),
                *(_ratio(figures, name, test, "per_s", "share") for test in _TESTS),
                *(_ratio(figures, name, test, "cpu_us", "cpu_ratio") for test in _TESTS),
                number(figures.median(_RATE, name, "found_count")),
                number(figures.median(_RATE, name, "attach_ms")),
            ]
        )
    notes = [
        f"redis-benchmark with {CLIENTS} clients, medians. Shares (least-largest) are of the same redis untraced; of "
        "callgrind, which must start redis itself, of the others' untraced rates. Nobody: untraced rates after a trace "
        "and before it, which is the noise. CPU: redis's processor time for a request, in the same way",
        "found: blocks of the executable that were executed; by callgrind, instructions, from the start of redis on. "
        "The others attach to a redis that has run the load before",
        *(f"NOT MEASURED – {line}" for line in missing),
    ]
    columns = [
        "",
        *(f"{test}/s" for test in _TESTS),
        *(f"{test}/s: share" for test in _TESTS),
        *(f"{test}: CPU" for test in _TESTS),
        "found",
        "attached in, ms",
    ]
    return Table("tracing a redis-server under load", columns, rows, notes)


def _ratio(figures: Figures, name: str, test: str, measure: str, ratio: str) -> str:
    """To untraced: within one redis where that was measured (least-largest), else of the medians."""
    ratios = figures.values(_RATE, name, f"{test.lower()}_{ratio}")
    if ratios:
        return f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
    value = figures.median(_RATE, name, f"{test.lower()}_{measure}")
    untraced = figures.median(_RATE, NOBODY, f"{test.lower()}_{measure}")
    return f"{value / untraced:.3f}" if value and untraced else "-"


def _claims(figures: Figures) -> list[Claim]:
    claims = []
    for test in _TESTS:
        for ratio, what, sign in (
            ("share", f"of its {test}/s", -1),
            ("cpu_ratio", f"more processor time for a {test}", 1),
        ):
            measured = figures.median(_RATE, DYNACUT, f"{test.lower()}_{ratio}")
            noise = [abs(1 - value) for value in figures.values(_RATE, NOBODY, f"{test.lower()}_{ratio}")]
            if measured is None or not noise:
                continue
            cost = sign * (measured - 1)
            text = f"a trace costs redis at most {COST_LIMIT:.0%} {what} when the load's blocks were hit once"
            figure = f"{cost:+.1%} (two untraced ones differ by {statistics.median(noise):.1%})"
            claims.append(Claim(text, figure, cost <= COST_LIMIT))
    return claims
