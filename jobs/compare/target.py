"""The server that `dynacut compare` works on: started and ended where it is ours; its memory, its text, its table."""

from __future__ import annotations

import hashlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacut.jobs.compare.probes import Probe, answers
from dynacut.shared.errors import DynacutError
from dynacut.shared.proc import is_alive, tree_of
from dynacut.shared.target import SIGTRAP, Module

if TYPE_CHECKING:
    from dynacut.live.process import Process
    from dynacut.shared.region import FoundRegion

_START_TIMEOUT = 60.0
_END_TIMEOUT = 5.0
_POLL_SECONDS = 0.02


def living_tree(pid: int) -> list[int]:
    """The process and its descendants that live, parents first.

    Raises:
        DynacutError: there is no such process.
    """
    from dynacut.live.tree import descendants

    return [each for each in descendants(pid) if is_alive(each)]


@contextmanager
def instance(
    command: Sequence[str], find_probe: Callable[[Sequence[int]], Probe | None]
) -> Iterator[tuple[int, Probe]]:
    """Starts a program in a session of its own, gives its pid when the probe is answered, ends it at the end.

    Standard input and output are /dev/null. This process must be a child subreaper, so that the program, which may be
    checkpointed and restored meanwhile, is its child all the time.

    Raises:
        DynacutError: it cannot be executed, ends at once, or answers no probe.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DynacutError(f"{command[0]} cannot be executed: {reason}", "give the path of a program") from None
    try:
        yield process.pid, _ready(process, command, find_probe)
    finally:
        _end(process.pid)
        process.wait()  # reaped already: what is waited for may be a restored process


def _ready(
    process: subprocess.Popen[bytes], command: Sequence[str], find_probe: Callable[[Sequence[int]], Probe | None]
) -> Probe:
    shown = shlex.join(command)
    deadline = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DynacutError(
                f"{shown} ended at once", "start it by hand to see why; a daemon must stay in the foreground"
            )
        probe = find_probe(living_tree(process.pid))
        if probe is not None and answers(probe):
            return probe
        time.sleep(_POLL_SECONDS)
    raise DynacutError(f"{shown} answers no request", "give a probe, such as --probe-tcp PORT")


def _end(pid: int) -> None:
    from dynacut.offline import processes

    tree = tree_of(pid)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    processes.wait_until_gone({pid: processes.start_time(pid)}, _END_TIMEOUT)
    left = processes.end(tree)
    if left:
        raise DynacutError(f"{processes.described(left[0])} was started for the comparison and cannot be ended")


@dataclass(frozen=True)
class Memory:
    """Memory of all processes, in bytes (proc_pid_smaps(5)).

    anonymous: resident, of no file. pss: resident, shared pages in parts. virtual: mapped. copied: of the code of
    programs and libraries, and of dynacut's region, what has become the process's own.
    """

    anonymous: int
    pss: int
    virtual: int
    copied: int

    def since(self, before: Memory) -> dict[str, int]:
        """What has been added."""
        return {name: value - getattr(before, name) for name, value in vars(self).items()}


def memory_of(pids: Sequence[int]) -> Memory:
    """Looks at the memory of processes.

    Raises:
        DynacutError: one of them is gone, or may not be looked at.
    """
    from dynacut.live.process import Process
    from dynacut.shared.region import find_region

    anonymous = pss = virtual = copied = 0
    for pid in pids:
        with Process(pid) as process:
            code = {mapping.start for module in process.modules for mapping in module.executable_mappings}
            if (found := find_region(process)) is not None:
                code |= {found.region.code, found.region.table}
        for start, fields in _mappings_of(pid):
            anonymous += fields["Anonymous"]
            pss += fields["Pss"]
            virtual += fields["Size"]
            copied += fields["Anonymous"] if start in code else 0
    return Memory(anonymous, pss, virtual, copied)


def _mappings_of(pid: int) -> Iterator[tuple[int, dict[str, int]]]:
    """The start of each mapping and its fields in kB, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/smaps").read_bytes().split(b"\n")
    except OSError as error:
        raise DynacutError(
            f"the memory of process {pid} cannot be looked at: {error.strerror}", "see whether it still runs"
        ) from None
    start, fields = 0, dict[str, int]()
    for line in filter(None, lines):
        words = line.split()
        if not words[0].endswith(b":"):
            if fields:
                yield start, fields
            start, fields = int(words[0].partition(b"-")[0], 16), {}
        elif words[-1] == b"kB":
            fields[words[0].rstrip(b":").decode()] = int(words[1]) * 1024
    if fields:
        yield start, fields


@dataclass(frozen=True)
class State:
    """What is in force in processes, in terms that are equal for processes at other addresses.

    text: for each process, the SHA-256 of all code of each file by its path. tables: what each table says.
    """

    text: list[dict[str, str]]
    tables: list[dict[str, Any]]

    @property
    def features(self) -> list[str]:
        """The names of all features in force or known."""
        return list(dict.fromkeys(str(name) for table in self.tables for name in table["features"]))


def state_of(pids: Sequence[int]) -> State:
    """Reads the code and the tables of processes.

    Raises:
        DynacutError: one of them is gone, or its table is damaged.
    """
    from dynacut.live.process import Process
    from dynacut.shared.region import find_region

    text, tables = [], []
    for pid in pids:
        with Process(pid) as process:
            text.append({module.path: _digest(process, module) for module in process.modules})
            tables.append(_said(process, find_region(process)))
    return State(text, tables)


def _digest(process: Process, module: Module) -> str:
    digest = hashlib.sha256()
    for mapping in module.executable_mappings:
        digest.update(f"{mapping.start - module.base:#x} {mapping.size:#x}\n".encode())
        digest.update(process.read(mapping.start, mapping.size))
    return digest.hexdigest()


def _said(process: Process, found: FoundRegion | None) -> dict[str, Any]:
    """What a table says, without addresses, hits and ids of threads."""
    from dynacut.shared.code import CodeOf
    from dynacut.shared.proc import task_status
    from dynacut.shared.report import features_of

    table = found.table if found is not None else None
    features = features_of(process, table, CodeOf(process))
    old = {site.address: site.old.hex() for site in table.sites} if table is not None else {}
    return {
        "features": {
            feature.name: [[site.at, old[site.address], site.on_hit, site.patched] for site in feature.sites]
            for feature in features
        },
        "masks": sorted(
            [repair.kind.name, repair.id if repair.kind.name == "SIGNAL_MASK" else 0, f"{repair.mask:#x}"]
            for repair in (table.repairs if table is not None else ())
        ),
        "catches_sigtrap": bool(task_status(process.pid).caught >> (SIGTRAP - 1) & 1),
    }
