"""Arming a redis-server for a trace: how long its clients wait while blocks are armed, armed again, and put back.

redis has the measured core to itself, the tracer and the client have the other one.
"""

from __future__ import annotations

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
from bench.trace import NOBODY, fill_caches
from tests.integration.servers import Redis, ServerFailed, ServerMissing
from tests.integration.tracer import Tracer

PAUSE_LIMIT_MS = 5
BLOCKS_LEAST = 63_000
_EXECUTABLE: Sequence[str] = ()
_ALL: Sequence[str] = ("--all-modules",)
_INSTANTS = ("arm", "phase", "end")
_PAUSE_US = 200
_SETTLING = 0.2
"""Seconds after an instant in which first hits still come."""
_SLOW_REPETITIONS = 3


def run(cores: Cores, folder: Path, repeat: int, *, quick: bool, progress: Callable[[str], None]) -> Result:
    """The executable alone, then all modules that can be traced, each time with a fresh redis."""
    pinger = compile_program("pinger", folder)
    figures = Figures("arm")
    try:
        with Redis() as redis:
            fill_caches(redis, () if quick else _ALL, folder)
        for repetition in range(repeat):
            progress(f"arm: repetition {repetition + 1} of {repeat}")
            _measure_pauses(figures, _EXECUTABLE, pinger, cores, folder)
            if not quick and repetition < _SLOW_REPETITIONS:
                _measure_pauses(figures, _ALL, pinger, cores, folder)
    except (ServerMissing, ServerFailed, AssertionError) as error:
        raise BenchmarkError(str(error)) from None
    return Result(figures, [_pauses(figures)], _claims(figures))


def _measure_pauses(figures: Figures, options: Sequence[str], pinger: Path, cores: Cores, folder: Path) -> None:
    """The slowest PING while blocks are armed, armed again for a new phase, and put back."""
    gaps: dict[str, float] = {}
    with Redis() as redis:
        isolate(redis.pid, cores)
        with pinged(pinger, redis.port, cores, folder, pause_us=_PAUSE_US) as control, ExitStack() as stack:
            started = time.perf_counter()
            with _slowest(control, gaps, "arm"):
                tracer = stack.enter_context(Tracer("--pid", redis.pid, *options, "-o", folder / "redis.drcov"))
                armed = tracer.await_line("armed")
            seconds = time.perf_counter() - started
            with _slowest(control, gaps, "quiet"):
                stay_busy(seconds)
            with _slowest(control, gaps, "phase"):
                subprocess.run([COMMAND, "trace", "--pid", str(redis.pid), "--phase", "next", "-q"], check=True)
                tracer.await_line("phase next begins")
            with _slowest(control, gaps, "end"):
                tracer.end()
    measured = case(modules="all" if options else "executable")
    figures.add(measured, DYNACUT, "armed_count", int(armed.partition(" ")[0].replace(",", "")))
    figures.add(measured, DYNACUT, "arm_ms", seconds * 1000)
    for instant, gap in gaps.items():
        figures.add(measured, NOBODY if instant == "quiet" else DYNACUT, f"{instant}_ping_us", gap)


@contextmanager
def _slowest(control: Control, gaps: dict[str, float], instant: str) -> Iterator[None]:
    """Notes the slowest PING of the context's time, first hits after it included."""
    with control.measuring():
        yield
        stay_busy(_SETTLING)
    gaps[instant] = control.largest_us


def _pauses(figures: Figures) -> Table:
    rows = []
    for measured, armed in figures.medians(DYNACUT, "armed_count").items():
        rows.append(
            [
                str(dict(measured)["modules"]),
                number(armed),
                spread(figures.values(measured, DYNACUT, "arm_ms")),
                *(spread(figures.values(measured, DYNACUT, f"{instant}_ping_us")) for instant in _INSTANTS),
                spread(figures.values(measured, NOBODY, "quiet_ping_us")),
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
