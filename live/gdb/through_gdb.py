"""A process as it is seen through gdb: described by its machine's /proc, its memory read and written by gdb."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from dynacut.live.gdb.session import GdbError, GdbSession
from dynacut.shared.errors import DynacutError
from dynacut.shared.proc import TaskStatus, parse_start_time, parse_status
from dynacut.shared.target import Mapping, Module, Target

ReadFile = Callable[[str], bytes]
"""The contents of a file of the process's machine; OSError if it cannot be read."""


class Described(Target, Protocol):
    """A process as it can be described without being held."""

    @property
    def pid(self) -> int:
        """Its id, on its machine."""

    def refresh(self) -> None:
        """Reads mappings and modules again."""


class ThroughGdb:
    """A target whose memory is gdb's to read and write. read_file: None for a process of this machine."""

    def __init__(self, session: GdbSession, process: Described, read_file: ReadFile | None) -> None:
        self.session = session
        self.process = process
        self.is_here = read_file is None
        self._read_file = read_file or (lambda path: Path(path).read_bytes())

    @property
    def label(self) -> str:
        """The process's."""
        return self.process.label

    @property
    def exe(self) -> str:
        """The process's."""
        return self.process.exe

    @property
    def modules(self) -> Sequence[Module]:
        """The process's."""
        return self.process.modules

    @property
    def mappings(self) -> Sequence[Mapping]:
        """The process's."""
        return self.process.mappings

    @property
    def has_shadow_stack(self) -> bool:
        """The process's."""
        return self.process.has_shadow_stack

    def private_pages(self, mapping: Mapping) -> Sequence[int]:
        """The process's."""
        return self.process.private_pages(mapping)

    def read(self, address: int, size: int) -> bytes:
        """Exactly size bytes at an address, through gdb; DynacutError if they are not all mapped."""
        try:
            return self.session.read(address, size)
        except GdbError as error:
            raise DynacutError(f"{size} bytes at {address:#x} of {self.label} cannot be read: {error}") from None

    def write(self, address: int, data: bytes) -> None:
        """Writes bytes at an address, through gdb, whatever the protection there; DynacutError if that fails."""
        try:
            self.session.write(address, data)
        except GdbError as error:
            raise DynacutError(
                f"{len(data)} bytes at {address:#x} of {self.label} cannot be written: {error}"
            ) from None

    def status(self, tid: int | None = None) -> TaskStatus:
        """The status of the process, or of one of its threads; DynacutError if it is not to be had."""
        pid = self.process.pid
        folder = f"/proc/{pid}" if tid is None else f"/proc/{pid}/task/{tid}"
        return parse_status(self._file(f"{folder}/status"))

    def start_time(self, tid: int) -> int:
        """When a thread started, in clock ticks since boot."""
        return parse_start_time(self._file(f"/proc/{self.process.pid}/task/{tid}/stat"))

    def _file(self, path: str) -> bytes:
        try:
            return self._read_file(path)
        except OSError as error:
            raise DynacutError(f"{path} of {self.label} cannot be read: {error.strerror or error}") from None
