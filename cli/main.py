"""The entry point: parses the command line, runs one subcommand, turns errors into messages and exit statuses."""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from dynacut.cli.console import print_error, print_error_json
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
"""The commands and their modules in this package: HELP, USAGE, DESCRIPTION, EPILOG, prepare_parser() and run().

Only the module of the command that is given is imported; the others, for a list of all, take longer than it does.
"""

_TOUCHING_NOTHING = frozenset({"offline", "doctor"})
_INTERRUPTED = 130  # 128 + SIGINT, as shells say it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if sys.stdout is None:  # closed by whoever started this
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), "w")
    _print_anything()
    own = words[: words.index("--")] if "--" in words else words
    as_json, traces_back = "--json" in own, False
    try:
        parser = command_parser(words[:1] if words and words[0] in COMMANDS else list(COMMANDS))
        if not words:
            parser.print_help(sys.stderr)
            return int(ExitStatus.USAGE)
        parsed = parser.parse_args(words)
        as_json, traces_back = parsed.json, parsed.verbose > 1
        status = int(parsed.run(parsed))
        sys.stdout.flush()
        return status
    except DynacutError as error:
        return _failed(error, as_json=as_json, traces_back=traces_back)
    except KeyboardInterrupt:
        return _interrupted(words[0], as_json=as_json)
    except BrokenPipeError:
        sys.stderr.close()
        return int(ExitStatus.DONE)
    except Exception as error:  # a full disk below stdout, or a bug: what was done until then is not known
        status = _failed(_unexpected(error), as_json=as_json, traces_back=traces_back)
        _give_up_stdout()
        return status


def _print_anything() -> None:
    """Has characters that the terminal's encoding lacks (→, µ) printed as ``?``, instead of ending amid a report."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _failed(error: DynacutError, *, as_json: bool, traces_back: bool) -> int:
    """Tells of an error, while it is being handled; returns the exit status."""
    if traces_back:
        traceback.print_exc()
    print_error(error)
    if as_json:
        print_error_json(error.problem, error.advice, error.details, error.status)
    return int(error.status)


def _interrupted(command: str, *, as_json: bool) -> int:
    """Tells that Ctrl-C has ended the command; returns the exit status."""
    if command in _TOUCHING_NOTHING:
        status, advice = _INTERRUPTED, ""
    else:
        status, advice = int(ExitStatus.UNKNOWN), "`dynacut live` on the same process shows what is in force"
    print("; ".join(filter(None, ("dynacut: interrupted", advice))), file=sys.stderr)
    if as_json:
        print_error_json("interrupted", advice, (), status)
    return status


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


class _Parser(argparse.ArgumentParser):
    """Wrong usage is told as every other error is."""

    subcommand = ""
    """The only one there is, if so: its help tells more."""

    def error(self, message: str) -> NoReturn:
        raise DynacutError(message, f"see {self.prog}{self.subcommand} --help", status=ExitStatus.USAGE)


def command_parser(names: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command line, with the subcommands of these names."""
    width = max(40, min(shutil.get_terminal_size().columns, 100) - 2)  # as argparse's own text
    parser = _Parser(
        prog="dynacut",
        description="Switch code features of a running Linux process off and on again, without a restart.",
        epilog="exit status: 0 done; 1 refused, target untouched; 2 wrong usage; 3 changed, but the check afterwards "
        "failed; 4 state of the target unknown",
        formatter_class=_wide_names,
        allow_abbrev=False,
    )
    if len(names) == 1:
        parser.subcommand = f" {names[0]}"
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND [OPTION …]", required=True)
    for name in names:
        command = import_module(f"dynacut.cli.{COMMANDS[name]}")
        subparser = commands.add_parser(
            name,
            help=command.HELP,
            usage="\n       ".join(command.USAGE),
            description=textwrap.fill(command.DESCRIPTION, width),
            epilog=command.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # --un is no wish to --undo
        )
        command.prepare_parser(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def _wide_names(prog: str) -> argparse.HelpFormatter:
    """Keeps the longest name of a command on the line of its help."""
    return argparse.HelpFormatter(prog, max_help_position=16)


class _ShowVersion(argparse.Action):
    """argparse's own version action wants the version at once, and looking it up takes 30 ms."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"dynacut {version('dynacut')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
