"""A process behind a gdbserver, perhaps on another machine: as a target, looked at, and changed.

Its memory is read while gdb holds it, and so is what /proc says of it there, as files that gdbserver hands over.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dynacut.live.admission import check_not_stopped, check_not_traced
from dynacut.live.change import Outcome
from dynacut.live.gdb.patcher import apply_held
from dynacut.live.gdb.session import GdbError, GdbSession
from dynacut.live.gdb.target import GdbTarget
from dynacut.live.inspect import warnings_of
from dynacut.live.proc_target import ProcTarget
from dynacut.live.ptrace.stop_clock import StopClock
from dynacut.shared.apply import check_written
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.errors import DynacutError
from dynacut.shared.inspect import inspected
from dynacut.shared.patch_set import Resolve
from dynacut.shared.proc import parse_command_line, parse_mappings, parse_status
from dynacut.shared.region import find_region
from dynacut.shared.report import FeatureReport, Inspection
from dynacut.shared.running import check_kind, check_not_first
from dynacut.shared.target import PAGE_SIZE, SIGTRAP_BIT, Mapping

_X86_64 = "i386:x86-64"


@dataclass(frozen=True)
class Server:
    """A gdbserver and what is wanted of it. pid: the process to attach to, on its machine; None: the one it has.

    sysroot: where files of that machine are looked for here, before they are fetched.
    """

    address: str
    pid: int | None = None
    sysroot: Path = Path("/")


def look(server: Server, timeout: float) -> Outcome:
    """Looks at the process, which stands still meanwhile, and changes nothing.

    Raises:
        DynacutError: it cannot be reached, or not be looked at.
    """
    outcome = Outcome()
    with _held(server, timeout, outcome.clock) as target:
        outcome.processes.append(_inspect(target, thorough=True))
    return outcome


def change(server: Server, resolve: Resolve, *, dry_run: bool, timeout: float) -> Outcome:
    """Resolves and applies a change; the process stands still while that is done.

    Raises:
        DynacutError: refused, with the process untouched; or what apply_held() raises.
    """
    outcome = Outcome()
    with _held(server, timeout, outcome.clock) as target:
        if target.status().seccomp:
            raise DynacutError(
                f"{target.label} runs under seccomp, which may end it when it makes a system call for dynacut",
                "use `dynacut offline` on a checkpoint of it",
            )
        found = find_region(target)
        patches = resolve(target, found.table if found else None)
        outcome.edits = len(patches.edits)
        outcome.changed = patches.changes and not dry_run
        if not dry_run:
            target.extend_deadline(timeout)
            apply_held(target, patches)
            check_written(target, patches)
        outcome.processes.append(_inspect(target, thorough=False))
    return outcome


@contextmanager
def _held(server: Server, timeout: float, clock: StopClock) -> Iterator[GdbTarget]:
    deadline = time.monotonic() + timeout
    with GdbSession(timeout) as session, tempfile.TemporaryDirectory(prefix="dynacut-files-") as folder:
        pid = _connect(session, server)
        process = RemoteProcess(session, server, pid or server.pid or 0, Path(folder))
        target = GdbTarget(session, process, process.read_file, clock, deadline)
        if pid is None:
            process.admit()
            target.hold()
        else:
            target.adopt()
        try:
            architecture = session.console("show architecture")
            if _X86_64 not in architecture:
                raise DynacutError(
                    f"{target.label} is not a 64-bit x86-64 program", "dynacut patches 64-bit x86-64 programs only"
                )
            process.refresh()
            yield target
        finally:
            target.release()


def _connect(session: GdbSession, server: Server) -> int | None:
    """Connects to the gdbserver; returns the process that it holds already, if that is the one wanted.

    Raises:
        DynacutError: it cannot be reached, or has another process, or none.
    """
    try:
        session.command(f"-target-select extended-remote {server.address}")
        groups = session.command("-list-thread-groups")["groups"]
    except (GdbError, DynacutError) as error:
        raise DynacutError(
            f"the gdbserver at {server.address} cannot be reached: {error}",
            "start one there: gdbserver --attach HOST:PORT PID, or gdbserver --multi HOST:PORT",
        ) from None
    held = next((int(group["pid"]) for group in groups if "pid" in group), None)
    if held is None and server.pid is None:
        raise DynacutError(f"the gdbserver at {server.address} has no process", "say by --pid P which one is meant")
    if held is not None and server.pid not in (None, held):
        with suppress(GdbError):
            session.command("-target-disconnect")  # or gdb would let the process go at its end
        raise DynacutError(
            f"the gdbserver at {server.address} has process {held}, not {server.pid}",
            f"leave out --pid, or use a gdbserver that has {server.pid}",
        )
    return held


class RemoteProcess(ProcTarget):
    """A process behind a gdbserver. Mappings and modules are those of the last refresh(), which needs it to be held."""

    def __init__(self, session: GdbSession, server: Server, pid: int, folder: Path) -> None:
        """folder: where the files that are fetched are put."""
        super().__init__()
        self.pid = pid
        self._session = session
        self._server = server
        self._folder = folder
        self._files: dict[str, Path] = {}

    def admit(self) -> None:
        """Returns if gdbserver may attach to the process.

        Raises:
            DynacutError: there is none of that pid, or it is none to attach to.
        """
        check_not_first(self.pid)
        try:
            status = parse_status(self.read_file(f"/proc/{self.pid}/status"))
        except OSError:
            raise DynacutError(
                f"there is no process {self.pid} where the gdbserver at {self._server.address} runs",
                "`ps -e` there lists the processes; gdbserver must see their /proc",
            ) from None
        self.name = status.name
        check_kind(self.pid, self.label, status)
        check_not_stopped(self.pid, self.label, status)
        check_not_traced(self.label, status, " there")

    def refresh(self) -> None:
        """Reads mappings and modules again.

        Raises:
            DynacutError: gdbserver does not hand over what /proc says.
        """
        try:
            self.name = parse_status(self.read_file(f"/proc/{self.pid}/status")).name
            mappings = parse_mappings(self.read_file(f"/proc/{self.pid}/maps"))
            called = parse_command_line(self.read_file(f"/proc/{self.pid}/cmdline"))
            shown = re.search(r"^exe = '(.*)'$", self._session.console("info proc exe"), re.MULTILINE)
        except (OSError, GdbError) as error:
            raise DynacutError(
                f"{self.label}: what /proc says of it cannot be read: {error}",
                "gdbserver must run on Linux, where the process does, and see the same /proc",
            ) from None
        self.describe(shown.group(1) if shown else "", called, mappings, self._server.sysroot, self._file_of)

    def read_file(self, path: str) -> bytes:
        """A file of the process's machine; OSError if it cannot be read."""
        try:
            return self._session.fetch(path)
        except GdbError as error:
            raise OSError(str(error)) from None

    @property
    def label(self) -> str:
        """How to call the process in messages."""
        return f"process {self.pid}{f' ({self.name})' if self.name else ''} behind {self._server.address}"

    @property
    def has_shadow_stack(self) -> bool:
        """Whether the main thread uses a shadow stack."""
        try:
            return parse_status(self.read_file(f"/proc/{self.pid}/status")).shadow_stack
        except OSError:
            return False

    def private_pages(self, mapping: Mapping) -> Sequence[int]:
        """All pages of a mapping that has any of its own, none otherwise: smaps tells no more (proc_pid_smaps(5))."""
        try:
            smaps = self.read_file(f"/proc/{self.pid}/smaps").decode(errors="replace")
        except OSError:
            return ()
        start = smaps.find(f"{mapping.start:x}-{mapping.end:x} ")
        own = re.search(r"^Anonymous:\s+(\d+) kB$.*?^Swap:\s+(\d+) kB$", smaps[start:], re.MULTILINE | re.DOTALL)
        if start < 0 or own is None or own.groups() == ("0", "0"):
            return ()
        return range(mapping.start, mapping.end, PAGE_SIZE)

    def read(self, address: int, size: int) -> bytes:
        """Exactly size bytes at an address; DynacutError if they are not all mapped."""
        try:
            return self._session.read(address, size)
        except GdbError as error:
            raise DynacutError(f"{size} bytes at {address:#x} of {self.label} cannot be read: {error}") from None

    def _file_of(self, mapping: Mapping, path: str) -> Path:
        """A mapped file: the one of that path here if it is the same, else it is fetched; none if that fails."""
        if path not in self._files:
            here = self._server.sysroot / path.lstrip("/")
            self._files[path] = here if self._is_mapped(here, mapping) else self._fetched(mapping, path)
        return self._files[path]

    def _is_mapped(self, file: Path, mapping: Mapping) -> bool:
        """Whether a file is the one that is mapped: the first page is the same, and has the build-id in it."""
        try:
            build_id = ElfFile.open(file).build_id
            with file.open("rb") as opened:
                first = opened.read(min(PAGE_SIZE, mapping.size))
            return (
                build_id is not None
                and mapping.file_offset == 0
                and bytes.fromhex(build_id) in first
                and self.read(mapping.start, len(first)) == first
            )
        except (OSError, DynacutError):
            return False

    def _fetched(self, mapping: Mapping, path: str) -> Path:
        file = self._folder / f"{len(self._files)}-{os.path.basename(path)}"  # noqa: PTH119 - of another machine
        exact = f"/proc/{self.pid}/map_files/{mapping.start:x}-{mapping.end:x}"
        for name in (exact, f"/proc/{self.pid}/root{path}"):
            try:
                file.write_bytes(self.read_file(name))
                break
            except OSError:
                continue
        return file


def _inspect(target: GdbTarget, *, thorough: bool) -> Inspection:
    def warnings(features: Sequence[FeatureReport], in_force: bool) -> list[str]:
        caught = bool(target.status().caught & SIGTRAP_BIT)
        return warnings_of(features, in_force, caught, target.waiting_blockers)

    return inspected(target, target.process.pid, warnings, thorough=thorough)
