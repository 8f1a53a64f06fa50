"""Threads that come and go, forks, and waits that nobody may notice were interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dynacut.handlers.table import FIRST_SLOT, SLOT_COUNT, SLOT_DONE_OFFSET, SLOT_SIZE
from dynacut.live.process import Process
from dynacut.live.ptrace.passage import all_seen_outside
from dynacut.live.ptrace.patcher import Patcher
from dynacut.live.ptrace.stop_clock import StopClock
from dynacut.live.ptrace.stops import prompt_stops
from dynacut.live.ptrace.tracee import Tracee
from dynacut.live.ptrace.window import all_stopped
from dynacut.shared import resolve
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.plan_file import loads
from dynacut.shared.proc import blocked_in, task_status, thread_ids
from dynacut.shared.region import Region, find_region

from .conftest import Dynacut, Rounds
from .programs import DENIED, CannotRunError, Program, feature
from .servers import wait_until
from .test_kill import cycle, run_json, start, wait_for_more
from .untouched import Snapshot

Start = Callable[..., Program]
_SCOPES = ["entry", "block"]
_SLEEPING = (219, 230)
"""restart_syscall, once a stop has interrupted it, and clock_nanosleep"""
_PLAN = loads('format = 1\n[[feature]]\nname = "f"\non_hit = "return=-1"\nsites = [{ at = "feature" }]\n')


@pytest.mark.parametrize("scope", _SCOPES)
def test_threads_come_and_go_meanwhile(program: Start, scope: str, rounds: Rounds) -> None:
    target = program("threads", 4)
    for _ in rounds(10):
        run_json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "redirect=denied", "--scope", scope)
        wait_for_more(target, "denied", 100)
        run_json("live", "--pid", target.pid, "--undo")
        wait_for_more(target, "right", 100)
    assert target.counters()["wrong"] == 0


@pytest.mark.parametrize("scope", _SCOPES)
def test_sixty_four_busy_threads(program: Start, scope: str, rounds: Rounds) -> None:
    target = program("callers", 64)
    assert target.ask("start") == "ok"
    for _ in rounds(3):
        run_json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "redirect=denied", "--scope", scope)
        wait_for_more(target, "denied", 1000)
        run_json("live", "--pid", target.pid, "--undo", "--timeout", "30")
        wait_for_more(target, "right", 1000)
    assert target.counters("stop")["wrong"] == 0
    assert len(thread_ids(target.pid)) == 65


def test_no_thread_of_many_is_left_stopped(program: Start, rounds: Rounds) -> None:
    """One that gets no processor for a while stops late; whoever asked it to must still let it go."""
    target = program("callers", 64)
    assert target.ask("start") == "ok"
    cycle(target, len(rounds(4)), "--disable feature --on-hit redirect=denied", "--undo")
    assert [tid for tid in thread_ids(target.pid) if task_status(target.pid, tid).state in "tT"] == []
    assert target.counters("stop")["wrong"] == 0


def test_a_thread_that_has_just_run_into_a_trap_or_a_fault_is_not_sent_elsewhere(program: Start) -> None:
    """A requested stop comes before the signal, whose handler looks at rip for where the instruction was."""
    target = program("busy")
    run_json("live", "--pid", target.pid, "--disable", "other", "--on-hit", "redirect=denied", "--as", "other")
    run_json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "redirect=denied", "--as", "feature")
    cycle(target, 20, "--disable other", "--enable other")
    run_json("live", "--pid", target.pid, "--undo")
    wait_for_more(target, "right", 100)
    assert target.counters()["wrong"] == 0


def test_a_main_thread_that_ends_is_not_waited_for(program: Start) -> None:
    """It stays listed, a zombie, until the others have ended."""
    target = program("headless")
    with Process(target.pid) as process:
        assert target.ask("end") == "ended"
        wait_until(lambda: task_status(target.pid).state == "Z", "the main thread has ended")
        with prompt_stops(), all_stopped(process) as held:
            assert list(held) == [tid for tid in thread_ids(target.pid) if tid != target.pid]
    assert target.ask("feature 3") == str(feature(3))


def test_a_stub_that_a_thread_is_in_is_not_overwritten(program: Start, dynacut: Dynacut) -> None:
    """One is held up in a stub that has done its work, while all others have been used long ago."""
    target = program("callers", 2)
    assert target.ask("start") == "ok"
    run_json("live", "--pid", target.pid, "--disable", "main", "--on-hit", "return=0")
    loop = b"\xeb\xfe"
    with Process(target.pid) as process:
        found = find_region(process)
        assert found is not None
        slots = found.region.code + FIRST_SLOT
        for index in range(SLOT_COUNT):
            process.write(slots + (index + 1) * SLOT_SIZE - 8, (index + 1).to_bytes(8, "little"))
        process.write(found.region.table + SLOT_DONE_OFFSET, b"\1" * SLOT_COUNT)
        process.write(slots, loop)
        tid, rip = _send_running_thread(target.pid, slots)
        before = Snapshot.of(target.pid)
        done = dynacut("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "redirect=denied")
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 2), done.stderr
        assert "too often" in done.stderr
        assert Snapshot.of(target.pid) == before
        assert process.read(slots, len(loop)) == loop
        with prompt_stops(), Tracee(tid) as tracee:
            tracee.interrupt(10)
            assert tracee.registers["rip"] == slots
            tracee.go_to(rip)
    run_json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "redirect=denied")
    run_json("live", "--pid", target.pid, "--undo")
    wait_for_more(target, "right", 1000)
    assert target.counters("stop")["wrong"] == 0


def _send_running_thread(pid: int, address: int) -> tuple[int, int]:
    """Sends a thread that runs the program's own code to an address; its id, and where it was."""
    while True:
        for tid in thread_ids(pid)[1:]:
            with prompt_stops(), Tracee(tid) as tracee:
                tracee.interrupt(10)
                if not tracee.in_syscall and not tracee.delivers_signal:
                    rip = tracee.registers["rip"]
                    tracee.go_to(address)
                    return tid, rip


