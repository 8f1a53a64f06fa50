"""Restartable sequences (rseq): no int3 is put into one, and who runs into one all the same goes on as rseq(2) says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dynacut.handlers.table import Action, TableSite
from dynacut.live.process import Process
from dynacut.live.ptrace.patcher import Patcher
from dynacut.live.tracing.trace import Trace
from dynacut.shared.patch_set import ByteEdit, HandlerChange, PatchSet

from .conftest import Dynacut
from .programs import CannotRunError, Program, compile_program, feature
from .test_kill import bytes_at, symbol
from .untouched import Snapshot

_DONE, _ABORTED = "8", "-7"


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Program]:
    try:
        started = Program(compile_program("restartable", tmp_path))
    except CannotRunError:
        pytest.skip("this machine's C library registers no rseq area")
    with started:
        assert started.ask("sequence 3") == _DONE
        yield started


@pytest.mark.parametrize("on_hit", ["learn", "terminate", "skip=4"])
def test_a_site_in_a_sequence_is_refused(target: Program, dynacut: Dynacut, on_hit: str) -> None:
    before = Snapshot.of(target.pid)
    done = dynacut("live", "--pid", target.pid, "--disable", "sequence+19", "--on-hit", on_hit, "--as", "x")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 2), done.stderr
    assert "restartable sequence" in done.stderr
    assert Snapshot.of(target.pid) == before
    dynacut.json("live", "--pid", target.pid, "--disable", "sequence", "--on-hit", "return=1")
    assert target.ask("sequence 3") == "1"


def test_blocks_in_a_sequence_are_not_traced(target: Program) -> None:
    with Process(target.pid) as process:
        trace = Trace(process, process.modules[:1])
        trace.arm()
        try:
            assert bytes_at(target, symbol(target, "feature"), 1) == b"\xcc"
            assert target.ask("sequence 3") == _DONE
            assert target.ask("feature 3") == str(feature(3))
        finally:
            trace.disarm()
    assert target.ask("sequence 3") == _DONE


def test_a_hit_in_a_sequence_aborts_it(target: Program) -> None:
    """What no plan can ask for: the handler must leave rip where the kernel has put it."""
    address = symbol(target, "in_sequence")
    old = bytes_at(target, address, 1)
    site = TableSite(address, "x", Action.SKIP, 4, 1, old, b"\xcc")
    with Process(target.pid) as process:
        patches = PatchSet((ByteEdit(address, old, b"\xcc"),), HandlerChange.INSTALL, ("x",), (site,))
        patcher = Patcher(process)
        patcher.apply(patches)
        assert target.ask("sequence 3") == _ABORTED
        patcher.apply(patches.inverse())
    assert target.ask("sequence 3") == _DONE
