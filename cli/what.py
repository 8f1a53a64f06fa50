"""What to do to a target: the options that `dynacut live` and `dynacut offline` share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dynacut.cli.arguments import add_output_options, address
from dynacut.cli.console import warn
from dynacut.handlers.table import Table
from dynacut.shared import resolve
from dynacut.shared.code import KnownFiles
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.on_hit import SYNTAX as ON_HIT_SYNTAX
from dynacut.shared.on_hit import OnHit
from dynacut.shared.patch_set import PatchSet
from dynacut.shared.plan import Plan, PlannedFeature, PlannedSite, Scope, name_problem
from dynacut.shared.plan_file import load
from dynacut.shared.sites import SYNTAX as SITE_SYNTAX
from dynacut.shared.sites import Ask
from dynacut.shared.target import Target

if TYPE_CHECKING:
    from dynacut.shared.library.file import LibraryFile


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
    what.add_argument(
        "--learned",
        action="store_true",
        help="list the blocks that `learn` has put back, in the order of their hits; with -o F, as a drcov log",
    )
    what.add_argument(
        "--standing",
        action="store_true",
        help="list where threads are or return to: what cannot be removed under their feet; with -o F, as a drcov log",
    )
    what.add_argument(
        "--handler",
        metavar="LIB.so[:SYMBOL]",
        help="load this library; its SIGTRAP handler (default: trap_handler) gets the program's own traps, and hits of "
        "sites with the action handler; alone, or with --disable or --plan",
    )
    what.add_argument(
        "--handler-at", type=address, metavar="0xADDRESS", help="where to load it (default: a free place)"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--scope",
        choices=[str(scope) for scope in Scope],
        help="what to overwrite of each block: its first byte, every byte, and pages left empty as well "
        "(default: entry, or what the plan says)",
    )
    how.add_argument("--dry-run", action="store_true", help="verify everything, change nothing")
    add_output_options(parser, verbose="show modules and every site")


class Request:
    """The change that the options ask for; None if they only ask to show.

    ask: knows further names for sites, where the way to the target brings it along.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Reads the options, and the plan.

        Raises:
            DynacutError: they contradict each other, or the plan cannot be read.
        """
        self.ask: Ask | None = None
        self._known = KnownFiles()
        self._arguments = arguments
        asked = _asked(arguments)
        if arguments.handler is not None and (arguments.enable or arguments.undo):
            raise _usage("--handler installs, and --enable and --undo take away", "do one after the other")
        if arguments.handler_at is not None and arguments.handler is None:
            raise _usage("--handler-at places a library", "give the library by --handler LIB.so")
        self.lists = arguments.learned or arguments.standing
        if self.lists and arguments.handler is not None:
            raise _usage(f"--handler installs, and {asked[0]} only shows", "do one after the other")
        self.changes = (bool(asked) and not self.lists) or arguments.handler is not None
        if arguments.feature and arguments.plan is None:
            raise _usage("--feature chooses among the features of a plan", "give the plan by --plan FILE")
        if (arguments.on_hit is not None or arguments.name is not None) and not arguments.disable:
            raise _usage("--on-hit and --as belong to --disable", "a plan says itself what a hit does")
        if arguments.scope is not None and not arguments.disable and arguments.plan is None:
            raise _usage("--scope belongs to --disable or --plan", "what is put back is put back whole")
        if arguments.dry_run and not self.changes:
            raise _usage("--dry-run without a change to try", "add --plan, --disable, --handler, --enable or --undo")
        self._plan = self._planned()
        self._library: LibraryFile | None = None
        if arguments.handler is not None:
            from dynacut.shared.library.file import LibraryFile

            self._library = LibraryFile.parse(arguments.handler)
            if unrun := self._library.constructors:
                warn(f"{arguments.handler}: its constructors do not run: {', '.join(unrun)}")

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
        library = self._library.load(target, table, arguments.handler_at) if self._library else None
        if self._plan is None:
            assert library is not None
            return resolve.install(library, table)
        return resolve.disable(self._plan, target, table, library, self.ask, self._known)

    @property
    def _describes_anew(self) -> bool:
        arguments = self._arguments
        described = (arguments.on_hit, arguments.name, arguments.scope, arguments.handler)
        return any(given is not None for given in described)

    def _planned(self) -> Plan | None:
        arguments = self._arguments
        if arguments.plan is not None:
            plan = load(arguments.plan)
            if arguments.feature:
                plan = plan.only(arguments.feature)
            if arguments.scope:
                plan = plan.with_action(None, Scope(arguments.scope))
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


def _asked(arguments: argparse.Namespace) -> list[str]:
    """The one thing to do that the options name; empty if none is.

    Raises:
        DynacutError: they name several.
    """
    given = {
        "--plan": arguments.plan is not None,
        "--disable": bool(arguments.disable),
        "--enable": bool(arguments.enable),
        "--undo": arguments.undo,
        "--learned": arguments.learned,
        "--standing": arguments.standing,
    }
    asked = [name for name, is_given in given.items() if is_given]
    if len(asked) > 1:
        raise _usage(f"{' and '.join(asked)} exclude each other", "do one after the other")
    return asked


def _usage(problem: str, advice: str) -> DynacutError:
    return DynacutError(problem, advice, status=ExitStatus.USAGE)
