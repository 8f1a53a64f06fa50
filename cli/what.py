"""What to do to a target: the options that `dynacut live` and `dynacut offline` share."""

from __future__ import annotations

import argparse
from pathlib import Path

from dynacut.handlers.table import Table
from dynacut.shared import resolve
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.on_hit import SYNTAX as ON_HIT_SYNTAX
from dynacut.shared.on_hit import OnHit
from dynacut.shared.patch_set import PatchSet
from dynacut.shared.plan import Plan, PlannedFeature, PlannedSite, Scope, load, name_problem
from dynacut.shared.sites import SYNTAX as SITE_SYNTAX
from dynacut.shared.target import Target


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    what = parser.add_argument_group("what to do (nothing of these: show what is in force)")
    what.add_argument("--plan", type=Path, metavar="FILE", help="disable the features of a plan")
    what.add_argument("--feature", action="append", default=[], metavar="NAME", help="of the plan, only this one")
    what.add_argument(
        "--disable",
        nargs="+",
        default=[],
        metavar="SITE",
        help=f"disable these sites without a plan ({SITE_SYNTAX}), or a feature that was enabled again, by its name",
    )
    what.add_argument("--on-hit", metavar="ACTION", help=f"what a hit does: {ON_HIT_SYNTAX} (default: terminate)")
    what.add_argument("--as", dest="name", metavar="NAME", help="the feature's name (default: the first SITE)")
    what.add_argument("--enable", nargs="+", default=[], metavar="NAME", help="put these features' bytes back")
    what.add_argument("--undo", action="store_true", help="put everything back")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--scope",
        choices=[str(scope) for scope in Scope],
        help="what to overwrite of each block: its first byte, every byte, and pages left empty as well "
        "(default: entry, or what the plan says)",
    )
    how.add_argument("--dry-run", action="store_true", help="verify everything, change nothing")
    how.add_argument("--json", action="store_true", help="print one JSON document")
    how.add_argument(
        "--timeout", type=_seconds, default=10.0, metavar="S", help="give up after S seconds (default: 10)"
    )
    how.add_argument("-v", "--verbose", action="count", default=0, help="show every site; twice: trace back errors")
    how.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")


class Request:
    """The change that the options ask for; None if they only ask to show."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Reads the options, and the plan.

        Raises:
            DynacutError: they contradict each other, or the plan cannot be read.
        """
        self._arguments = arguments
        asked = [
            name
            for name, given in (
                ("--plan", arguments.plan is not None),
                ("--disable", bool(arguments.disable)),
                ("--enable", bool(arguments.enable)),
                ("--undo", arguments.undo),
            )
            if given
        ]
        if len(asked) > 1:
            raise _usage(f"{' and '.join(asked)} exclude each other", "do one after the other")
        self.changes = bool(asked)
        if arguments.feature and arguments.plan is None:
            raise _usage("--feature chooses among the features of a plan", "give the plan by --plan FILE")
        if (arguments.on_hit is not None or arguments.name is not None) and not arguments.disable:
            raise _usage("--on-hit and --as belong to --disable", "a plan says itself what a hit does")
        if arguments.scope is not None and not arguments.disable and arguments.plan is None:
            raise _usage("--scope belongs to --disable or --plan", "what is put back is put back whole")
        if arguments.dry_run and not self.changes:
            raise _usage("--dry-run without a change to try", "add --plan, --disable, --enable or --undo")
        self._plan = self._planned()

    def resolve(self, target: Target, table: Table | None) -> PatchSet:
        """What is to be done to one target; DynacutError if it does not fit."""
        arguments = self._arguments
        if arguments.undo:
            return resolve.undo(target, table)
        if arguments.enable:
            return resolve.enable(arguments.enable, target, table)
        known = set(table.features) if table else set()
        if table and arguments.disable and known.issuperset(arguments.disable) and not self._describes_anew:
            return resolve.disable_again(arguments.disable, target, table)
        assert self._plan is not None
        return resolve.disable(self._plan, target, table)

    @property
    def _describes_anew(self) -> bool:
        arguments = self._arguments
        return any(given is not None for given in (arguments.on_hit, arguments.name, arguments.scope))

    def _planned(self) -> Plan | None:
        arguments = self._arguments
        if arguments.plan is not None:
            plan = load(arguments.plan)
            if arguments.feature:
                plan = plan.only(arguments.feature)
            if arguments.scope:
                scope = Scope(arguments.scope)
                features = tuple(PlannedFeature(part.name, part.on_hit, scope, part.sites) for part in plan.features)
                plan = Plan(plan.name, features, plan.edits, plan.modules)
            return plan
        if not arguments.disable:
            return None
        name = arguments.disable[0] if arguments.name is None else arguments.name
        if problem := name_problem(name):
            raise _usage(problem, "give another name by --as NAME")
        feature = PlannedFeature(
            name,
            OnHit.parse("terminate" if arguments.on_hit is None else arguments.on_hit),
            Scope(arguments.scope or Scope.ENTRY),
            tuple(PlannedSite(site) for site in arguments.disable),
        )
        return Plan(name, (feature,))


def _usage(problem: str, advice: str) -> DynacutError:
    return DynacutError(problem, advice, status=ExitStatus.USAGE)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError("a number of seconds from 0 to 3600")
    return seconds
