"""dynacut trace --merge, --intersect, --subtract: sets of logs, by module and offset."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dynacut.cli.console import warn
from dynacut.shared.errors import DynacutError

if TYPE_CHECKING:
    from dynacut.shared.coverage.coverage import Coverage, CoveredModule

OPERATIONS = ("merge", "intersect", "subtract")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    sets = parser.add_argument_group("sets of logs, by module and offset")
    sets.add_argument("--merge", nargs="+", type=Path, metavar="F", help="what any of them has")
    sets.add_argument("--intersect", nargs="+", type=Path, metavar="F", help="what all of them have")
    sets.add_argument("--subtract", nargs="+", type=Path, metavar="F", help="what the first has and no other")
    sets.add_argument(
        "--normalise",
        action="store_true",
        help="first make whole blocks of ours of what each log has, by the module's file",
    )


def combine(arguments: argparse.Namespace, operation: str) -> Coverage:
    """The result of one of OPERATIONS, written to -o.

    Raises:
        DynacutError: a log cannot be read, or the result not written.
    """
    from dynacut.shared.coverage.drcov import write

    first, *others = (_read(path, normalise=arguments.normalise) for path in getattr(arguments, operation))
    if operation == "merge":
        result = first.union(*others)
    elif operation == "subtract":
        result = first.difference(*others)
    else:
        result = first
        for other in others:
            result = result.intersection(other)
    write(arguments.output, result)
    return result


def _read(path: Path, *, normalise: bool) -> Coverage:
    from dynacut.shared.coverage.coverage import Coverage
    from dynacut.shared.coverage.drcov import read_log

    log = read_log(path)
    for line in log.warnings:
        warn(f"{path}: {line}")
    if not normalise:
        return log.coverage
    return Coverage(tuple(_normalised(path, module) for module in log.coverage.modules))


def _normalised(log: Path, module: CoveredModule) -> CoveredModule:
    from dynacut.shared.code import code_of_file

    if not module.blocks:
        return module
    try:
        whole = module.normalised(code_of_file(Path(module.path)).blocks)
    except DynacutError as error:
        warn(f"{log}: the blocks of {module.path!r} stay as they are: {error.problem}")
        return module
    if outside := module.size_bytes - module.intersection(whole).size_bytes:
        warn(f"{log}: {outside} bytes of {module.path!r} lie in no block of its file and were left out")
    return whole
