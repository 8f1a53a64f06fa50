"""Nobody else's turn while a thread is stopped: it would wait with us."""

from __future__ import annotations

import gc
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def urgent() -> Iterator[None]:
    """Real-time priority, where it is permitted, for as long as a thread is stopped: it would wait with us if we were
    preempted. Not for longer: on that processor the target itself cannot run meanwhile."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        with suppress(PermissionError):
            os.sched_setscheduler(0, policy, parameters)


@contextmanager
def processors_awake() -> Iterator[None]:
    """Processors that have nothing to do wait awake, where root may say so.

    A processor falls asleep when the thread that it ran is stopped. To wake it takes longer than the stop itself: on
    hardware the exit latency of an idle state, on a virtual machine a turn of the host's scheduler. The request lasts
    as long as the file is open (Documentation/power/pm_qos_interface.rst).
    """
    file = -1
    with suppress(OSError):
        file = os.open("/dev/cpu_dma_latency", os.O_WRONLY | os.O_CLOEXEC)
        os.write(file, struct.pack("i", 0))
    try:
        yield
    finally:
        if file >= 0:
            os.close(file)


@contextmanager
def without_collections() -> Iterator[None]:
    """No garbage is looked for: neither while a thread is stopped, nor amid 84,000 objects of which none is garbage,
    where looking doubles the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
