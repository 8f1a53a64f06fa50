"""What a hit costs: nanoseconds a call, measured in the program that makes the calls."""

from __future__ import annotations

import os
import random
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.figures import DYNACUT, Case, Claim, Figures, Result, Table, case, number, spread
from bench.machine import Cores, isolate
from bench.programs import SITE_DISTANCE, SITES, BenchmarkError, compile_program, load_base, started
from bench.tools import GDB, dynacut, write_plan

MORE_SITES_LIMIT_NS = 300
"""What is taken for `a few hundred nanoseconds`."""
_ONE = SITES // 2
_ROUNDS = 3
_GDB_HITS = 200
_TIMEOUT = 60.0


@dataclass(frozen=True)
class Way:
    """A way to disable functions, or none. calls: what targets/hit.c is told to do."""

    name: str
    peer: str
    table_sites: int
    calls: tuple[str, ...]
    on_hit: str = ""
    returns: int | None = None
    """What each call returns; None: its argument + 1."""

    def case(self, calls: str) -> Case:
        return case(way=self.name, table_sites=self.table_sites, calls=calls)


_BOTH = ("one", "shuffled")
WAYS = (
    Way("nothing disabled", "undisturbed", 0, _BOTH),
    Way("return=0", DYNACUT, 1, ("one",), "return=0", 0),
    Way("return=0", DYNACUT, SITES, _BOTH, "return=0", 0),
    Way("redirect", DYNACUT, 1, ("one",), "redirect=hit!denied", -1),
    Way("redirect", DYNACUT, SITES, _BOTH, "redirect=hit!denied", -1),
    Way("its own handler", "floor", 0, ("int3",), returns=0),
)
GDB_CASE = case(way="a breakpoint that returns 0", table_sites=1, calls="one")


def run(cores: Cores, folder: Path, repeat: int, *, quick: bool, progress: Callable[[str], None]) -> Result:
    """Each repetition has a fresh process for each way, measured in turns: what memory a process gets also counts."""
    executable = compile_program("hit", folder)
    figures = Figures("hit")
    count = 20_000 if quick else 50_000
    for repetition in range(repeat):
        with ExitStack() as stack:
            programs = []
            for way in WAYS:
                progress(f"hit: repetition {repetition + 1} of {repeat}, {way.name}")
                arguments = ("floor",) if way.peer == "floor" else ()
                program = stack.enter_context(_program(executable, *arguments, cores=cores))
                if way.on_hit:
                    _disable(way, program, executable, folder)
                programs.append((way, program))
            turns = [(way, program, calls) for way, program in programs for calls in way.calls] * _ROUNDS
            random.shuffle(turns)
            for way, program, calls in turns:
                times = count * (1 if way.returns is not None else 20)  # a call that is not hit takes no time
                figures.add(way.case(calls), way.peer, "call_ns", program.time(calls, times, way.returns))
            if shutil.which("gdb"):
                _measure_gdb(figures, programs[0][1], folder)
    return Result(figures, [_table(figures)], _claims(figures))