@pytest.mark.parametrize(("name", "count"), [("eintr", 7), ("waiters", 9)])
@pytest.mark.parametrize("scope", _SCOPES)
def test_no_wait_ends_early_or_with_eintr(program: Start, name: str, count: int, scope: str, rounds: Rounds) -> None:
    target = program(name)
    blocked = f"blocked {count}"
    for _ in rounds(20):
        run_json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "redirect=denied", "--scope", scope)
        assert target.ask("feature 3") == str(DENIED)
        assert target.ask("report") == blocked
        run_json("live", "--pid", target.pid, "--undo")
        assert target.ask("report") == blocked
    if name == "eintr":
        assert target.ask("wake") == f"woken {count - 1}"


@pytest.mark.parametrize("scope", _SCOPES)
@pytest.mark.parametrize("way", ["wait", "together", "worker", "poll"])
def test_a_program_that_waits_in_io_uring_and_the_kernels_threads_in_it(
    program: Start, dynacut: Dynacut, way: str, scope: str
) -> None:
    """Those threads never run the program's code; their masks, which block everything, are none of ours."""
    try:
        target = program("uring", way)
    except CannotRunError:
        pytest.skip("this kernel has no io_uring, or does not let us use it")
    live = ("live", "--pid", target.pid, "--timeout", "20")
    if way in ("worker", "poll"):
        wait_until(lambda: len(thread_ids(target.pid)) == 2, "the kernel has made its thread")
    masks = {tid: task_status(target.pid, tid).blocked for tid in thread_ids(target.pid)}
    dynacut.json(*live, "--disable", "feature", "--on-hit", "return=-1", "--as", "f", "--scope", scope)
    assert target.ask("feature 3") == str(DENIED)
    document = dynacut.json(*live)
    assert [each["state"] for each in document["features"]] == ["disabled"]
    assert not any("SIGTRAP" in str(warning) for warning in document.get("warnings", []))
    dynacut.json(*live, "--undo")
    assert target.ask("feature 3") == str(feature(3))
    if way != "together":  # one call that has submitted something returns that when it is interrupted
        assert target.ask("report") == "eintr 0 early 0"
    now = {tid: task_status(target.pid, tid).blocked for tid in thread_ids(target.pid)}
    assert masks == {tid: now[tid] for tid in masks if tid in now}


def test_no_wait_ends_when_another_thread_cannot_be_stopped(program: Start) -> None:
    """A thread sits in vfork: the block is refused, and those that were stopped for it must not notice."""
    target = program("vfork_thread")
    assert target.ask("report") == "blocked"
    status, _, errors = start(
        "live", "--pid", target.pid, "--disable", "feature", "--on-hit", "return=-1", "--scope", "block",
        "--timeout", "1",
    ).result()  # fmt: skip
    assert (status, len(errors.splitlines())) == (1, 2), errors
    assert target.ask("report") == "blocked"
    assert target.ask("feature 3") == str(feature(3))
    assert target.ask("wake") == "blocked"
    run_json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "return=-1", "--scope", "block")
    assert target.ask("feature 3") == "-1"


