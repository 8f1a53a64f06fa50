"""Changes that fail half-way, or would: nothing may stay without its handler, and the error says how things are."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from dynacut.handlers.table import FEATURE_CAPACITY, REPAIR_CAPACITY, Table
from dynacut.live.change import change
from dynacut.live.process import Process
from dynacut.live.ptrace import masks
from dynacut.shared import resolve
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.patch_set import PatchSet
from dynacut.shared.plan_file import loads
from dynacut.shared.region import find_region
from dynacut.shared.target import PAGE_SIZE, Target

from .conftest import Dynacut
from .programs import DENIED, CannotRunError, Program, compile_program, feature
from .untouched import Snapshot

Start = Callable[..., Program]
_PLAN = """
format = 1
name = "plugins"
[[feature]]
name = "whole"
on_hit = "return=-1"
scope = "{scope}"
sites = [{{ at = "plugin!feature" }}]
[[feature]]
name = "plugin"
on_hit = "return=-1"
scope = "entry"
sites = [{{ at = "libplugin.so!plug" }}]
"""


@pytest.mark.parametrize("scope", ["block", "entry"])
def test_a_plugin_that_is_unloaded_amid_the_writing(
    program: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    library = compile_program("plugin", tmp_path, "-DPLUGIN", "-shared", "-fPIC").rename(tmp_path / "libplugin.so")
    target = program("plugin", library)
    before = Snapshot.of(target.pid)
    assert target.ask("open") == "ok"
    assert target.ask("plug 3") == str(feature(3))
    plan = loads(_PLAN.format(scope=scope))
    places: list[int] = []

    def disable(process: Target, table: Table | None) -> PatchSet:
        patches = resolve.disable(plan, process, table)
        module = next(module for module in process.modules if "libplugin.so" in module.names)
        places.extend(edit.address for edit in patches.edits if module.base <= edit.address < module.end)
        return patches

    write = Process.write

    def unload_and_write(process: Process, address: int, data: bytes) -> None:
        if address in places and set(data) == {0xCC}:
            places.clear()
            assert target.ask("close") == "ok"
        write(process, address, data)

    monkeypatch.setattr(Process, "write", unload_and_write)
    with pytest.raises(DynacutError) as caught:
        change(target.pid, disable, tree=False, dry_run=False, timeout=10)
    assert places == []
    assert caught.value.status is ExitStatus.REFUSED
    assert Snapshot.of(target.pid) == before
    assert target.ask("feature 3") == str(feature(3))
    assert target.ask("open") == "ok"
    monkeypatch.undo()
    change(target.pid, disable, tree=False, dry_run=False, timeout=10)
    assert (target.ask("feature 3"), target.ask("plug 3")) == (str(DENIED), str(DENIED))


def test_a_process_that_ends_amid_the_change(program: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    target = program("counter")
    caught_signals = masks.caught_signals

    def end(pid: int) -> list[int]:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return caught_signals(pid)

    monkeypatch.setattr(masks, "caught_signals", end)
    plan = loads('format = 1\n[[feature]]\nname = "f"\non_hit = "return=-1"\nsites = [{ at = "feature" }]\n')
    with pytest.raises(DynacutError, match="ended during the change") as caught:
        change(target.pid, lambda *seen: resolve.disable(plan, *seen), tree=False, dry_run=False, timeout=5)
    assert caught.value.status is ExitStatus.CHECK_FAILED


def test_more_features_than_a_table_holds(program: Start, dynacut: Dynacut, tmp_path: Path) -> None:
    source = tmp_path / "many.c"
    names = [f"many{number}" for number in range(FEATURE_CAPACITY + 1)]
    source.write_text("".join(f"__attribute__((noipa, used)) int {name}(void) {{ return 1; }}\n" for name in names))
    target = program("counter", flags=("-Wno-missing-prototypes", str(source)))
    plan = tmp_path / "plan.toml"

    def write(chosen: list[str]) -> None:
        features = (f'[[feature]]\nname = "{name}"\nsites = [{{ at = "{name}" }}]\n' for name in chosen)
        plan.write_text("format = 1\n" + "".join(features))

    write(names[:-1])
    assert len(dynacut.json("live", "--pid", target.pid, "--plan", plan)["features"]) == FEATURE_CAPACITY
    write(names[-1:])
    maps = Path(f"/proc/{target.pid}/maps")
    before = maps.read_text()
    done = dynacut("live", "--pid", target.pid, "--plan", plan)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 2), done.stderr
    assert f"{FEATURE_CAPACITY + 1} features" in done.stderr
    assert maps.read_text() == before
    assert target.ask("feature 3") == str(feature(3))


def test_more_blocking_threads_than_a_table_holds(tmp_path: Path, dynacut: Dynacut) -> None:
    try:
        target = Program(compile_program("blockers", tmp_path), REPAIR_CAPACITY + 1, timeout=60)
    except CannotRunError:
        pytest.skip("this machine allows fewer threads")
    with target:
        before = Snapshot.of(target.pid)
        done = dynacut("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "return=-1")
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 2), done.stderr
        assert f"{REPAIR_CAPACITY + 1} threads" in done.stderr
        assert Snapshot.of(target.pid) == before
        assert target.ask("feature 3") == str(feature(3))


def test_memory_that_the_kernel_shows_as_one_with_the_handler_and_its_table(program: Start, dynacut: Dynacut) -> None:
    """The program maps it next to them, of the same kind."""
    target = program("neighbour")
    live = ("live", "--pid", target.pid)
    dynacut.json(*live, "--disable", "feature", "--on-hit", "return=-1", "--as", "f")
    with Process(target.pid) as process:
        found = find_region(process)
        assert found is not None
        before = len(process.mappings)
        assert target.ask(f"below {found.region.code}") == "ok"
        assert target.ask(f"above {found.region.table + found.region.table_size}") == "ok"
        process.refresh()
        assert len(process.mappings) == before
    assert [each["state"] for each in dynacut.json(*live)["features"]] == ["disabled"]
    dynacut.json(*live, "--enable", "f")
    assert target.ask("feature 3") == str(feature(3))
    dynacut.json(*live, "--disable", "f")
    assert target.ask("feature 3") == str(DENIED)
    dynacut.json(*live, "--undo")
    assert target.ask("feature 3") == str(feature(3))


def test_a_stack_without_limit_has_its_room(dynacut: Dynacut, tmp_path: Path) -> None:
    """In a static program nothing else lies below the stack, so that is where the largest gap is."""
    executable = compile_program("deep", tmp_path, "-static")
    with Program(Path("/usr/bin/prlimit"), "--stack=unlimited", str(executable)) as target:
        dynacut.json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "return=-1")
        assert target.ask("deep 300") == "300"
        assert target.ask("feature 3") == str(DENIED)


@pytest.mark.parametrize("spare", [100_000, 400_000])
def test_of_memory_that_is_not_to_be_had_whole_no_part_is_kept(program: Start, dynacut: Dynacut, spare: int) -> None:
    target = program("steps")
    maps = Path(f"/proc/{target.pid}/maps")
    before = maps.read_text()
    size = PAGE_SIZE * int(Path(f"/proc/{target.pid}/statm").read_text().split()[0]) + spare
    resource.prlimit(target.pid, resource.RLIMIT_AS, (size, size))
    done = dynacut("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "return=-1", "--timeout", "2")
    assert (done.returncode, "could not map" in done.stderr) == (1, True), done.stderr
    assert maps.read_text() == before
    assert target.ask("feature 3") == str(feature(3))
