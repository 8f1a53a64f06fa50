"""SIGKILL of the whole command at random instants, while it changes a redis-server and while it undoes that.

After each kill the server is asked, and the next run has to put everything back.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from bench.figures import DYNACUT, Claim, Figures, Result, Table, case
from bench.machine import Cores
from bench.programs import BenchmarkError
from bench.tools import DYNACUT as COMMAND
from bench.tools import dynacut
from tests.integration.servers import Redis, ServerFailed, ServerMissing

KILLS = 40
"""Of each direction and repetition."""
_DISABLE = ("--disable", "setCommand", "--on-hit", "redirect=readonlyCommand", "--as", "set")
_COUNTS = ("under_way_count", "dead_count", "not_undone_count")
_DIRECTIONS = {"on": _DISABLE, "off": ("--undo",)}


def run(cores: Cores, folder: Path, repeat: int, *, quick: bool, progress: Callable[[str], None]) -> Result:
    """A fresh redis for each repetition."""
    del cores, folder
    kills = 5 if quick else KILLS
    figures = Figures("kill")
    try:
        for repetition in range(repeat):
            progress(f"kill: repetition {repetition + 1} of {repeat}")
            with Redis() as redis:
                for _ in range(2):  # the first fills the caches
                    durations = {name: _seconds(redis, options) for name, options in _DIRECTIONS.items()}
                for direction, options in _DIRECTIONS.items():
                    kills_left = kills
                    while kills_left and _kill_once(figures, redis, direction, options, durations[direction]):
                        kills_left -= 1
    except (ServerMissing, ServerFailed) as error:
        raise BenchmarkError(str(error)) from None
    return Result(figures, [_table(figures)], _claims(figures))


def _seconds(redis: Redis, options: tuple[str, ...]) -> float:
    started = time.perf_counter()
    dynacut(redis.pid, *options)
    return time.perf_counter() - started


def _kill_once(figures: Figures, redis: Redis, direction: str, options: tuple[str, ...], duration: float) -> bool:
    """Whether the server lives."""
    measured = case(direction=direction)
    if direction == "off":
        dynacut(redis.pid, *_DISABLE)
    command = [str(COMMAND), "live", "--pid", str(redis.pid), *options, "-q"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        time.sleep(duration * random.uniform(0.3, 1.0))  # what comes before looks at files only
        was_under_way = process.poll() is None
        process.kill()
    figures.add(measured, DYNACUT, "under_way_count", int(was_under_way))
    lives = _lives(redis)
    figures.add(measured, DYNACUT, "dead_count", int(not lives))
    if not lives:
        return False
    dynacut(redis.pid, "--undo")
    works = redis.command("SET", "key", "value") == "OK"
    figures.add(measured, DYNACUT, "not_undone_count", int(not works))
    return True


def _lives(redis: Redis) -> bool:
    if not redis.is_running():
        return False
    try:
        with redis.connect() as client:
            return client.command("PING") == "PONG"
    except OSError:
        return False


def _table(figures: Figures) -> Table:
    rows = []
    for direction in _DIRECTIONS:
        totals = [sum(figures.values(case(direction=direction), DYNACUT, name)) for name in _COUNTS]
        kills = len(figures.values(case(direction=direction), DYNACUT, "dead_count"))
        rows.append([direction, str(kills), *(f"{total:.0f}" for total in totals)])
    return Table(
        "SIGKILL of dynacut at random instants",
        ["direction", "kills", "while it worked", "server dead", "not undone by the next run"],
        rows,
        ("while it worked: the other kills came after its end",),
    )


def _claims(figures: Figures) -> list[Claim]:
    claims = []
    for direction in _DIRECTIONS:
        measured = case(direction=direction)
        under_way, dead, left = (sum(figures.values(measured, DYNACUT, name)) for name in _COUNTS)
        claims.append(
            Claim(
                f"SIGKILL at any instant leaves the process working, and the next run can undo ({direction})",
                f"{under_way:.0f} kills while it worked: {dead:.0f} dead, {left:.0f} not undone",
                dead == left == 0,
            )
        )
    return claims
