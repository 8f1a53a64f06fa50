"""The ptrace call of our own beside python-ptrace's binding of the same."""

from __future__ import annotations

import errno
import os
from importlib import import_module
from typing import Any

import pytest

from dynacut.live.ptrace import ptrace_call

NO_PROCESS = 1 << 22  # behind the highest pid that Linux gives (PID_MAX_LIMIT)


def test_the_registers_are_those_of_python_ptrace() -> None:
    fields: Any = import_module("ptrace.binding.linux_struct").user_regs_struct._fields_
    assert [name for name, _ in fields] == list(ptrace_call.REGISTER_NAMES)


@pytest.mark.parametrize("name", ["PTRACE_GETREGS", "PTRACE_SETREGS", "PTRACE_DETACH"])
def test_the_requests_are_those_of_python_ptrace(name: str) -> None:
    assert getattr(ptrace_call, name) == getattr(import_module("ptrace.binding.func"), name)


def test_a_failure_says_what_the_kernel_said() -> None:
    with pytest.raises(ProcessLookupError) as failed:
        ptrace_call.call(ptrace_call.PTRACE_INTERRUPT, NO_PROCESS)
    assert (failed.value.errno, failed.value.strerror) == (errno.ESRCH, os.strerror(errno.ESRCH))
    with pytest.raises(OSError, match="not permitted"):
        ptrace_call.call(ptrace_call.PTRACE_SEIZE, os.getpid())
