"""The gdb engine: tests of the ptrace engine once more, by gdb on this machine and by way of a gdbserver."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dynacut.live.process import Process
from dynacut.shared.region import find_region

from .conftest import Dynacut
from .gdbserver import GdbDynacut, GdbServer
from .servers import Redis
from .test_live_redis import (  # noqa: F401 - collected here as well, where `dynacut` goes by gdb
    SET_TO_ERROR,
    test_return_skips_a_function_whose_caller_copes,
    test_set_is_switched_off_and_on_again_under_load,
    test_terminate_ends_the_server_upon_set,
)
from .test_offline import text_of


@pytest.fixture(params=["gdb", "gdbserver"])
def dynacut(request: pytest.FixtureRequest) -> Iterator[Dynacut]:
    """Every `live` command of a test goes by gdb."""
    if request.param == "gdb":
        yield GdbDynacut()
        return
    with GdbServer("--multi") as server:
        yield GdbDynacut(server)


@pytest.mark.parametrize("scope", ["entry", "block"])
def test_both_engines_leave_the_same_bytes(dynacut: Dynacut, scope: str) -> None:
    """On one process: patched by gdb, taken back by gdb, and patched by ptrace."""
    with Redis() as redis:
        target = ("live", "--pid", redis.pid)
        untouched = bytes_of(redis.pid)
        dynacut.json(*target, *SET_TO_ERROR, "--scope", scope)
        by_gdb = bytes_of(redis.pid)
        dynacut.json(*target, "--undo")
        assert bytes_of(redis.pid)[0] == untouched[0]
        Dynacut().json(*target, *SET_TO_ERROR, "--scope", scope)
        assert bytes_of(redis.pid) == by_gdb


def bytes_of(pid: int) -> tuple[dict[int, bytes], object]:
    """The code of a process, and what its table says of features, sites, and masks."""
    with Process(pid) as process:
        found = find_region(process)
        table = found.table if found else None
        masks = sorted((repair.kind, repair.id, repair.mask) for repair in table.repairs) if table else []
        return text_of(process), table and (table.features, table.sites, masks, table.previous, table.observed)


def test_a_plan_that_does_not_fit_is_refused(dynacut: Dynacut) -> None:
    with Redis() as redis:
        done = dynacut("live", "--pid", redis.pid, "--disable", "setCommand+2", "--on-hit", "terminate")
        assert done.returncode == 1
        assert "not the first byte" in done.stderr
        assert redis.command("SET", "key", "x") == "OK"