class _Hit:
    """A running targets/hit.c."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin = process.stdin
        self._stdout = process.stdout

    def ask(self, line: str) -> None:
        self._stdin.write(line.encode() + b"\n")

    def answer(self) -> str:
        """The next line; BenchmarkError if the program ends or says nothing."""
        return read_line(self._stdout.fileno())

    def time(self, calls: str, count: int, returns: int | None) -> float:
        """Nanoseconds a call; checks what the calls returned."""
        self.ask(f"{calls} {_ONE} {count}" if calls == "one" else f"{calls} {count}")
        nanoseconds, total = map(int, self.answer().split())
        expected = count * (count + 1) // 2 if returns is None else count * returns
        if total != expected:
            raise BenchmarkError(f"{calls} of {count} calls returned {total} in all, not {expected}")
        return nanoseconds / count


def read_line(descriptor: int) -> str:
    """A line from a pipe, byte by byte: nothing behind it is taken."""
    line = b""
    deadline = time.monotonic() + _TIMEOUT
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        byte = os.read(descriptor, 1) if readable else b""
        if not byte:
            raise BenchmarkError(f"no whole line came, only {line!r}")
        line += byte
    return line.decode().strip()


@contextmanager
def _program(executable: Path, *arguments: str, cores: Cores) -> Iterator[_Hit]:
    with started(executable, *arguments, stdout=subprocess.PIPE) as process:
        program = _Hit(process)
        program.answer()
        isolate(process.pid, cores)
        yield program


def _disable(way: Way, program: _Hit, executable: Path, folder: Path) -> None:
    program.ask("where")
    first = int(program.answer(), 16) - load_base(program.pid, executable)
    indices = [_ONE] if way.table_sites == 1 else range(way.table_sites)
    plan = folder / "hit.toml"
    write_plan(plan, executable, [first + SITE_DISTANCE * index for index in indices], way.on_hit)
    dynacut(program.pid, "--plan", plan)


def _measure_gdb(figures: Figures, program: _Hit, folder: Path) -> None:
    """gdb stops at the function's entry and lets it return 0, as often as the function is called."""
    program.ask("where")
    address = int(program.answer(), 16) + SITE_DISTANCE * _ONE
    script = folder / "hit.gdb"
    script.write_text(
        f"break *{address:#x}\n"
        "echo armed\\n\n"
        "set $hits = 0\n"
        f"while $hits < {_GDB_HITS}\n"
        "continue\n"
        "set $rax = 0\n"
        "set $rip = *(unsigned long *)$rsp\n"
        "set $rsp = $rsp + 8\n"
        "set $hits = $hits + 1\n"
        "end\n"
        "delete\n"
    )
    command = [*GDB, "-p", str(program.pid), "-x", str(script)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as process:
        assert process.stdout is not None
        while read_line(process.stdout.fileno()) != "armed":
            pass
        program.ask(f"one {_ONE} {_GDB_HITS}")
        process.communicate(timeout=_TIMEOUT)
    nanoseconds, total = map(int, program.answer().split())
    if total == 0:
        figures.add(GDB_CASE, "gdb", "call_ns", nanoseconds / _GDB_HITS)


def _table(figures: Figures) -> Table:
    rows = []
    for way in WAYS:
        for calls in way.calls:
            what = {"one": "the same one", "shuffled": "all of them, shuffled", "int3": "one with an int3"}[calls]
            rows.append(
                [
                    f"{way.name} ({way.peer})",
                    f"{way.table_sites:,}",
                    what,
                    spread(figures.values(way.case(calls), way.peer, "call_ns")),
                ]
            )
    values = figures.values(GDB_CASE, "gdb", "call_ns")
    if values:
        rows.append(["a breakpoint that returns 0 (gdb)", "1", "the same one", spread(values)])
    return Table(
        "the cost of a call of a disabled function, in ns",
        ["disabled by", "sites in the table", "which is called", "ns a call"],
        rows,
        (
            "median (90th percentile). floor: the program has an int3 there, and a handler of three assignments: "
            "what the kernel asks for a signal",
            "all of them, shuffled: every hit meets another entry of the table, and cold memory",
        ),
    )


def _claims(figures: Figures) -> list[Claim]:
    claims = []
    for name in ("return=0", "redirect"):
        one = figures.median(case(way=name, table_sites=1, calls="one"), DYNACUT, "call_ns")
        for calls in _BOTH:
            many = figures.median(case(way=name, table_sites=SITES, calls=calls), DYNACUT, "call_ns")
            if one is None or many is None:
                continue
            hits = "hits of the same one" if calls == "one" else "hits of all of them, shuffled"
            claims.append(
                Claim(
                    f"{SITES:,} sites cost a hit at most {MORE_SITES_LIMIT_NS} ns over one site ({name}, {hits})",
                    f"{number(many - one)} ns",
                    many - one <= MORE_SITES_LIMIT_NS,
                )
            )
    return claims
