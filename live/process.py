"""A running process as a Target: its modules, mappings and memory."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType

from dynacut.live.proc_target import ProcTarget
from dynacut.shared.errors import DynacutError
from dynacut.shared.proc import command_line, executable, read_mappings, task_status
from dynacut.shared.running import gone
from dynacut.shared.target import PAGE_SIZE, Mapping


class Process(ProcTarget):
    """A running process, opened for reading and writing its memory.

    Mappings and modules are read once; refresh() reads them again. Use as a context manager or close() it.
    """

    def __init__(self, pid: int) -> None:
        """Opens /proc/PID/mem; see admission.admit() for the checks that come first.

        Raises:
            DynacutError: the process is gone, or its memory may not be opened.
        """
        self.pid = pid
        try:
            super().__init__(task_status(pid).name)
            self._memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError):
            raise gone(pid) from None
        except OSError as error:
            raise DynacutError(
                f"the memory of process {pid} cannot be opened: {error.strerror}",
                "run dynacut as root or as the process's own user",
            ) from None
        self.refresh()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the memory; the process stays as it is."""
        os.close(self._memory)

    def refresh(self) -> None:
        """Reads mappings and modules again."""
        try:
            mappings = read_mappings(self.pid)
            exe, called = executable(self.pid), command_line(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            raise gone(self.pid) from None
        root = Path(f"/proc/{self.pid}/root")
        self.describe(exe, called, mappings, root, lambda mapping, path: _readable_file(self.pid, mapping, path))

    @property
    def label(self) -> str:
        """How to call the process in messages."""
        return f"process {self.pid} ({self.name})"

    @cached_property
    def has_shadow_stack(self) -> bool:
        """Whether the main thread uses a shadow stack (x86_Thread_features in proc_pid_status(5)); set at its start."""
        return task_status(self.pid).shadow_stack

    def private_pages(self, mapping: Mapping) -> Sequence[int]:
        """The pages of a private file mapping that are copies of their own.

        Read from /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst): a present page (bit 63) that is not a
        page of the file (bit 61) is one, and so is a swapped one (bit 62).
        """
        count = mapping.size // PAGE_SIZE
        with Path(f"/proc/{self.pid}/pagemap").open("rb") as pagemap:
            pagemap.seek(mapping.start // PAGE_SIZE * 8)
            entries = array("Q", pagemap.read(8 * count))
        return [
            mapping.start + index * PAGE_SIZE
            for index, entry in enumerate(entries)
            if entry >> 61 and (entry >> 62 & 1 or entry >> 61 == 0b100)
        ]

    def read(self, address: int, size: int) -> bytes:
        """Exactly size bytes at an address.

        Raises:
            DynacutError: they are not all mapped, or the process is gone.
        """
        data = b""
        try:
            while len(data) < size:
                part = os.pread(self._memory, size - len(data), address + len(data))
                if not part:
                    raise gone(self.pid)  # the memory of a process that ended reads as end of file
                data += part
        except (OSError, OverflowError):
            raise DynacutError(
                f"{size} bytes at {address + len(data):#x} of {self.label} cannot be read",
                "check the address against the modules that `dynacut live --pid` shows",
            ) from None
        return data

    def write(self, address: int, data: bytes) -> None:
        """Writes bytes at an address, whatever the protection there; private mappings are copied (ptrace(2)).

        Raises:
            DynacutError: not all were written.
        """
        try:
            written = os.pwrite(self._memory, data, address)
        except (OSError, OverflowError) as error:
            raise DynacutError(
                f"{len(data)} bytes at {address:#x} of {self.label} cannot be written: {error}"
            ) from None
        if written != len(data):
            raise DynacutError(f"only {written} of {len(data)} bytes at {address:#x} of {self.label} were written")


def runs_another_program(process: Process) -> DynacutError:
    """The error for a process that has other memory by now than when it was opened."""
    return DynacutError(f"{process.label} runs another program by now", "look at what it runs, and try again")


def _readable_file(pid: int, mapping: Mapping, path: str) -> Path:
    """Where the mapped file can be read: the very inode where map_files is permitted, else by its path.

    By path only if that is still the inode that is mapped: after an upgrade it is another file.
    """
    exact = Path(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}")
    if os.access(exact, os.R_OK):
        return exact
    by_path = Path(f"/proc/{pid}/root{path}")
    try:
        if by_path.stat().st_ino == mapping.inode:
            return by_path
    except OSError:
        pass
    return exact
