"""A gdbserver of Debian's package on loopback, ended by pid; and the dynacut command going through gdb."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Self

from dynacut.live.tree import by_name

from .conftest import Dynacut
from .servers import ServerMissing, free_port

_END_TIMEOUT = 5.0


class GdbServer:
    """A gdbserver, listening. arguments: besides its address, such as --multi; program: what it starts."""

    def __init__(
        self,
        *arguments: str | int,
        program: Sequence[str | Path] = (),
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
    ) -> None:
        path = shutil.which("gdbserver")
        if path is None:
            raise ServerMissing("gdbserver is not installed (Debian: apt-get install gdbserver)")
        self.address = f"127.0.0.1:{free_port()}"
        words = [*map(str, arguments[:1]), self.address, *map(str, arguments[1:]), *map(str, program)]
        self.process = subprocess.Popen(
            [path, *words], stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, start_new_session=True, bufsize=0
        )

    def __enter__(self) -> Self:
        assert self.process.stderr is not None
        said = b""
        while b"Listening on port" not in said:
            part = self.process.stderr.read(4096)
            assert part, f"gdbserver ended: {said.decode()}"
            said += part
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(_END_TIMEOUT)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


class GdbDynacut(Dynacut):
    """dynacut, with --engine gdb, or through a gdbserver, in each `live` command."""

    def __init__(self, server: GdbServer | None = None) -> None:
        self._server = server
        self.options = ("--engine", "gdb") if server is None else ("--remote", server.address)

    def words(self, *arguments: str | int | Path) -> list[str | int | Path]:
        """The command line; a gdbserver is asked for a pid instead of a name."""
        words = list(arguments)
        if self._server is not None and "--name" in words:
            index = words.index("--name")
            words[index : index + 2] = ["--pid", by_name(str(words[index + 1]))]
        return super().words(*words)
