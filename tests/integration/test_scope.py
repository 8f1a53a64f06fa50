"""--scope block: every byte of a block overwritten, but never under a thread that is inside or will return there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.plan import Plan, PlannedModule, PlannedRemoval
from dynacut.shared.plan_file import dumps
from dynacut.shared.proc import thread_ids
from dynacut.shared.target import PAGE_SIZE

from .conftest import Dynacut, Rounds
from .programs import DENIED, Program, feature
from .test_kill import bytes_at, run_json, start, symbol, wait_for_more
from .untouched import Snapshot

Start = Callable[..., Program]
_OUTER_SIZE = 16
"""Of outer() in inside.c, with a call amid it."""


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan that wipes the whole of outer()."""
    path = tmp_path / "outer.toml"
    path.write_text(
        f"""
        format = 1
        name = "no outer"
        [[feature]]
        name = "outer"
        on_hit = "return=-1"
        scope = "block"
        sites = [{{ at = "outer", size = {_OUTER_SIZE}, old = "53 48 89 fb e8" }}]
        """
    )
    return path


def test_every_byte_of_a_block_is_overwritten_and_comes_back(program: Start, dynacut: Dynacut, plan: Path) -> None:
    target = program("inside")
    before = Snapshot.of(target.pid)
    address = symbol(target, "outer")
    original = bytes_at(target, address, _OUTER_SIZE + 16)
    dynacut.json("live", "--pid", target.pid, "--plan", plan)
    assert bytes_at(target, address, _OUTER_SIZE + 16) == b"\xcc" * _OUTER_SIZE + original[_OUTER_SIZE:]
    assert target.ask("outer 3") == "-1"
    dynacut.json("live", "--pid", target.pid, "--enable", "outer")
    assert target.ask("outer 3") == "7"
    dynacut.json("live", "--pid", target.pid, "--disable", "outer")
    assert target.ask("outer 3") == "-1"
    dynacut.json("live", "--pid", target.pid, "--undo")
    assert Snapshot.of(target.pid) == before
    assert target.ask("outer 3") == "7"


def test_a_block_that_a_thread_will_return_into_is_not_overwritten(
    program: Start, dynacut: Dynacut, plan: Path
) -> None:
    target = program("inside")
    before = Snapshot.of(target.pid)
    assert target.ask("enter 3") == "ok"
    done = dynacut("live", "--pid", target.pid, "--plan", plan, "--timeout", "0.3")
    assert done.returncode == 1
    problem, advice = done.stderr.splitlines()
    assert "may return to" in problem
    assert "--timeout" in advice
    assert Snapshot.of(target.pid) == before
    assert dynacut.json("live", "--pid", target.pid)["features"] == []
    assert target.ask("leave") == "7"
    dynacut.json("live", "--pid", target.pid, "--plan", plan)
    assert target.ask("outer 3") == "-1"


def test_a_thread_in_a_signal_handler_on_another_stack_will_return_as_well(
    program: Start, dynacut: Dynacut, plan: Path
) -> None:
    """The way back lies on the thread's own stack, its stack pointer is in the alternate one."""
    target = program("inside")
    assert target.ask("enter 3") == "ok"
    assert target.ask("signal") == "ok"
    done = dynacut("live", "--pid", target.pid, "--plan", plan, "--timeout", "0.3")
    assert target.ask("leave") == "7"
    assert done.returncode == 1
    assert target.ask("outer 3") == "7"


def test_a_refused_block_leaves_earlier_features_in_force(program: Start, dynacut: Dynacut, plan: Path) -> None:
    target = program("inside")
    dynacut.json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "redirect=denied")
    assert target.ask("feature 3") == str(DENIED)
    assert target.ask("enter 3") == "ok"
    done = dynacut("live", "--pid", target.pid, "--plan", plan, "--timeout", "0.3")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (entry,) = dynacut.json("live", "--pid", target.pid)["features"]
    assert (entry["name"], entry["state"], entry["hits"]) == ("feature", "disabled", 1)
    assert target.ask("feature 3") == str(DENIED)
    assert target.ask("leave") == "7"
    dynacut.json("live", "--pid", target.pid, "--undo")
    assert target.ask("feature 3") == str(feature(3))


def test_a_change_that_is_refused_in_the_end_has_not_acted_meanwhile(program: Start, plan: Path) -> None:
    """While dynacut waits for a thread to leave the block, the feature must still be what it was."""
    target = program("inside")
    assert target.ask("enter 3") == "ok"
    run = start("live", "--pid", target.pid, "--plan", plan, "--timeout", "0.5")
    seen = set()
    while not run.has_ended():
        seen.add(target.ask("outer 3"))
    assert run.result()[0] == 1
    assert seen == {"7"}


def test_no_wait_of_another_thread_ends_because_a_block_was_refused(program: Start, plan: Path, rounds: Rounds) -> None:
    """All threads are stopped again and again until the time is over."""
    target = program("inside")
    assert target.ask("enter 3") == "ok"
    for _ in rounds(3):
        assert start("live", "--pid", target.pid, "--plan", plan, "--timeout", "0.1").result()[0] == 1
    assert target.ask("leave") == "7"


def test_blocks_under_load_are_overwritten_and_put_back_whole(program: Start, rounds: Rounds) -> None:
    target = program("callers", 2)
    address = symbol(target, "feature")
    original = bytes_at(target, address, 64)
    assert target.ask("start") == "ok"
    for _ in rounds(10):
        run_json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "redirect=denied", "--scope", "block")
        assert bytes_at(target, address, 2) == b"\xcc\xcc"
        wait_for_more(target, "denied", 100)
        denied = target.counters()["denied"]
        run_json("live", "--pid", target.pid, "--undo")
        assert bytes_at(target, address, 64) == original
        wait_for_more(target, "right", 100)
        assert denied <= target.counters()["denied"]
    counters = target.counters("stop")
    assert counters["wrong"] == 0
    assert len(thread_ids(target.pid)) == 3


def test_pages_come_back_after_an_upgrade_as_they_were(program: Start, dynacut: Dynacut, tmp_path: Path) -> None:
    """Another build has taken its name by then: pages are copied from what is still mapped of the old one."""
    target = program("spinner", 1)
    executable = Path(f"/proc/{target.pid}/exe").readlink()
    address = symbol(target, "sites")
    original = bytes_at(target, address, 4 * PAGE_SIZE)
    removal = PlannedRemoval(f"sites+{PAGE_SIZE:#x}", 2 * PAGE_SIZE, "pages")
    modules = {"spinner": PlannedModule(str(executable), ElfFile.open(executable).build_id)}
    pages = tmp_path / "pages.toml"
    pages.write_text(dumps(Plan("without pages", modules=modules, removed=(removal,))))
    report = dynacut.json("live", "--pid", target.pid, "--plan", pages)
    assert report["features"][0]["unmapped_pages"] == 2
    upgraded = tmp_path / "upgraded"
    upgraded.write_bytes(executable.read_bytes().replace(b"\x48\x8d\x7f\x01", b"\x48\x8d\x7f\x02"))
    upgraded.chmod(0o755)
    upgraded.rename(executable)
    report = dynacut.json("live", "--pid", target.pid, "--undo")
    assert report["features"] == []
    assert bytes_at(target, address, 4 * PAGE_SIZE) == original
    assert target.ask("sites 5") == "10005"
