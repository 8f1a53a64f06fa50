"""The whole command on a redis-server for one site: its wall time, and what a client of redis sees of it."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.control import Control, stay_busy
from bench.figures import DYNACUT, PEERS, Claim, Figures, Result, Table, case, spread
from bench.machine import Cores, isolate
from bench.programs import BenchmarkError, compile_program, load_base, read_memory, started
from bench.tools import GDB, GDB_BEST, INT3, dynacut, gdb, write_gdb_sets
from tests.integration.servers import Redis, ServerFailed, ServerMissing

WALL_LIMIT_MS = 300
CASE = case(sites=1)
_DISABLE = ("--disable", "setCommand", "--on-hit", "redirect=readonlyCommand", "--as", "set")
_DIRECTIONS = ("on", "off")


def run(cores: Cores, folder: Path, repeat: int, *, quick: bool, progress: Callable[[str], None]) -> Result:
    """A fresh redis for each repetition of each tool, with a client that pings it all the time."""
    del quick
    pinger = compile_program("pinger", folder)
    figures = Figures("redis")
    turns = [DYNACUT, *(PEERS if shutil.which("gdb") else ())]
    try:
        site = _find_site()
    except (ServerMissing, ServerFailed) as error:
        raise BenchmarkError(str(error)) from None
    for repetition in range(repeat):
        random.shuffle(turns)
        for peer in turns:
            progress(f"redis: repetition {repetition + 1} of {repeat}, {peer}")
            with Redis() as redis:
                isolate(redis.pid, cores)
                with pinged(pinger, redis.port, cores, folder) as control:
                    _measure(figures, peer, redis, control, site, folder)
    return Result(figures, [_table(figures)], _claims(figures))


@dataclass(frozen=True)
class _Site:
    """Where the first byte of setCommand is, relative to the load base of the module with that path."""

    path: str
    offset: int


def _find_site() -> _Site:
    """Asks dynacut, in a redis of its own: also fills the caches."""
    with Redis() as redis:
        report = dynacut(redis.pid, *_DISABLE, "-v").report
        dynacut(redis.pid, "--undo")
        (feature,) = report["features"]
        name, _, offset = feature["site_list"][0]["at"].partition("+")
        (path,) = (module["path"] for module in report["modules"] if module["name"] == name)
        return _Site(path, int(offset, 16))


@contextmanager
def pinged(executable: Path, port: int, cores: Cores, folder: Path, *, pause_us: int = 0) -> Iterator[Control]:
    """A client on the core of redis: the two take turns, and leave the other core to the tools.

    pause_us: microseconds between a reply and the next PING. The kernel lets real-time threads run for 0.95 s of a
    second (sched_rt_runtime_us in sched(7)): without pauses that is the longest gap, where it takes that long.
    """
    control = Control(folder / "ping")
    try:
        with started(executable, control.path, port, cores.measured, pause_us) as process:
            control.wait_for("thread", 1)
            isolate(process.pid, cores)
            time.sleep(0.05)
            yield control
            if process.poll() is not None:
                raise BenchmarkError("the client of redis has ended")
    finally:
        control.close()


def _measure(figures: Figures, peer: str, redis: Redis, control: Control, site: _Site, folder: Path) -> None:
    address = load_base(redis.pid, site.path) + site.offset
    old = read_memory(redis.pid, address, 1)
    script = folder / "redis.gdb"
    for direction in _DIRECTIONS:
        new = INT3 if direction == "on" else old[0]
        write_gdb_sets(script, [address], [new])
        with control.measuring():
            if peer == DYNACUT:
                ran = dynacut(redis.pid, *(_DISABLE if direction == "on" else ("--undo",)))
                figures.add(CASE, peer, f"{direction}_own_longest_us", ran.report["longest_stop_us"])
            else:
                ran = gdb(redis.pid, script, GDB if peer == "gdb" else GDB_BEST)
        figures.add(CASE, peer, f"{direction}_ping_us", control.largest_us)
        figures.add(CASE, peer, f"{direction}_wall_ms", ran.wall_ms)
        if read_memory(redis.pid, address, 1) != bytes([new]):
            raise BenchmarkError(f"{peer} has not written what it should: redis, {direction}")
        if peer == DYNACUT:
            _check_reply(redis, direction)
        if direction == "on":
            with control.measuring():
                stay_busy(ran.wall_ms / 1000)
            figures.add(CASE, peer, "quiet_us", control.largest_us)


def _check_reply(redis: Redis, direction: str) -> None:
    reply = redis.command("SET", "key", "value")
    if (reply == "OK") is not (direction == "off"):
        raise BenchmarkError(f"redis answers {reply!r} to SET with the feature {direction}")


def _table(figures: Figures) -> Table:
    rows = []
    for peer in (DYNACUT, *PEERS):
        if figures.values(CASE, peer, "on_wall_ms"):
            measures = ("on_wall_ms", "off_wall_ms", "on_ping_us", "off_ping_us", "quiet_us")
            rows.append([peer, *(spread(figures.values(CASE, peer, measure)) for measure in measures)])
    return Table(
        "one site of redis-server: SET switched off and on again",
        ["", "wall on, ms", "wall off, ms", "slowest PING on, µs", "slowest PING off, µs", "with nobody, µs"],
        rows,
        (
            "median (90th percentile). A fresh redis each time; dynacut also maps and installs its handler, finds the "
            "symbol and verifies, gdb only writes the byte",
            "with nobody: the slowest PING in the same time with nobody touching redis and the other core as busy",
        ),
    )


def _claims(figures: Figures) -> list[Claim]:
    claims = []
    for direction in _DIRECTIONS:
        values = figures.values(CASE, DYNACUT, f"{direction}_wall_ms")
        median = figures.median(CASE, DYNACUT, f"{direction}_wall_ms")
        if median is not None:
            claims.append(
                Claim(
                    f"the whole command takes under {WALL_LIMIT_MS} ms for one site on redis ({direction})",
                    f"{median:.0f} ms median, {max(values):.0f} ms at most",
                    median < WALL_LIMIT_MS,
                )
            )
    return claims
