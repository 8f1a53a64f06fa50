"""Tracing a redis-server: what it costs once the blocks are known, and how long clients wait while blocks are armed.

Everything that attaches is compared with the same redis before and after; callgrind, which cannot attach, with the
others' redis before they attached. redis has the measured core to itself, the tools and the clients have the other one.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.control import Control, stay_busy
from bench.figures import DYNACUT, Claim, Figures, Result, Table, case, number, spread
from bench.machine import Cores, isolate
from bench.programs import BenchmarkError, compile_program
from bench.redis_command import pinged
from bench.tools import DYNACUT as COMMAND
from bench.trace_peers import Collector, collectors
from tests.integration.servers import Redis, ServerFailed, ServerMissing
from tests.integration.tracer import Tracer

COST_LIMIT = 0.02
PAUSE_LIMIT_MS = 5
BLOCKS_LEAST = 63_000
REQUESTS = 200_000
QUICK_REQUESTS = 40_000
CLIENTS = 20
_TESTS = ("SET", "GET")
_RATE = case(clients=CLIENTS)
_NOBODY = "nobody"
_EXECUTABLE: Sequence[str] = ()
_ALL: Sequence[str] = ("--all-modules",)
_INSTANTS = ("arm", "phase", "end")
_SETTLING = 0.2
"""Seconds after an instant in which first hits still come."""
_SLOW_REPETITIONS = 3
_BENCHMARK_TIMEOUT = 300


def run(cores: Cores, folder: Path, repeat: int, *, quick: bool, progress: Callable[[str], None]) -> Result:
    """All tools in turns, each with a fresh redis; then the pauses."""
    pinger = compile_program("pinger", folder)
    figures = Figures("trace")
    tools, missing = collectors()
    requests = QUICK_REQUESTS if quick else REQUESTS
    try:
        with Redis() as redis:
            _fill_caches(redis, () if quick else _ALL, folder)
        for repetition in range(repeat):
            turns = [tool for tool in tools if tool.name == DYNACUT or repetition < (1 if quick else _SLOW_REPETITIONS)]
            random.shuffle(turns)
            for tool in turns:
                progress(f"trace: repetition {repetition + 1} of {repeat}, {tool.name}")
                _measure_cost(figures, tool, requests, cores, folder)
            progress(f"trace: repetition {repetition + 1} of {repeat}, pauses")
            _measure_pauses(figures, _EXECUTABLE, pinger, cores, folder)
            if not quick and repetition < _SLOW_REPETITIONS:
                _measure_pauses(figures, _ALL, pinger, cores, folder)
    except (ServerMissing, ServerFailed, AssertionError) as error:
        raise BenchmarkError(str(error)) from None
    return Result(figures, [_costs(figures, tools, missing), _pauses(figures)], _claims(figures))


def _fill_caches(redis: Redis, options: Sequence[str], folder: Path) -> None:
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
    figures.add(_RATE, tool.name, "attach_ms", collected.attach_ms)
    figures.add(_RATE, tool.name, "found_count", collected.found)
    for test in _TESTS:
        figures.add(_RATE, tool.name, f"{test.lower()}_per_s", during[test])
        if around:
            without = statistics.mean(rates[test] for rates in around)
            figures.add(_RATE, _NOBODY, f"{test.lower()}_per_s", without)
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


def _measure_pauses(figures: Figures, options: Sequence[str], pinger: Path, cores: Cores, folder: Path) -> None:
    """The slowest PING while blocks are armed, armed again for a new phase, and put back."""
    gaps: dict[str, float] = {}
    # No real-time priority: arming takes longer than the kernel lets such threads run without a break
    # (sched_rt_runtime_us in sched(7)), which would be the longest gap of all.
    ordinary = Cores(cores.measured, cores.measured)
    with Redis() as redis:
        isolate(redis.pid, ordinary)
        with pinged(pinger, redis.port, ordinary, folder) as control, ExitStack() as stack:
            started = time.perf_counter()
            with _slowest(control, gaps, "arm"):
                tracer = stack.enter_context(Tracer("--pid", redis.pid, *options, "-o", folder / "redis.drcov"))
                armed = tracer.await_line("armed")
            seconds = time.perf_counter() - started
            with _slowest(control, gaps, "quiet"):
                stay_busy(seconds)
            with _slowest(control, gaps, "phase"):
                subprocess.run([COMMAND, "trace", "--pid", str(redis.pid), "--phase", "next"], check=True)
                tracer.await_line("phase next begins")
            with _slowest(control, gaps, "end"):
                tracer.end()
    measured = case(modules="all" if options else "executable")
    figures.add(measured, DYNACUT, "armed_count", int(armed.partition(" ")[0].replace(",", "")))
    figures.add(measured, DYNACUT, "arm_ms", seconds * 1000)
    for instant, gap in gaps.items():
        figures.add(measured, _NOBODY if instant == "quiet" else DYNACUT, f"{instant}_ping_us", gap)


@contextmanager
def _slowest(control: Control, gaps: dict[str, float], instant: str) -> Iterator[None]:
    """Notes the slowest PING of the context's time, first hits after it included."""
    with control.measuring():
        yield
        stay_busy(_SETTLING)
    gaps[instant] = control.largest_us


