"""dynacut plan: from coverage to a plan, tried if there is something to try it on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dynacut.cli.arguments import add_output_options, command_behind_dashes, count, seconds, wrong_usage
from dynacut.cli.console import print_json, warn
from dynacut.cli.plan import startup
from dynacut.cli.plan.findings import Findings, document, print_findings
from dynacut.cli.steps import Steps
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.plan import name_problem
from dynacut.shared.plan_file import write

if TYPE_CHECKING:
    from dynacut.live.trial import Trial
    from dynacut.shared.coverage.suggest import Suggestion

HELP = "find the blocks of a feature and a way to switch it off, or start-up code"
USAGE = (
    "dynacut plan --wanted F … --unwanted F … [--error F …] -o PLAN.toml [--name NAME]\n"
    "                    [--try (--pid P [--tree] | -- CMD …) --probe-unwanted CMD … --probe-wanted CMD …]",
    "dynacut plan --init F … (--serving F … | --init-point SITE | both) [-o PLAN.toml] [--module M … | --all-modules]\n"
    "                    [--on-hit ACTION] [--scope entry|block|page]",
    "dynacut plan --plan PLAN.toml --keep F … [-o PLAN2.toml] [--on-hit ACTION] [--scope …]",
)
DESCRIPTION = (
    "Find what only unwanted requests execute, and a redirect from there into the program's own error path. With "
    "--try, prove it on a sacrificial instance: apply, probe, undo, and on to the next way until one works. Or, with "
    "--init and --serving, plan to remove what ran at start-up only; --keep takes out of a plan what has to stay."
)
EPILOG = """examples:
  dynacut plan --wanted get.drcov --unwanted set.drcov --name set -o set.toml
  dynacut plan --wanted get.drcov --unwanted set.drcov --name set -o set.toml --try --pid 4711 \\
      --probe-unwanted 'redis-cli -e set k v' --probe-wanted 'redis-cli -e get k'
  dynacut plan --init redis.start.drcov --serving redis.serving.drcov -o startup.toml
  dynacut plan --plan startup.toml --keep learned.drcov --on-hit terminate -o final.toml
