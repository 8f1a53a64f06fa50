"""dynacut plan --init and --keep: plans that remove start-up code, and what has to stay taken out of a plan."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacut.cli.arguments import wrong_usage
from dynacut.cli.console import SCHEMA, print_json, print_table, warn
from dynacut.cli.steps import Steps
from dynacut.handlers.table import Action
from dynacut.shared.errors import ExitStatus, printable
from dynacut.shared.on_hit import SYNTAX as ON_HIT_SYNTAX
from dynacut.shared.on_hit import OnHit
from dynacut.shared.plan import Scope
from dynacut.shared.plan_file import load, write

if TYPE_CHECKING:
    from dynacut.shared.coverage.startup import StartupCode

_SHOWN = 12


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    startup = parser.add_argument_group("start-up code")
    startup.add_argument(
        "--init", nargs="+", type=Path, metavar="F", help="coverage of start-up, from the first block on"
    )
    startup.add_argument(
        "--serving",
        nargs="+",
        type=Path,
        default=[],
        metavar="F",
        help="of all later phases: requests, errors, reload, end",
    )
    startup.add_argument(
        "--init-point", metavar="SITE", help="start-up ends where SITE is first reached (ordered logs; its module only)"
    )
    startup.add_argument(
        "--module", action="append", default=[], metavar="M", help="of this one (default: the executable)"
    )
    startup.add_argument("--all-modules", action="store_true", help="of every module but the dynamic linker")
    startup.add_argument("--on-hit", metavar="ACTION", help=f"what a hit does: {ON_HIT_SYNTAX} (default: learn)")
    startup.add_argument("--scope", choices=[str(scope) for scope in Scope], help="of each block (default: entry)")
    keep = parser.add_argument_group("what has to stay")
    keep.add_argument(
        "--plan", type=Path, metavar="PLAN.toml", help="the plan to take blocks out of; in place without -o"
    )
    keep.add_argument(
        "--keep", nargs="+", type=Path, metavar="F", help="coverage to keep: what --learned -o F has written"
    )


def run(arguments: argparse.Namespace) -> ExitStatus:
    """Makes a plan from --init, or takes --keep out of one.

    Raises:
        DynacutError: the options do not fit together, a file cannot be read, or nothing is left to be removed.
    """
    if arguments.keep:
        return _keep(arguments)
    from dynacut.shared.coverage.drcov import read_union
    from dynacut.shared.coverage.startup import split_at, startup_code, startup_plan

    if not arguments.serving and not arguments.init_point:
        raise wrong_usage("plan", "--init needs --serving: the phases whose code has to stay")
    if arguments.module and arguments.all_modules:
        raise wrong_usage("plan", "--module and --all-modules exclude each other")
    init, later = read_union(arguments.init, warn), [read_union(arguments.serving, warn)] if arguments.serving else []
    if arguments.init_point:
        init, after = split_at(init, arguments.init_point)
        later.append(after)
        if not arguments.serving:
            warn("a log says when a block ran first, not whether again: give --serving too, or learn before removing")
    with Steps(shown=not arguments.quiet) as steps:
        steps.tell("finding blocks, and what ran at start-up only")
        parts = startup_code(init, later, arguments.module, all_modules=arguments.all_modules)
    on_hit = OnHit.parse(arguments.on_hit or "learn")
    _warn_of(on_hit)
    plan = startup_plan(parts, on_hit, Scope(arguments.scope or Scope.ENTRY))
    if arguments.output is not None:
        write(arguments.output, plan, [f"Start-up code of {', '.join(plan.modules)}."])
    if arguments.json:
        print_json({"schema": SCHEMA, "plan": _path(arguments.output), "modules": [_as_json(part) for part in parts]})
    elif not arguments.quiet:
        _print(parts, arguments.output)
    return ExitStatus.DONE


def _keep(arguments: argparse.Namespace) -> ExitStatus:
    from dynacut.shared.coverage.drcov import read_union
    from dynacut.shared.coverage.keep import without
    from dynacut.shared.coverage.startup import FEATURE

    if arguments.plan is None:
        raise wrong_usage("plan", "--keep needs the plan: --plan PLAN.toml")
    plan, count = without(load(arguments.plan), read_union(arguments.keep, warn))
    on_hit = OnHit.parse(arguments.on_hit) if arguments.on_hit else None
    if on_hit or arguments.scope:
        plan = plan.with_action(on_hit, Scope(arguments.scope) if arguments.scope else None)
    if on_hit and any(feature.name == FEATURE for feature in plan.features):
        _warn_of(on_hit)
    output = arguments.output or arguments.plan
    write(output, plan, [f"{count} blocks that have to stay were taken out."])
    left = sum(len(feature.sites) for feature in plan.features)
    if arguments.json:
        print_json({"schema": SCHEMA, "plan": str(output), "kept": count, "sites": left})
    elif not arguments.quiet:
        print(f"{count:,} blocks stay, {left:,} go: {printable(str(output))}")
    return ExitStatus.DONE


def _warn_of(on_hit: OnHit) -> None:
    """What ran at start-up only is never known for certain."""
    if on_hit.action is Action.TERMINATE:
        warn(
            "the process ends when it needs one of these blocks after all: let it learn under real traffic first, for "
            "as long as its rarest work takes, or leave it at learn"
        )


def _print(parts: Sequence[StartupCode], output: Path | None) -> None:
    rows = []
    for part in parts:
        sizes = [(len(blocks), sum(blocks.values())) for blocks in (part.init, part.later, part.only)]
        rows.append([part.code.module.name, *(f"{number:,}" for size in sizes for number in size), f"{part.share:.0%}"])
    columns = [
        "module",
        "init: blocks",
        "bytes",
        "later: blocks",
        "bytes",
        "start-up only: blocks",
        "bytes",
        "of all that ran",
    ]
    print_table("what ran", columns, rows, right=frozenset(range(1, 8)))
    functions = [[part.code.module.name, name, f"{size:,}"] for part in parts for name, size in part.functions[:_SHOWN]]
    print_table("biggest functions that go entirely", ["module", "function", "bytes"], functions, right=frozenset({2}))
    count = sum(len(part.only) for part in parts)
    where = f"{printable(str(output))}: " if output else "without -o nothing is written; "
    print(f"{where}{count:,} blocks ran at start-up only")


def _as_json(part: StartupCode) -> dict[str, Any]:
    return {
        "name": part.code.module.name,
        "path": part.code.module.path,
        "build_id": part.code.elf.build_id,
        "init": _size(part.init),
        "later": _size(part.later),
        "startup_only": _size(part.only),
        "share": round(part.share, 4),
        "functions": [{"name": name, "bytes": size} for name, size in part.functions],
    }


def _size(blocks: Mapping[int, int]) -> dict[str, int]:
    return {"blocks": len(blocks), "bytes": sum(blocks.values())}


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)
