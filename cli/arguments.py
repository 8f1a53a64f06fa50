"""Values of options, checked as they are read: what argparse calls the type of an argument."""

from __future__ import annotations

import argparse
import math

from dynacut.shared.errors import DynacutError, ExitStatus, shortened

_MAX_SECONDS = 366 * 24 * 3600.0
_MAX_COUNT = 1000


def add_output_options(parser: argparse.ArgumentParser, *, verbose: str = "") -> None:
    """Adds what every command takes. verbose: what -v given once does here."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON document, of an error too")
    once = f"{verbose}; " if verbose else ""
    group.add_argument("-v", "--verbose", action="count", default=0, help=f"{once}twice: trace back errors")
    group.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")


def command_behind_dashes(arguments: argparse.Namespace) -> list[str]:
    """The words of `-- CMD …`, without the dashes, which argparse leaves there."""
    words: list[str] = arguments.command
    return words[1:] if words[:1] == ["--"] else words


def wrong_usage(command: str, problem: str) -> DynacutError:
    """The error for options of a subcommand that do not fit together."""
    return DynacutError(problem, f"see dynacut {command} --help", status=ExitStatus.USAGE)


def tcp_port(text: str) -> int:
    """A TCP port."""
    return _whole_number(text, 1, 65535, "TCP port")


def count(text: str) -> int:
    """How often, or how many: one at least."""
    return _whole_number(text, 1, _MAX_COUNT, "number")


def seconds(text: str) -> float:
    """A time that passes: more than none, and less than a year."""
    duration = _duration(text)
    if duration == 0:
        raise argparse.ArgumentTypeError(f"{shortened(text)!r} is no number of seconds greater than 0")
    return duration


def pause(text: str) -> float:
    """A time that may be none at all."""
    return _duration(text)


def address(text: str) -> int:
    """An absolute address, in hexadecimal."""
    try:
        value = int(text, 16)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"{shortened(text)!r} is no address such as 0x7f0000000000")
    return value


def _duration(text: str) -> float:
    try:
        duration = float(text) if text.isascii() else math.nan
    except ValueError:
        duration = math.nan
    if not 0 <= duration <= _MAX_SECONDS:  # nan is not
        raise argparse.ArgumentTypeError(f"{shortened(text)!r} is no number of seconds from 0 up")
    return duration


def _whole_number(text: str, least: int, most: int, kind: str) -> int:
    if not text.isascii() or not text.isdecimal() or not least <= int(text[:20]) <= most:
        raise argparse.ArgumentTypeError(f"{shortened(text)!r} is no {kind} from {least} to {most}")
    return int(text)
