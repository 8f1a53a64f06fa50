"""dynacut itself ended at any instant, and run a thousand times: the target lives, works, and tells the truth."""

from __future__ import annotations

import io
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dynacut.live.change  # what the command imports when it is needed: here once, before the forks
import dynacut.shared.binary.lines
import dynacut.shared.resolve  # noqa: F401
from dynacut.cli.main import main
from dynacut.shared.proc import read_mappings, task_status, thread_ids

from .programs import Program, feature
from .servers import wait_until

Start = Callable[..., Program]
_KILLS = 100
"""Of each direction."""
live_options: tuple[str, ...] = ()
"""What each `live` command gets in addition; set by tests of another engine."""


@dataclass(frozen=True)
class Run:
    """A dynacut command in a process of its own, forked from this one to save the imports."""

    pid: int
    output: int

    def has_ended(self) -> bool:
        """Whether it has written all it has to say."""
        return bool(select.select([self.output], [], [], 0)[0])

    def result(self, timeout: float = 30.0) -> tuple[int, str, str]:
        """Waits for the end: the exit status, or minus the signal; stdout and stderr."""
        data = b""
        while select.select([self.output], [], [], timeout)[0]:
            part = os.read(self.output, 1 << 16)
            if not part:
                break
            data += part
        else:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self.output)
        out, _, errors = data.decode().partition("\0")
        return os.waitstatus_to_exitcode(status), out, errors


def start(*arguments: str | int | Path, uid: int = 0) -> Run:
    """Starts a command, as root or as another user."""
    if arguments[0] == "live":
        arguments = ("live", *live_options, *arguments[1:])
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write_end)
        return Run(pid, read_end)
    status = 70
    try:
        if uid:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        out, errors = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(errors):
            try:
                status = main([str(argument) for argument in arguments])
            except SystemExit as error:  # argparse
                status = int(error.code or 0)
        data = f"{out.getvalue()}\0{errors.getvalue()}".encode()
        while data:
            data = data[os.write(write_end, data) :]
    except BaseException as error:
        os.write(write_end, f"\0Traceback: {error!r}".encode()[:4096])
    finally:
        os._exit(status)


def run_json(*arguments: str | int | Path) -> dict[str, Any]:
    """Runs a command that must succeed; what it reports."""
    status, out, errors = start(*arguments, "--json").result()
    assert status == 0, f"status {status}: {errors}"
    report = json.loads(out)
    assert isinstance(report, dict)
    return report


def wait_for_more(program: Program, counter: str, more: int) -> None:
    """Returns when one of the program's counters has grown by more than that from now on."""
    before = program.counters()[counter]
    wait_until(lambda: program.counters()[counter] > before + more, f"{more} more {counter}")


def symbol(program: Program, name: str) -> int:
    """The address of a function in the running program."""
    executable = Path(f"/proc/{program.pid}/exe").readlink()
    lines = subprocess.run(["nm", str(executable)], check=True, capture_output=True, text=True).stdout.splitlines()
    (offset,) = {int(line.split()[0], 16) for line in lines if line.split()[-1] == name}
    base = next(part.start for part in read_mappings(program.pid) if part.path == str(executable))
    return base + offset


def bytes_at(program: Program, address: int, size: int) -> bytes:
    with Path(f"/proc/{program.pid}/mem").open("rb") as memory:
        memory.seek(address)
        return memory.read(size)


def check_truth(program: Program, address: int, old: bytes) -> str:
    """What dynacut says of the feature, compared with the bytes themselves; its state."""
    report = run_json("live", "--pid", program.pid, "-v")
    assert report["foreign"] == []
    found = bytes_at(program, address, len(old))
    if not report["features"]:
        assert found == old, "patched, but dynacut knows of nothing"
        return "nothing"
    (entry,) = report["features"]
    assert entry["name"] == "work"
    (site,) = entry["site_list"]
    assert int(site["address"], 16) == address
    assert site["patched"] == (found == b"\xcc" * len(found)), f"{found.hex(' ')}, but dynacut says {entry}"
    assert entry["state"] == ("disabled" if site["patched"] else "enabled")
    return str(entry["state"])


def check_works(program: Program) -> None:
    """Whether all threads go on and have never got a wrong result, and none is left stopped or traced."""
    before = program.counters()
    wait_until(lambda: program.counters()["calls"] > before["calls"] + 1000, "the threads call on")
    assert program.counters()["wrong"] == 0
    assert program.ask("other 3") == "17"
    assert program.ask("feature 3") == str(feature(3))
    for tid in thread_ids(program.pid):
        status = task_status(program.pid, tid)
        assert (status.tracer, status.state in "RSD") == (0, True)
    wait_until(
        lambda: not any(task_status(program.pid, tid).blocked for tid in thread_ids(program.pid)),
        "threads have no longer the mask that they begin with",
    )