def _costs(figures: Figures, tools: Sequence[Collector], missing: Sequence[str]) -> Table:
    rows = []
    for name in (_NOBODY, *(tool.name for tool in tools)):
        rates = [figures.median(_RATE, name, f"{test.lower()}_per_s") for test in _TESTS]
        rows.append(
            [
                name,
                *(number(rate) for rate in rates),
                *("1" if name == _NOBODY else _share(figures, name, test) for test in _TESTS),
                number(figures.median(_RATE, name, "found_count")),
                number(figures.median(_RATE, name, "attach_ms")),
            ]
        )
    notes = [
        f"redis-benchmark with {CLIENTS} clients, medians. Shares are of the same redis untraced; of callgrind, which "
        "must start redis itself, of the others' untraced rates",
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
    """Of the untraced rate: within one redis where that was measured, else of the medians."""
    share = figures.median(_RATE, name, f"{test.lower()}_share")
    if share is None:
        rate = figures.median(_RATE, name, f"{test.lower()}_per_s")
        untraced = figures.median(_RATE, _NOBODY, f"{test.lower()}_per_s")
        share = rate / untraced if rate and untraced else None
    return "-" if share is None else f"{share:.3f}"


def _pauses(figures: Figures) -> Table:
    rows = []
    for measured, armed in figures.medians(DYNACUT, "armed_count").items():
        rows.append(
            [
                str(dict(measured)["modules"]),
                number(armed),
                spread(figures.values(measured, DYNACUT, "arm_ms")),
                *(spread(figures.values(measured, DYNACUT, f"{instant}_ping_us")) for instant in _INSTANTS),
                spread(figures.values(measured, _NOBODY, "quiet_ping_us")),
            ]
        )
    return Table(
        "the slowest PING of a client of redis, in µs",
        ["modules", "blocks armed", "armed in, ms", "arming", "a new phase", "the end", "with nobody"],
        rows,
        ("median (90th percentile). The first hits of the blocks that a PING executes are in it",),
    )


def _claims(figures: Figures) -> list[Claim]:
    claims = []
    for test in _TESTS:
        share = figures.median(_RATE, DYNACUT, f"{test.lower()}_share")
        if share is not None:
            text = f"a trace costs redis at most {COST_LIMIT:.0%} of its {test}/s when the load's blocks were hit once"
            claims.append(Claim(text, f"{1 - share:+.1%}", 1 - share <= COST_LIMIT))
    for measured, armed in figures.medians(DYNACUT, "armed_count").items():
        pauses = {
            instant: median
            for instant in _INSTANTS
            if (median := figures.median(measured, DYNACUT, f"{instant}_ping_us")) is not None
        }
        worst = max(pauses, key=pauses.__getitem__)
        text = f"no client waits more than {PAUSE_LIMIT_MS} ms (median) while {armed:,.0f} blocks are armed or put back"
        figure = f"{pauses[worst] / 1000:.2f} ms ({worst}, modules: {dict(measured)['modules']})"
        claims.append(Claim(text, figure, armed >= BLOCKS_LEAST and pauses[worst] <= PAUSE_LIMIT_MS * 1000))
    return claims