def test_a_large_write_is_not_cut_short(program: Start) -> None:
    """A stop makes write(2) return what it has written so far. The change may wait, or be refused; not that."""
    target = program("writer")

    def waits_in_write() -> bool:
        waits = blocked_in(target.pid, target.pid)
        return waits is not None and waits.number == 1

    wait_until(waits_in_write, "the pipe is full")
    run = start("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "return=-1", "--timeout", "0.5")
    assert run.result()[0] in (0, 1)
    assert target.ask("read") == f"wrote {1 << 20} of {1 << 20}"


def test_a_vfork_parent_is_refused_and_goes_on_afterwards(program: Start, dynacut: Dynacut) -> None:
    target = program("vforker")
    assert target.read_line().startswith("child ")
    wait_until(lambda: task_status(target.pid).state == "D", "the parent waits for its child")
    before = Snapshot.of(target.pid)
    done = dynacut("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "return=-1", "--timeout", "0.5")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 2), done.stderr
    assert Snapshot.of(target.pid) == before
    assert target.ask("wake") == "resumed 0"
    assert target.ask("feature 3") == str(feature(3))
    dynacut.json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "return=-1")
    assert target.ask("feature 3") == "-1"


@pytest.mark.parametrize("arguments", [(), ("share",)])
def test_who_shares_its_memory_with_another_process_is_refused(
    program: Start, dynacut: Dynacut, arguments: tuple[str, ...]
) -> None:
    """An int3 for the one would be in both, and the handler in one."""
    target = program("vforker", *arguments)
    child = int(target.read_line().removeprefix("child "))
    before = Snapshot.of(target.pid)
    for pid, other in ((target.pid, child), (child, target.pid)):
        done = dynacut("live", "--pid", pid, "--disable", "feature", "--on-hit", "return=-1")
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 2), done.stderr
        assert f"shares its memory with process {other} (vforker)" in done.stderr
    assert Snapshot.of(target.pid) == before
    assert target.ask("wake") == "resumed 0"
    dynacut.json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "return=-1")
    assert target.ask("feature 3") == "-1"


@pytest.mark.parametrize("arguments", [(), ("share",)])
def test_no_int3_is_written_while_a_child_without_the_handler_has_the_memory(
    program: Start, arguments: tuple[str, ...]
) -> None:
    """It was begun before the handler was installed, and after the process was admitted."""
    target = program("vforker", *arguments)
    assert target.read_line().startswith("child ")
    wait_until(lambda: task_status(target.pid).state == ("S" if arguments else "D"), "the parent waits for its child")
    before = Snapshot.of(target.pid)
    with Process(target.pid) as process:
        with pytest.raises(DynacutError) as caught:
            Patcher(process, timeout=1).apply(resolve.disable(_PLAN, process, None))
        assert caught.value.status is ExitStatus.REFUSED
        assert Snapshot.of(target.pid) == before
        outside = Region(1 << 20, 1 << 20)
        assert all_seen_outside(process, outside, StopClock(), time.monotonic() + 0.5)
        if not arguments:
            assert not all_seen_outside(process, outside, StopClock(), time.monotonic() + 0.5, forks=True)
    assert target.ask("wake") == "resumed 0"
    assert target.ask("feature 3") == str(feature(3))


def test_a_process_that_runs_another_program_by_now_is_left_alone(program: Start) -> None:
    """A vfork child is opened and then calls execve, while its parent keeps the memory that was opened."""
    target = program("vforker")
    child = int(target.read_line().removeprefix("child "))
    before = Snapshot.of(target.pid)
    with Process(child) as process:
        patches = resolve.disable(_PLAN, process, None)
        target.send("exec")
        wait_until(lambda: _sleeps(child), "the other program runs")
        with pytest.raises(DynacutError, match="runs another program") as caught:
            Patcher(process, timeout=2).apply(patches)
    assert caught.value.status is ExitStatus.REFUSED
    wait_until(lambda: _sleeps(child), "the other program goes on")
    assert Snapshot.of(target.pid) == before
    os.kill(child, signal.SIGKILL)
    target.expect(f"resumed {signal.SIGKILL.value}")
    assert target.ask("feature 3") == str(feature(3))


