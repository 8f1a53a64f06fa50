"""What becomes of a program that a trace has started, when the trace has ended."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress

from dynacut.cli.console import warn
from dynacut.cli.steps import Steps
from dynacut.shared.proc import is_alive

_PATIENCE = 10.0
"""Seconds that a program has to end by SIGTERM."""
_POLL = 0.02


def end(pids: Sequence[int]) -> list[int]:
    """Asks processes to end, by SIGTERM; returns those that still run after some seconds, and warns of them."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _PATIENCE
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(_POLL)
    if left:
        warn(f"SIGTERM has not ended all in {_PATIENCE:.0f} s; what is left ends by: kill -KILL {_listed(left)}")
    return left


def tell(pids: Sequence[int], name: str) -> None:
    """Says that the program runs on, and how to end it."""
    Steps().say(f"{name} runs on, no longer traced; to end it: kill {_listed(pids)}")


def _listed(pids: Sequence[int]) -> str:
    return " ".join(map(str, pids))
