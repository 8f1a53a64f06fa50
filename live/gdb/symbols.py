"""Names that gdb knows and dynacut does not: C++'s, FILE:FUNCTION, and those of files that a debuginfod serves.

A gdb of its own is asked, which is attached to nothing: it has the modules' files at the addresses where the process
has them. What it answers is a proposal; the site is verified as one that dynacut has found itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from dynacut.live.gdb.session import GdbError, GdbSession, quoted
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.symbols import DEBUG_ROOT
from dynacut.shared.errors import DynacutError
from dynacut.shared.target import Module

_PLACE = re.compile(r"(?:starts at|No line number information available for) address (0x[0-9a-f]+)")
# A plan may be somebody else's: nothing of gdb's expressions may come in, which can run programs ($_shell).
_NAME = re.compile(r"[\w./~][\w.~:<>(),&*\[\] /=^|%-]*")


class GdbSymbols:
    """Asks gdb for the places of a function or a line. Use as a context manager; gdb is started when it is needed.

    timeout: seconds for a target's files to be read, and fetched from the debuginfod of DEBUGINFOD_URLS.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._session: GdbSession | None = None
        self._loaded: list[tuple[str, int]] = []

    def __enter__(self) -> GdbSymbols:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def __call__(self, name: str, modules: Sequence[Module]) -> list[int]:
        """The addresses of a function (C++'s with all its namespaces) or of FILE:LINE in modules; ascending.

        Raises:
            DynacutError: there is no gdb, or it does not answer in time.
        """
        if not _NAME.fullmatch(name):
            return []
        session = self._with(modules)
        try:
            said = session.console(f"info line -qualified {name}")
        except GdbError:
            return []  # no such name
        return sorted({int(address, 16) for address in _PLACE.findall(said)})

    def _with(self, modules: Sequence[Module]) -> GdbSession:
        """A gdb that has the symbols of these modules, and of no others."""
        wanted = [(str(module.file), module.base) for module in modules]
        if self._session is not None and self._loaded == wanted:
            return self._session
        self.__exit__(None, None, None)
        self._session, self._loaded = GdbSession(self._timeout, os.environ.get("DEBUGINFOD_URLS", "")), wanted
        folders = dict.fromkeys(str(root / DEBUG_ROOT) for root in (*(module.root for module in modules), Path("/")))
        self._session.command(f"-gdb-set debug-file-directory {':'.join(folders)}")
        for module in modules:
            try:
                shift = module.base - ElfFile.open(module.file).link_base
                self._session.console(f"add-symbol-file {quoted(str(module.file))} -o {shift:#x}")
            except (DynacutError, GdbError):
                continue  # not to be read, as the vDSO's
        return self._session