def _sleeps(pid: int) -> bool:
    waits = blocked_in(pid, pid)
    return waits is not None and waits.number in _SLEEPING


def test_forked_children_inherit_the_patch_and_count_for_themselves(program: Start, dynacut: Dynacut) -> None:
    target = program("forker")
    elder = int(target.ask("spawn"))
    dynacut.json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "redirect=denied")
    child = int(target.ask("spawn"))
    assert target.ask("fork 3") == f"exit 0 result {DENIED}"
    assert target.ask("each 3") == f"{feature(3)} {DENIED}"
    (entry,) = dynacut.json("live", "--pid", child)["features"]
    assert (entry["state"], entry["hits"]) == ("disabled", 1)
    assert dynacut.json("live", "--pid", elder)["features"] == []
    dynacut.json("live", "--pid", child, "--undo")
    assert target.ask("each 3") == f"{feature(3)} {feature(3)}"
    assert target.ask("feature 3") == str(DENIED)
    assert target.ask("fork 3") == f"exit 0 result {DENIED}"


def test_a_tree_is_changed_as_one(program: Start, dynacut: Dynacut) -> None:
    target = program("forker")
    children = [int(target.ask("spawn")) for _ in range(3)]
    tree = ("live", "--pid", target.pid, "--tree")
    report = dynacut.json(*tree, "--disable", "feature", "--on-hit", "redirect=denied")
    assert {process["pid"] for process in report["processes"]} == {target.pid, *children}
    assert target.ask("each 3") == " ".join([str(DENIED)] * 3)
    assert target.ask("feature 3") == str(DENIED)
    (entry,) = dynacut.json(*tree)["features"]
    assert (entry["state"], entry["hits"]) == ("disabled", 4)
    dynacut.json(*tree, "--undo")
    assert target.ask("each 3") == " ".join([str(feature(3))] * 3)
    assert target.ask("feature 3") == str(feature(3))


def test_a_descendant_that_runs_another_program_is_left_alone(program: Start, dynacut: Dynacut) -> None:
    target = program("forker")
    child, other = int(target.ask("spawn")), int(target.ask("exec"))
    wait_until(lambda: _sleeps(other), "the other program runs")
    before = Snapshot.of(other)
    tree = ("live", "--pid", target.pid, "--tree")
    for _ in range(2):
        report = dynacut.json(*tree, "--disable", "feature", "--on-hit", "redirect=denied")
        assert [process["pid"] for process in report["processes"]] == [target.pid, child]
        assert (target.ask("each 3"), target.ask("feature 3")) == (str(DENIED), str(DENIED))
        dynacut.json(*tree, "--undo")
        assert (target.ask("each 3"), target.ask("feature 3")) == (str(feature(3)), str(feature(3)))
    assert Snapshot.of(other) == before


def test_a_zombie_in_a_tree_is_passed_over(dynacut: Dynacut) -> None:
    """Every busy server has a child now and then that has ended and is not yet reaped."""
    with subprocess.Popen(["sh", "-c", "true & exec sleep 1000"]) as parent:
        try:
            process = psutil.Process(parent.pid)
            wait_until(lambda: [child.status() for child in process.children()] == ["zombie"], "a zombie")
            report = dynacut.json("live", "--pid", parent.pid, "--tree")
            assert [each["pid"] for each in report["processes"]] == [parent.pid]
        finally:
            parent.kill()


def test_exec_loses_the_patch_and_the_new_program_is_whole(dynacut: Dynacut, tmp_path: Path) -> None:
    """A shell is patched and replaces itself by another program."""
    ready = tmp_path / "ready"
    script = f"touch {ready}; read line; exec sh -c 'read line; exit 7'"
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE) as process:
        try:
            wait_until(ready.exists, "the shell waits")
            main = subprocess.run(["sh", "-c", "readlink /proc/$PPID/exe"], check=True, capture_output=True)
            assert main.returncode == 0
            before = Snapshot.of(process.pid)
            dynacut.json("live", "--pid", process.pid, "--disable", "libc!getenv", "--on-hit", "return=0")
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()

            def is_another() -> bool:
                try:
                    return Snapshot.of(process.pid).code.keys() != before.code.keys()
                except OSError:  # amid the exec
                    return False

            wait_until(is_another, "the exec")
            assert dynacut.json("live", "--pid", process.pid)["features"] == []
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.wait(10) == 7
        finally:
            process.kill()