def _seconds(arguments: tuple[str | int, ...], program: Program) -> float:
    """How long a command takes that is not killed."""
    started = time.monotonic()
    assert start(*arguments).result()[0] == 0
    assert program.is_running()
    return time.monotonic() - started


def _killed_many_times(program: Program, arguments: tuple[str | int, ...], reset: tuple[str | int, ...]) -> set[str]:
    """Kills the command at instants all over its course; the states that were found afterwards."""
    address = symbol(program, "work")
    old = bytes_at(program, address, 1)
    assert start(*reset).result()[0] in (0, 1)
    duration = _seconds(arguments, program)
    assert start(*reset).result()[0] == 0
    chance = random.Random(20)
    states: set[str] = set()
    completed = 0
    for kill in range(_KILLS):
        run = start(*arguments)
        # The first third looks at files only; the rest is what may hurt.
        time.sleep(duration * chance.uniform(0.3 if kill % 5 else 0.0, 1.0))
        os.kill(run.pid, signal.SIGKILL)
        status, _, errors = run.result()
        assert status in (0, -signal.SIGKILL), errors
        completed += status == 0
        duration *= 0.95 if status == 0 else 1.02  # how long it takes changes with the machine's load
        assert program.is_running(), f"kill {kill} ended the target: {program.wait()}"
        states.add(check_truth(program, address, old))
        if kill % 4 == 0:
            check_works(program)
        if kill % 2 == 0:  # what was begun can be finished ...
            assert start(*arguments).result()[0] == 0
        assert start(*reset).result()[0] == 0  # ... or taken back
        assert program.is_running(), f"the target ended after kill {kill}: {program.wait()}"
    check_works(program)
    assert completed < _KILLS / 2, "most kills came too late to tell anything"
    return states


def test_a_kill_at_any_instant_of_a_change_leaves_the_target_alive_and_known(program: Start) -> None:
    target = program("counter", 2)
    disable = ("live", "--pid", target.pid, "--disable", "work", "--on-hit", "redirect=denied")
    undo = ("live", "--pid", target.pid, "--undo")
    assert {"nothing", "disabled"} <= _killed_many_times(target, disable, undo)
    report = run_json(*undo)
    assert report["features"] == []


def test_a_kill_at_any_instant_of_an_undo_leaves_the_target_alive_and_known(program: Start) -> None:
    target = program("counter", 2)
    disable = ("live", "--pid", target.pid, "--disable", "work", "--on-hit", "redirect=denied")
    undo = ("live", "--pid", target.pid, "--undo")
    assert {"nothing", "disabled"} <= _killed_many_times(target, undo, disable)
    report = run_json(*undo)
    assert report["features"] == []
    before = target.counters()
    wait_until(lambda: target.counters()["calls"] > before["calls"] + 1000, "calls after the undo")
    after = target.counters()
    wait_until(lambda: target.counters()["calls"] > after["calls"] + 1000, "further calls")
    assert target.counters()["denied"] == after["denied"], "nothing is refused any more"


_CYCLES = """
import io, sys
from contextlib import redirect_stdout
from dynacut.cli.main import main
pid, count, off, on = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(), sys.argv[4].split()
for cycle in range(count):
    for what in (off, on):
        with redirect_stdout(io.StringIO()):
            status = main(["live", *sys.argv[5:], "--pid", pid, *what])
        if status:
            sys.exit(f"cycle {cycle}, {' '.join(what)}: status {status}")
"""


def cycle(program: Program, count: int, off: str, on: str) -> None:
    """Runs two commands in turn, in one process, as fast as it goes."""
    command = [sys.executable, "-c", _CYCLES, str(program.pid), str(count), off, on, *live_options]
    done = subprocess.run(command, check=False, timeout=120, capture_output=True, text=True)
    assert program.is_running(), f"the target ended with {program.wait()}: {done.stderr}"
    assert (done.returncode, done.stderr) == (0, "")


def test_a_thousand_cycles_under_load_break_nothing(program: Start) -> None:
    target = program("counter", 2)
    run_json("live", "--pid", target.pid, "--disable", "work", "--on-hit", "redirect=denied")
    cycle(target, 1000, "--disable work", "--enable work")
    counters = target.counters()
    assert counters["wrong"] == 0
    (entry,) = run_json("live", "--pid", target.pid)["features"]
    assert (entry["state"], entry["hits"]) == ("enabled", counters["denied"])
    check_works(target)
    assert run_json("live", "--pid", target.pid, "--undo")["features"] == []


def test_undos_under_load_never_take_the_handler_from_a_thread_on_its_way_there(program: Start) -> None:
    """A thread that has run into the int3 must meet the handler, not SIGTRAP's default action."""
    target = program("callers", 2)
    assert target.ask("start") == "ok"
    for _ in range(3):
        cycle(target, 50, "--disable feature --on-hit redirect=denied", "--undo")
        wait_for_more(target, "right", 1000)
    counters = target.counters("stop")
    assert counters["wrong"] == 0
    assert counters["denied"] > 0
