"""What the /proc files of a process tell of it as a target: the same here and behind a gdbserver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dynacut.shared.modules import called_name, modules_of
from dynacut.shared.target import Mapping, Module


class ProcTarget:
    """Executable, mappings and modules of a process, as they were when it was last looked at."""

    def __init__(self, name: str = "") -> None:
        """name: the process's, as /proc/PID/comm has it."""
        self.name = name
        self._exe = ""
        self._mappings: Sequence[Mapping] = ()
        self._modules: Sequence[Module] = ()

    def describe(
        self,
        exe: str,
        command_line: Sequence[str],
        mappings: Sequence[Mapping],
        root: Path,
        file_of: Callable[[Mapping, str], Path],
    ) -> None:
        """Takes in what /proc says: the link exe, cmdline and maps. root, file_of: as modules_of() takes them."""
        self._exe = exe.removesuffix(" (deleted)")
        self._mappings = mappings
        aliases = [alias for alias in (called_name(command_line), self.name) if alias]
        self._modules = modules_of(mappings, self._exe, aliases, root, file_of)

    @property
    def exe(self) -> str:
        """The path of the executable, as the process sees it."""
        return self._exe

    @property
    def mappings(self) -> Sequence[Mapping]:
        """Every VMA, ascending by address."""
        return self._mappings

    @property
    def modules(self) -> Sequence[Module]:
        """Every file mapped with code, the executable first."""
        return self._modules
