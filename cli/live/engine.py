"""Which engine changes a running process, and where that runs: the options, and the way to a gdbserver."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dynacut.cli.what import Request
from dynacut.shared.errors import DynacutError, ExitStatus, shortened

if TYPE_CHECKING:
    from dynacut.live.change import Outcome
    from dynacut.live.engine import Engine
    from dynacut.shared.sites import Ask


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    group = parser.add_argument_group("through gdb")
    group.add_argument("--engine", choices=["ptrace", "gdb"], help="what stops and writes (default: ptrace)")
    group.add_argument(
        "--remote", metavar="HOST:PORT", help="a process behind this gdbserver: the one it has, or --pid P there"
    )
    group.add_argument(
        "--sysroot", type=Path, metavar="DIR", help="with --remote: where copies of that machine's files are"
    )


def check_engine(arguments: argparse.Namespace) -> None:
    """Checks that the options fit together.

    Raises:
        DynacutError: they do not; status USAGE.
    """
    if arguments.remote is None:
        if arguments.engine == "gdb" and arguments.check_seccomp:
            raise _usage("--check-seccomp does not go with --engine gdb", "leave out one of them")
        if arguments.sysroot is not None:
            raise _usage("--sysroot belongs to --remote", "of this machine dynacut finds the files itself")
        if arguments.pid is None and arguments.process_name is None:
            raise _usage("no process is given", "add --pid P, --name N or --remote HOST:PORT")
        return
    host, _, port = arguments.remote.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16 or not _is_plain(host):
        raise _usage(f"{shortened(arguments.remote)!r} is no address of a gdbserver", "give it as HOST:PORT")
    given = {
        "--engine ptrace": arguments.engine == "ptrace",
        "--name": arguments.process_name is not None,
        "--tree": arguments.tree,
        "--learned": arguments.learned,
        "--standing": arguments.standing,
        "--fallback": arguments.fallback is not None,
        "--check-seccomp": arguments.check_seccomp,
    }
    for name, is_given in given.items():
        if is_given:
            raise _usage(f"{name} does not go with --remote", "a gdbserver is asked for one process, by its pid")


def engine_of(arguments: argparse.Namespace) -> Engine:
    """The engine that was chosen."""
    from dynacut.live.engine import Engine

    return Engine(arguments.engine or Engine.PTRACE)


@contextmanager
def further_names(arguments: argparse.Namespace) -> Iterator[Ask | None]:
    """With gdb, what it knows of names: asked for sites that are not found otherwise."""
    if arguments.remote is None and arguments.engine != "gdb":
        yield None
        return
    from dynacut.live.gdb.symbols import GdbSymbols

    with GdbSymbols(arguments.timeout) as ask:
        yield ask


def behind_gdbserver(arguments: argparse.Namespace, request: Request) -> Outcome:
    """Looks at, or changes, the process behind a gdbserver.

    Raises:
        DynacutError: it cannot be reached; or as change() does.
    """
    from dynacut.live.gdb.gdbserver import Server, change, look

    server = Server(arguments.remote, arguments.pid, arguments.sysroot or Path("/"))
    if not request.changes:
        return look(server, arguments.timeout)
    return change(server, request.resolve, dry_run=arguments.dry_run, timeout=arguments.timeout)


def _is_plain(host: str) -> bool:
    """A name or an address, IPv6 in brackets; nothing that gdb could take for a command of its own."""
    return not host.startswith("-") and all(char.isalnum() or char in "-._:[]%" for char in host)


def _usage(problem: str, advice: str) -> DynacutError:
    return DynacutError(problem, advice, status=ExitStatus.USAGE)
