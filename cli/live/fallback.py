"""The options of `dynacut live` for a process that cannot simply be changed while it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from dynacut.shared.errors import DynacutError, ExitStatus


def add_fallback_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    group = parser.add_argument_group("where the process cannot simply be changed while it runs")
    group.add_argument(
        "--fallback",
        choices=["checkpoint"],
        help="dump it with its descendants, change the image and restore it (CRIU), with the same pids",
    )
    group.add_argument(
        "--check-seccomp",
        action="store_true",
        help="change it although it runs under seccomp filters, if these allow every system call that the change needs",
    )
    group.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="where the image lies meanwhile, as secret as the process's memory (default: TMPDIR, or /var/tmp)",
    )


def check_usage(arguments: argparse.Namespace, *, changes: bool) -> None:
    """Raises:
    DynacutError: the options contradict each other.
    """
    if arguments.fallback is not None and not changes:
        raise DynacutError(
            "--fallback is a way to change", "add --plan, --disable, --enable or --undo", status=ExitStatus.USAGE
        )
    if arguments.check_seccomp and not changes:
        raise DynacutError(
            "--check-seccomp is for a change", "add --plan, --disable, --enable or --undo", status=ExitStatus.USAGE
        )
    if arguments.images is not None and arguments.fallback is None:
        raise DynacutError("--images is where a checkpoint lies", "add --fallback checkpoint", status=ExitStatus.USAGE)
