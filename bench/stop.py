"""How long the target is stopped, as one of its own threads sees it; and how long the whole command takes.

Every measurement has a fresh process: a first patch must map the handler, later ones find it there. The observing
thread has a core to itself as far as others leave it that; dynacut, gdb and the target's other threads have another.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.control import stay_busy
from bench.figures import DYNACUT, PEERS, Case, Claim, Figures, Result, Table, case, number, spread
from bench.machine import Cores
from bench.programs import (
    SITE_DISTANCE,
    SITES,
    BenchmarkError,
    Observed,
    compile_program,
    load_base,
    observed,
    read_memory,
)
from bench.tools import GDB, GDB_BEST, INT3, Run, dynacut, gdb, write_gdb_buffer, write_gdb_sets, write_plan

STOP_LIMIT_US = 250
GDB_RATIO = 500
DIRECTIONS = ("on", "off")


@dataclass(frozen=True)
class Setting:
    """What is varied. observer: which thread spins, main or other. With peers: gdb is measured as well."""

    threads: int
    observer: str
    sites: int
    with_peers: bool

    @property
    def case(self) -> Case:
        return case(threads=self.threads, observer=self.observer, sites=self.sites)


def settings(*, quick: bool) -> list[Setting]:
    """The main thread alone can only be stopped; with more threads, either the main thread spins or it waits."""
    found = []
    for threads in (1, 8) if quick else (1, 8, 64):
        for sites in (1, SITES) if quick else (1, 100, SITES):
            if threads == 1:
                found.append(Setting(threads, "main", sites, with_peers=True))
            else:
                found.append(Setting(threads, "other", sites, with_peers=True))
                found.append(Setting(threads, "main", sites, with_peers=False))
    return found


def run(cores: Cores, folder: Path, repeat: int, *, quick: bool, progress: Callable[[str], None]) -> Result:
    """Everything in turns: a disturbance from outside meets all alike."""
    executable = compile_program("observer", folder)
    figures = Figures("stop")
    table = settings(quick=quick)
    plans = {each.sites: folder / f"{each.sites}.toml" for each in table}
    with observed(executable, 1, "main", cores, folder) as target:
        first = target.sites - load_base(target.pid, executable)
    for count, path in plans.items():
        write_plan(path, executable, [first + SITE_DISTANCE * index for index in range(count)], "return=0")
    peers = [DYNACUT, *(PEERS if shutil.which("gdb") else ())]
    turns = [(each, peer) for each in table for peer in peers if peer == DYNACUT or each.with_peers]
    with observed(executable, 1, "main", cores, folder) as target:
        dynacut(target.pid, "--plan", plans[SITES])  # fills the caches
        dynacut(target.pid, "--undo")
    for repetition in range(repeat):
        random.shuffle(turns)
        for done, (each, peer) in enumerate(turns):
            progress(f"stop: repetition {repetition + 1} of {repeat}, {100 * done // len(turns)}%")
            with observed(executable, each.threads, each.observer, cores, folder) as target:
                _measure(figures, each, peer, target, plans[each.sites], folder)
    return Result(figures, _tables(figures, table, cores), _claims(figures))


def _measure(figures: Figures, setting: Setting, peer: str, target: Observed, plan: Path, folder: Path) -> None:
    addresses = [target.sites + SITE_DISTANCE * index for index in range(setting.sites)]
    size = addresses[-1] + 1 - addresses[0]
    text = read_memory(target.pid, addresses[0], size)
    old = text[::SITE_DISTANCE]
    patched = bytearray(text)
    patched[::SITE_DISTANCE] = bytes([INT3]) * setting.sites
    for direction, wanted in zip(DIRECTIONS, (bytes(patched), text), strict=True):
        script = folder / "script"
        if peer == "gdb":
            write_gdb_sets(script, addresses, [INT3] * setting.sites if direction == "on" else old)
        elif peer == "gdb, best":
            write_gdb_buffer(script, addresses[0], wanted)
        with target.control.measuring():
            if peer == DYNACUT:
                ran = dynacut(target.pid, *(("--plan", plan) if direction == "on" else ("--undo",)))
            else:
                ran = gdb(target.pid, script, GDB if peer == "gdb" else GDB_BEST)
        figures.add(setting.case, peer, f"{direction}_stop_us", target.control.largest_us)
        figures.add(setting.case, peer, f"{direction}_any_us", target.control.any_us)
        figures.add(setting.case, peer, f"{direction}_held_us", target.control.stopped_us)
        figures.add(setting.case, peer, f"{direction}_lost_us", target.control.lost_us)
        figures.add(setting.case, peer, f"{direction}_preemptions", target.control["preempted"])
        _add_run(figures, setting.case, peer, direction, ran)
        if read_memory(target.pid, addresses[0], size) != wanted:
            raise BenchmarkError(f"{peer} has not written what it should: {setting}, {direction}")
        if direction == "on":
            with target.control.measuring():
                stay_busy(ran.wall_ms / 1000)
            figures.add(setting.case, peer, "quiet_us", target.control.largest_us)
            figures.add(setting.case, peer, "quiet_any_us", target.control.any_us)


def _add_run(figures: Figures, case: Case, peer: str, direction: str, ran: Run) -> None:
    figures.add(case, peer, f"{direction}_wall_ms", ran.wall_ms)
    if ran.report:
        figures.add(case, peer, f"{direction}_own_sum_us", ran.report["stopped_us"])
        figures.add(case, peer, f"{direction}_own_longest_us", ran.report["longest_stop_us"])


_HEAD = ["threads", "spins", "sites"]


def _tables(figures: Figures, table: Sequence[Setting], cores: Cores) -> list[Table]:
    return [_stops(figures, table, cores), _own_stops(figures, table), _walls(figures, table)]


def _head(setting: Setting) -> list[str]:
    return [str(setting.threads), setting.observer, f"{setting.sites:,}"]


def _spreads(figures: Figures, case: Case, measures: Iterable[str]) -> list[str]:
    return [spread(figures.values(case, DYNACUT, measure)) for measure in measures]


def _both(*measures: str) -> list[str]:
    """Measures of on, then of off."""
    return [f"{direction}_{measure}" for direction in DIRECTIONS for measure in measures]


def _stops(figures: Figures, table: Sequence[Setting], cores: Cores) -> Table:
    return Table(
        "the stop that the target sees, in µs",
        [*_HEAD, "nobody", "on", "on: held", "off", "off: held", *PEERS, *(f"{peer}: times" for peer in PEERS)],
        [
            [
                *_head(each),
                *_spreads(figures, each.case, ["quiet_us", *_both("stop_us", "held_us")]),
                *(number(_smaller(figures, each.case, peer, "stop_us")) for peer in PEERS),
                *(number(_ratio(figures, each.case, peer)) for peer in PEERS),
            ]
            for each in table
        ],
        (
            "median (90th percentile) of the largest gap that the spinning thread saw. nobody: the same time with "
            "nobody touching the target and the other core as busy, the noise of the machine",
            "held: of the gaps in which the thread was stopped, not interrupted by the machine; 0: it never was",
            "gdb: the smaller median of on and off, with one `set` a site; best: without symbols, one `restore`. "
            "times: how many times longer its stop is, the smaller of on and off",
            "the spinning thread has one core, at real-time priority; the tools and all other threads the other one"
            if cores.apart
            else "ONE CORE ONLY: the tools preempt the spinning thread, these figures mean nothing",
        ),
    )


def _own_stops(figures: Figures, table: Sequence[Setting]) -> Table:
    measures = _both("own_longest_us", "own_sum_us", "lost_us", "preemptions")
    columns = [f"{direction}: {name}" for direction in DIRECTIONS for name in ("longest", "sum", "lost", "preempted")]
    return Table(
        "where dynacut's stops go, in µs",
        [*_HEAD, *columns],
        [[*_head(each), *_spreads(figures, each.case, measures)] for each in table],
        (
            "longest, sum: of all its stops of any thread, by dynacut's own clock. lost: all gaps of 10 µs or more "
            "that the spinning thread saw. preempted: gaps in which it only "
            "made way for other work; they count in no stop, but in `any` of the JSON",
        ),
    )


def _walls(figures: Figures, table: Sequence[Setting]) -> Table:
    return Table(
        "wall time of the whole command, in ms",
        [*_HEAD, "dynacut on", "dynacut off", *PEERS],
        [
            [
                *_head(each),
                *_spreads(figures, each.case, _both("wall_ms")),
                *(number(_smaller(figures, each.case, peer, "wall_ms")) for peer in PEERS),
            ]
            for each in table
        ],
        ("gdb: the smaller median of on and off",),
    )


def _smaller(figures: Figures, case: Case, peer: str, measure: str) -> float | None:
    medians = [figures.median(case, peer, f"{direction}_{measure}") for direction in DIRECTIONS]
    return min((median for median in medians if median is not None), default=None)


def _ratio(figures: Figures, case: Case, peer: str) -> float | None:
    """A peer's stop over dynacut's: the smaller of on and off."""
    ratios = [
        median / own
        for direction in DIRECTIONS
        if (own := figures.median(case, DYNACUT, f"{direction}_stop_us"))
        and (median := figures.median(case, peer, f"{direction}_stop_us")) is not None
    ]
    return min(ratios, default=None)


def _claims(figures: Figures) -> list[Claim]:
    claims = []
    for measure, text in (
        (
            "held_us",
            f"no thread is stopped for more than {STOP_LIMIT_US} µs median, at any number of sites and threads",
        ),
        ("stop_us", f"the same with every interruption by the machine counted: at most {STOP_LIMIT_US} µs median"),
    ):
        worst, where = max(
            (median, f"{direction}, {_name(case)}")
            for direction in DIRECTIONS
            for case, median in figures.medians(DYNACUT, f"{direction}_{measure}").items()
        )
        claims.append(Claim(text, f"{number(worst)} µs ({where})", worst <= STOP_LIMIT_US))
    for peer in PEERS:
        cases = figures.medians(peer, "on_stop_us")
        ratios = [(ratio, case) for case in cases if (ratio := _ratio(figures, case, peer)) is not None]
        if ratios:
            least, least_case = min(ratios)
            text = f"it is at least {GDB_RATIO} times shorter than with {peer}"
            claims.append(Claim(text, f"{number(least)} times ({_name(least_case)})", least >= GDB_RATIO))
    return claims


def _name(case: Case) -> str:
    return " ".join(f"{key}={value}" for key, value in case)
