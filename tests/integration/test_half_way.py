"""Changes that fail half-way, as the target changes itself just then: nothing of them may stay without its handler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dynacut.handlers.table import Table
from dynacut.live.change import change
from dynacut.live.process import Process
from dynacut.shared import resolve
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.patch_set import PatchSet
from dynacut.shared.plan import loads
from dynacut.shared.target import Target

from .programs import DENIED, Program, compile_program, feature
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
