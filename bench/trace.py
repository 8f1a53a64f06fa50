"""Tracing a redis-server under load: what it costs when the blocks of the load have been hit once.

What attaches is compared with the same redis before and after, in pairs: the ratios' median is told, and beside it how
far apart two untraced rates of one redis are, which is the noise. callgrind, which cannot attach, is compared with the
others' redis before they attached. redis has the measured core to itself, the tools and the clients have the other one.
"""

from __future__ import annotations

import random
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.figures import DYNACUT, Claim, Figures, Result, Table, case, number
from bench.machine import Cores, isolate
from bench.programs import BenchmarkError
from bench.trace_peers import Collector, collectors
from tests.integration.servers import Redis, ServerFailed, ServerMissing
from tests.integration.tracer import Tracer

COST_LIMIT = 0.02
REQUESTS = 200_000
QUICK_REQUESTS = 40_000
CLIENTS = 20
_TESTS = ("SET", "GET")
_RATE = case(clients=CLIENTS)
NOBODY = "nobody"
_SLOW_REPETITIONS = 1
_BENCHMARK_TIMEOUT = 300


def run(cores: Cores, folder: Path, repeat: int, *, quick: bool, progress: Callable[[str], None]) -> Result:
    """All tools in turns, each with a fresh redis; then the pauses."""
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
        around = []
        if tool.attaches:
            _ask(redis, requests // 4)
            around.append(_ask(redis, requests))
        with tool.collecting(redis, folder) as collected:
            isolate(redis.pid, cores)
            _ask(redis, borne // 4)
            during = _ask(redis, borne)
        if tool.name == DYNACUT:
            around.append(_ask(redis, requests))
            for test in _TESTS:
                figures.add(_RATE, NOBODY, f"{test.lower()}_share", around[1][test] / around[0][test])
    figures.add(_RATE, tool.name, "attach_ms", collected.attach_ms)
    figures.add(_RATE, tool.name, "found_count", collected.found)
    for test in _TESTS:
        figures.add(_RATE, tool.name, f"{test.lower()}_per_s", during[test])
        if around:
            without = statistics.mean(rates[test] for rates in around)
            figures.add(_RATE, NOBODY, f"{test.lower()}_per_s", without)
            figures.add(_RATE, tool.name, f"{test.lower()}_share", during[test] / without)


def _ask(redis: Redis, requests: int) -> dict[str, float]:
    """Requests per second, by redis-benchmark, of SET and GET."""
    words = f"redis-benchmark -p {redis.port} -c {CLIENTS} -n {requests} -t set,get --csv"
    done = subprocess.run(
        words.split(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_BENCHMARK_TIMEOUT, check=False
    )
    rows = [line.replace('"', "").split(",") for line in done.stdout.splitlines()[1:]]
    rates = {row[0]: float(row[1]) for row in rows}
    if set(rates) != set(_TESTS):
        raise BenchmarkError(f"redis-benchmark has not measured SET and GET: {done.stdout}{done.stderr}")
    return rates


def _costs(figures: Figures, tools: Sequence[Collector], missing: Sequence[str]) -> Table:
    rows = []
    for name in (NOBODY, *(tool.name for tool in tools)):
        rates = [figures.median(_RATE, name, f"{test.lower()}_per_s") for test in _TESTS]
        rows.append(
            [
                name,
                *(number(rate) for rate in rates),
                *(_share(figures, name, test) for test in _TESTS),
                number(figures.median(_RATE, name, "found_count")),
                number(figures.median(_RATE, name, "attach_ms")),
            ]
        )
    notes = [
        f"redis-benchmark with {CLIENTS} clients, medians. Shares (least-largest) are of the same redis untraced; of "
        "callgrind, which must start redis itself, of the others' untraced rates. Nobody: untraced rates after a trace "
        "and before it, which is the noise",
        "found: blocks of the executable that were executed; by callgrind, instructions, from the start of redis on. "
        "The others attach to a redis that has run the load before",
        *(f"NOT MEASURED – {line}" for line in missing),
    ]
    columns = [
        "",
        *(f"{test}/s" for test in _TESTS),
        *(f"{test}: share" for test in _TESTS),
        "found",
        "attached in, ms",
    ]
    return Table("tracing a redis-server under load", columns, rows, notes)


def _share(figures: Figures, name: str, test: str) -> str:
    """Of the untraced rate: within one redis where that was measured (least-largest), else of the medians."""
    shares = figures.values(_RATE, name, f"{test.lower()}_share")
    if shares:
        return f"{statistics.median(shares):.3f} ({min(shares):.3f}-{max(shares):.3f})"
    rate = figures.median(_RATE, name, f"{test.lower()}_per_s")
    untraced = figures.median(_RATE, NOBODY, f"{test.lower()}_per_s")
    return f"{rate / untraced:.3f}" if rate and untraced else "-"


def _claims(figures: Figures) -> list[Claim]:
    claims = []
    for test in _TESTS:
        share = figures.median(_RATE, DYNACUT, f"{test.lower()}_share")
        if share is not None:
            text = f"a trace costs redis at most {COST_LIMIT:.0%} of its {test}/s when the load's blocks were hit once"
            noise = [abs(1 - value) for value in figures.values(_RATE, NOBODY, f"{test.lower()}_share")]
            figure = f"{1 - share:+.1%} (untraced rates differ by {statistics.median(noise):.1%})"
            claims.append(Claim(text, figure, 1 - share <= COST_LIMIT))
    return claims
