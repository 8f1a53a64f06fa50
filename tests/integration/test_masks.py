"""SIGTRAP kept deliverable while features are disabled, and all that was changed for it put back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from dynacut.shared.proc import blocked_in, task_status, thread_ids
from dynacut.shared.target import SIGTRAP

from .conftest import Dynacut, Rounds
from .programs import DENIED, Program, feature
from .servers import wait_until
from .test_kill import wait_for_more

Start = Callable[..., Program]
_BIT = 1 << (SIGTRAP - 1)
_SYS_READ = 0


def _deny(dynacut: Dynacut, pid: int) -> None:
    report = dynacut.json("live", "--pid", pid, "--disable", "feature", "--on-hit", "redirect=denied")
    assert report["features"][0]["state"] == "disabled"


def _waits_in_read(program: Program) -> bool:
    waits = blocked_in(program.pid, program.pid)
    return waits is not None and waits.number == _SYS_READ


def _trap(program: Program) -> None:
    """Sends SIGTRAP while the program waits in read; returns when it has been taken, or the program is gone."""
    wait_until(lambda: _waits_in_read(program), "the program waits for a line")
    os.kill(program.pid, signal.SIGTRAP)

    def taken() -> bool:
        if not program.is_running():
            return True
        status = task_status(program.pid)
        pending = (status.shared_pending | status.thread_pending) & _BIT
        return not pending and status.state == "S" and _waits_in_read(program)

    wait_until(taken, "SIGTRAP is taken")


def _masks(pid: int) -> dict[int, tuple[int, int, int]]:
    statuses = {tid: task_status(pid, tid) for tid in thread_ids(pid)}
    return {tid: (status.blocked, status.ignored, status.caught) for tid, status in statuses.items()}


def test_threads_and_handlers_that_block_sigtrap_survive_hits_and_get_their_masks_back(
    program: Start, dynacut: Dynacut
) -> None:
    target = program("fullmask")
    assert target.ask("masks") == "handler 1 thread 1"
    wait_until(  # or a thread may still have the mask with which it begins
        lambda: all(task_status(target.pid, tid).state == "S" for tid in thread_ids(target.pid)), "all threads wait"
    )
    before = _masks(target.pid)
    _deny(dynacut, target.pid)
    for _ in range(20):
        for where in ("signal", "blocked", "ppoll", "feature"):
            assert target.ask(f"{where} 3") == str(DENIED)
    assert target.ask("masks") == "handler 0 thread 0"
    dynacut.json("live", "--pid", target.pid, "--undo")
    assert target.ask("masks") == "handler 1 thread 1"
    for where in ("signal", "blocked", "ppoll", "feature"):
        assert target.ask(f"{where} 3") == str(feature(3))
    wait_until(lambda: _masks(target.pid) == before, "the masks as they were")


@pytest.mark.parametrize("call", ["ppoll", "pselect", "epoll_pwait", "sigsuspend", "sigwait"])
def test_a_mask_hidden_behind_a_temporary_one_is_repaired(program: Start, dynacut: Dynacut, call: str) -> None:
    """The thread blocks SIGTRAP, but not while it waits: SigBlk in /proc shows only the temporary mask."""
    target = program("temporary", call)
    assert target.ask("feature 3") == str(feature(3))
    assert target.ask("mask") == "1"
    _deny(dynacut, target.pid)
    assert target.ask("feature 3") == str(DENIED)
    assert target.ask("feature 4") == str(DENIED)
    dynacut.json("live", "--pid", target.pid, "--undo")
    assert target.ask("feature 3") == str(feature(3))
    assert target.ask("mask") == "1", "the undo must bring the thread's mask back"


@pytest.mark.parametrize("temporary", [(), ("sigsuspend",)])
def test_a_mask_that_comes_back_with_the_return_from_a_handler_is_repaired(
    program: Start, dynacut: Dynacut, temporary: tuple[str, ...]
) -> None:
    target = program("lingering", *temporary)
    _deny(dynacut, target.pid)
    assert target.ask("return") == "returned"
    assert target.ask("feature 3") == str(DENIED)
    assert target.ask("blocks") == "0"
    dynacut.json("live", "--pid", target.pid, "--undo")
    assert target.ask("blocks") == "1"
    assert target.ask("feature 3") == str(feature(3))


@pytest.mark.parametrize("temporary", [(), ("sigsuspend",)])
def test_a_mask_in_the_frame_of_a_handler_is_put_back(
    program: Start, dynacut: Dynacut, temporary: tuple[str, ...]
) -> None:
    target = program("lingering", *temporary)
    _deny(dynacut, target.pid)
    dynacut.json("live", "--pid", target.pid, "--undo")
    assert target.ask("return") == "returned"
    assert target.ask("blocks") == "1"
    assert target.ask("feature 3") == str(feature(3))


def test_threads_made_by_threads_that_block_sigtrap_survive_hits(
    program: Start, dynacut: Dynacut, rounds: Rounds
) -> None:
    """pthread_create saves the mask and puts it back, so a repair amid one is lost; new threads inherit it."""
    target = program("creators", 3)
    for _ in rounds(3):
        _deny(dynacut, target.pid)
        wait_for_more(target, "denied", 100)
        dynacut.json("live", "--pid", target.pid, "--undo")
        wait_for_more(target, "right", 100)
        wait_until(lambda: target.ask("masks") == "1", "the creating threads block SIGTRAP again")
    assert target.counters()["wrong"] == 0


def test_threads_that_come_and_go_bring_no_false_alarm(program: Start, dynacut: Dynacut, rounds: Rounds) -> None:
    """glibc blocks all signals for a moment while it makes a thread; that is nothing to warn of."""
    target = program("threads", 4)
    for _ in rounds(5):
        report = dynacut.json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "redirect=denied")
        assert report["warnings"] == []
        dynacut.json("live", "--pid", target.pid, "--undo")


def test_traps_of_the_program_itself_reach_its_own_handler(program: Start, dynacut: Dynacut) -> None:
    target = program("ownhandler")
    before = _masks(target.pid)
    _deny(dynacut, target.pid)
    assert target.ask("own") == "0"
    assert target.ask("int3") == "hits 1 code 128"  # SI_KERNEL
    assert target.ask("raise") == "hits 2 code -6"  # SI_TKILL
    assert target.ask("int") == "hits 3 code 128"
    assert target.ask("feature 3") == str(DENIED)
    assert target.ask("hits") == "hits 3 code 128"
    dynacut.json("live", "--pid", target.pid, "--undo")
    assert target.ask("own") == "1"
    assert target.ask("int3") == "hits 4 code 128"
    assert target.ask("feature 3") == str(feature(3))
    assert _masks(target.pid) == before


@pytest.mark.parametrize("kind", ["ignore", "count"])
def test_a_sigtrap_from_outside_shows_no_more_than_without_dynacut(program: Start, dynacut: Dynacut, kind: str) -> None:
    """Ignored, or handled with SA_RESTART, it does not end the read that the program waits in."""
    target = program("traps", kind)
    action = target.ask("action")
    _trap(target)
    counted = 1 if kind == "count" else 0
    assert target.ask("action") == action.removesuffix("0") + str(counted)
    _deny(dynacut, target.pid)
    _trap(target)
    assert target.is_running(), "a read that SA_RESTART should have restarted failed with EINTR: the program ended"
    assert target.ask("feature 3") == str(DENIED)
    _trap(target)
    assert target.ask("feature 3") == str(DENIED)
    dynacut.json("live", "--pid", target.pid, "--undo")
    assert target.ask("action") == action.removesuffix("0") + str(3 * counted)
    _trap(target)
    assert target.ask("feature 3") == str(feature(3))


def test_sigtrap_from_outside_still_ends_a_program_without_a_handler(program: Start, dynacut: Dynacut) -> None:
    target = program("traps", "default")
    _deny(dynacut, target.pid)
    assert target.ask("feature 3") == str(DENIED)
    os.kill(target.pid, signal.SIGTRAP)
    assert target.wait() == -signal.SIGTRAP


@pytest.mark.parametrize("kind", ["ignore", "count", "default"])
def test_an_undo_brings_sigtraps_action_back_to_the_last_bit(
    program: Start, dynacut: Dynacut, kind: str, rounds: Rounds
) -> None:
    target = program("traps", kind)
    before = target.ask("action")
    masks = _masks(target.pid)
    assert before.startswith(kind)
    for _ in rounds(2):
        _deny(dynacut, target.pid)
        assert target.ask("action").startswith("other")
        dynacut.json("live", "--pid", target.pid, "--undo")
        assert target.ask("action") == before
    assert _masks(target.pid) == masks


def test_after_a_program_has_taken_sigtrap_back_the_next_change_takes_it_over_again(
    program: Start, dynacut: Dynacut
) -> None:
    target = program("ownhandler")
    _deny(dynacut, target.pid)
    assert target.ask("again") == "ok"
    _deny(dynacut, target.pid)
    assert target.ask("feature 3") == str(DENIED)
    dynacut.json("live", "--pid", target.pid, "--undo")
    assert target.ask("own") == "1"


def test_a_thread_with_a_tiny_stack_survives_on_its_alternate_one(program: Start, dynacut: Dynacut) -> None:
    target = program("altstack")
    _deny(dynacut, target.pid)
    for where in ("deep", "feature", "main"):
        assert target.ask(f"{where} 3") == str(DENIED)
    dynacut.json("live", "--pid", target.pid, "--undo")
    for where in ("deep", "feature", "main"):
        assert target.ask(f"{where} 3") == str(feature(3))


def test_vector_and_floating_point_registers_survive(program: Start, dynacut: Dynacut, rounds: Rounds) -> None:
    """While threads with values in them are stopped, sent through stubs, and run into the int3."""
    target = program("crunch", 2)
    for _ in rounds(4):
        _deny(dynacut, target.pid)
        wait_for_more(target, "denied", 1000)
        dynacut.json("live", "--pid", target.pid, "--undo")
    counters = target.counters()
    assert counters["wrong"] == 0
    wait_until(lambda: target.counters()["rounds"] > counters["rounds"] + 10, "further rounds")
    assert target.counters()["wrong"] == 0


def test_an_undumpable_process_is_patched_by_root(program: Start, dynacut: Dynacut) -> None:
    target = program("nondumpable")
    _deny(dynacut, target.pid)
    assert target.ask("feature 3") == str(DENIED)
    dynacut.json("live", "--pid", target.pid, "--undo")
    assert target.ask("feature 3") == str(feature(3))
