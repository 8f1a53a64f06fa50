"""The entry point: parses the command line, runs one subcommand, turns errors into messages and exit statuses."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

from dynacut.cli.console import print_error
from dynacut.shared.errors import DynacutError, ExitStatus, shortened

COMMANDS = {
    "live": "live.command",
    "offline": "offline.command",
    "trace": "trace.command",
    "plan": "plan.command",
    "checkpoint": "checkpoint",
    "restore": "restore",
    "compare": "compare.command",
    "trim": "trim.command",
    "doctor": "doctor",
}
"""The commands and their modules in this package: HELP, prepare_parser(parser) and run(arguments) -> ExitStatus.

Only the module of the command that is given is imported; the others, for a list of all, take longer than it does.
"""

_TOUCHING_NOTHING = frozenset({"offline", "doctor"})
_INTERRUPTED = 130  # 128 + SIGINT, as shells say it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = command_parser(words[:1] if words and words[0] in COMMANDS else list(COMMANDS))
    parsed = parser.parse_args(words)
    if sys.stdout is None:  # closed by whoever started this
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), "w")
    try:
        status = int(parsed.run(parsed))
        sys.stdout.flush()
        return status
    except DynacutError as error:
        if parsed.verbose > 1:
            raise
        print_error(error)
        return int(error.status)
    except KeyboardInterrupt:
        if words[0] in _TOUCHING_NOTHING:
            print("dynacut: interrupted", file=sys.stderr)
            return _INTERRUPTED
        print("dynacut: interrupted; `dynacut live` on the same process shows what is in force", file=sys.stderr)
        return int(ExitStatus.UNKNOWN)
    except BrokenPipeError:
        sys.stderr.close()
        return int(ExitStatus.DONE)
    except Exception as error:  # a full disk below stdout, or a bug: what was done until then is not known
        if parsed.verbose > 1:
            raise
        print_error(_unexpected(error))
        _give_up_stdout()
        return int(ExitStatus.UNKNOWN)


def _unexpected(error: Exception) -> DynacutError:
    """What is said of an error that nobody has foreseen."""
    said = shortened(str(error)) or "no more is said"
    return DynacutError(
        f"the command ended by {type(error).__name__}: {said}",
        "`dynacut live` or `dynacut offline` shows what is in force; -vv shows where it ended, for a bug report",
        status=ExitStatus.UNKNOWN,
    )


def _give_up_stdout() -> None:
    """Keeps the interpreter from failing once more, at its end, to write what is left."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command_parser(names: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command line, with the subcommands of these names."""
    parser = argparse.ArgumentParser(
        prog="dynacut",
        description="Switch code features of a running Linux process off and on again, without a restart.",
        epilog="exit status: 0 done; 1 refused, target untouched; 2 wrong usage; 3 changed, but the check afterwards "
        "failed; 4 state of the target unknown",
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in names:
        command = import_module(f"dynacut.cli.{COMMANDS[name]}")
        subparser = commands.add_parser(
            name,
            help=command.HELP,
            description=command.DESCRIPTION,
            epilog=command.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.prepare_parser(subparser)
        subparser.set_defaults(run=command.run)
    return parser


class _ShowVersion(argparse.Action):
    """argparse's own version action wants the version at once, and looking it up takes 30 ms."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"dynacut {version('dynacut')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
