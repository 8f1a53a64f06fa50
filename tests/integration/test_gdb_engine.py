"""The gdb engine: the tests of the ptrace engine once more, through gdb here and through a gdbserver."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import test_actions, test_live_redis, test_masks, test_scope, test_threads, test_pages, test_handler_library, test_live_http
from .conftest import Dynacut
from .gdbserver import GdbDynacut, GdbServer

@pytest.fixture(params=["gdb", "gdbserver"])
def dynacut(request: pytest.FixtureRequest) -> Iterator[Dynacut]:
    """Every command of a test goes through gdb."""
    if request.param == "gdb":
        yield GdbDynacut()
        return
    with GdbServer("--multi") as server:
        yield GdbDynacut(server)
for m in (test_actions, test_live_redis, test_masks, test_scope, test_threads, test_pages, test_handler_library, test_live_http):
    for n in dir(m):
        if n.startswith("test_") and "thousand" not in n: globals()[n]=getattr(m,n)
        elif hasattr(getattr(m,n),"_pytestfixturefunction") and n!="dynacut": globals()[n]=getattr(m,n)