"""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    logs = parser.add_argument_group("coverage (drcov)")
    logs.add_argument("--wanted", nargs="+", type=Path, metavar="F", help="of requests that must go on")
    logs.add_argument("--unwanted", nargs="+", type=Path, metavar="F", help="of requests to switch off")
    logs.add_argument("--error", nargs="+", type=Path, metavar="F", help="of unwanted requests that are refused anyway")
    startup.add_options(parser)
    parser.add_argument("-o", dest="output", type=Path, metavar="PLAN.toml", help="the plan")
    parser.add_argument("--name", default="feature", metavar="NAME", help="the feature's name (default: feature)")
    trial = parser.add_argument_group("trying it")
    trial.add_argument("--try", dest="tried", action="store_true", help="try the ways found, on --pid or on -- CMD")
    trial.add_argument("--pid", type=int, metavar="P", help="a sacrificial instance that runs")
    trial.add_argument("--tree", action="store_true", help="with all its descendants")
    trial.add_argument("--probe-unwanted", action="append", default=[], metavar="CMD", help="succeeds; shall fail")
    trial.add_argument("--probe-wanted", action="append", default=[], metavar="CMD", help="succeeds; shall go on so")
    trial.add_argument("--probe-timeout", type=seconds, default=5.0, metavar="S", help="for each probe (default: 5)")
    trial.add_argument("--trials", type=count, default=20, metavar="N", help="ways to try at most (default: 20)")
    add_output_options(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD …", help="the instance to start")


def run(arguments: argparse.Namespace) -> ExitStatus:
    """Finds, tries, writes the plan."""
    feature = bool(arguments.wanted or arguments.unwanted)
    if feature + bool(arguments.init) + bool(arguments.keep) != 1:
        raise wrong_usage("plan", "give one of --wanted with --unwanted, --init with --serving, --plan with --keep")
    _check_belonging(arguments, feature=feature)
    if not feature:
        return startup.run(arguments)
    from dynacut.shared.coverage.drcov import read_union
    from dynacut.shared.coverage.suggest import suggest

    if not (arguments.wanted and arguments.unwanted):
        raise wrong_usage("plan", "--wanted and --unwanted need each other")
    if arguments.output is None:
        raise wrong_usage("plan", "-o PLAN.toml is missing")
    if problem := name_problem(arguments.name):
        raise wrong_usage("plan", problem)
    command = command_behind_dashes(arguments)
    if arguments.tried and (arguments.pid is None) == (not command):
        raise wrong_usage("plan", "--try needs an instance: either --pid or -- CMD")
    if arguments.tried and not arguments.probe_unwanted:
        raise wrong_usage("plan", "--try needs --probe-unwanted")
    with Steps(shown=not arguments.quiet) as steps:
        steps.tell("reading the logs")
        error = read_union(arguments.error, warn) if arguments.error else None
        wanted, unwanted = read_union(arguments.wanted, warn), read_union(arguments.unwanted, warn)
        steps.tell("finding blocks, and ways around them")
        differences, suggestions = suggest(wanted, unwanted, error)
    if not suggestions:
        raise DynacutError(
            "no safe way was found to switch off what only the unwanted requests execute",
            "record more wanted requests, its siblings above all; or choose a site by hand",
        )
    trials: list[Trial] = []
    chosen = suggestions[0]
    if arguments.tried:
        chosen, trials = _try(arguments, command, suggestions)
    _write(arguments, suggestions, chosen, trials)
    findings = Findings(differences, suggestions, chosen, trials)
    if arguments.json:
        print_json(document(arguments, findings))
    elif not arguments.quiet:
        print_findings(arguments, findings)
    return ExitStatus.DONE


def _check_belonging(arguments: argparse.Namespace, *, feature: bool) -> None:
    """Refuses options that belong to another way of making a plan than the one asked for."""
    of_startup = arguments.serving or arguments.init_point or arguments.module or arguments.all_modules
    for options, owner, misplaced in (
        (
            "--error, --try and -- CMD",
            "--wanted",
            (arguments.error or arguments.tried or arguments.command) and not feature,
        ),
        ("--serving, --init-point and --module", "--init", of_startup and not arguments.init),
        ("--plan", "--keep", arguments.plan and not arguments.keep),
        ("--on-hit and --scope", "--init or --keep", (arguments.on_hit or arguments.scope) and feature),
    ):
        if misplaced:
            raise wrong_usage("plan", f"{options}: only with {owner}")


def _try(
    arguments: argparse.Namespace, command: list[str], suggestions: list[Suggestion]
) -> tuple[Suggestion, list[Trial]]:
    from dynacut.live.trial import Instance, Probes

    probes = Probes(tuple(arguments.probe_wanted), tuple(arguments.probe_unwanted), arguments.probe_timeout)
    trials = []
    with (
        Steps(shown=not arguments.quiet) as steps,
        Instance(arguments.pid, command, probes, tree=arguments.tree) as instance,
    ):
        for number, suggestion in enumerate(suggestions[: arguments.trials], 1):
            steps.tell(f"trial {number}: {suggestion.entry} → {suggestion.destination}")
            trial = instance.attempt(suggestion.plan(arguments.name))
            trials.append(trial)
            if trial.works:
                return suggestion, trials
    raise DynacutError(
        f"none of {len(trials)} ways worked",
        "record more wanted requests, or try more ways by --trials",
        details=[
            f"{index}. {way.entry} → {way.destination}: {trial.verdict}"
            for index, (way, trial) in enumerate(zip(suggestions, trials, strict=False), 1)
        ],
    )


def _write(
    arguments: argparse.Namespace, suggestions: list[Suggestion], chosen: Suggestion, trials: list[Trial]
) -> None:
    lines = [chosen.candidate.reason]
    if trials:
        lines.append(f"Tried: way {len(trials)} of those found works.")
        lines += [f"  probe, shall fail:    {probe}" for probe in arguments.probe_unwanted]
        lines += [f"  probe, shall succeed: {probe}" for probe in arguments.probe_wanted]
        lines += [
            f"  {index}. {way.entry} → {way.destination}: {trial.verdict}"
            for index, (way, trial) in enumerate(zip(suggestions, trials, strict=False), 1)
        ]
    else:
        lines.append("Not tried yet: see `dynacut plan --try`.")
    write(arguments.output, chosen.plan(arguments.name), lines)
