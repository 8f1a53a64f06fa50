"""dynacut compare: the ways of applying a plan to a running process, measured side by side."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacut.cli.arguments import add_output_options, command_behind_dashes, count, wrong_usage
from dynacut.cli.console import print_error, print_json, print_table, warn
from dynacut.cli.quantities import counted
from dynacut.cli.steps import Steps
from dynacut.jobs.compare.ways import Settings, Way, why_not
from dynacut.shared.errors import DynacutError, ExitStatus, printable

if TYPE_CHECKING:
    from dynacut.jobs.compare.probes import Probe
    from dynacut.jobs.compare.results import Results

HELP = "measure a plan live, by gdb and by checkpoint, side by side"
USAGE = (
    "dynacut compare --plan FILE [--feature NAME …] [--ways W,…] [--repeat N] [PROBE] [--html FILE]\n"
    "                       [--images DIR] [--criu PATH] (--pid P [--yes] | -- CMD …)",
)
DESCRIPTION = (
    "Disable and undo a plan by each way, on a running process with its descendants, or on instances started for it, "
    "while clients ask it all the time: how long they waited, whether connections survived, how long threads stood "
    "still, what it cost, and whether all ways led to the same bytes."
)
EPILOG = """examples:
  dynacut compare --plan no-set.toml -- redis-server --port 7777 --save ''
  dynacut compare --plan no-set.toml --pid 4711 --ways live,gdb --html page.html
  dynacut compare --plan no-put.toml --pid 4711 --yes --probe-http http://127.0.0.1:8080/index.html --json
"""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--plan", type=Path, required=True, metavar="FILE", help="the plan")
    parser.add_argument("--feature", action="append", default=[], metavar="NAME", help="of the plan, only this one")
    parser.add_argument("--pid", type=int, metavar="P", help="a running process, root of its tree")
    parser.add_argument("--ways", type=_ways, metavar="W,…", help="of live, gdb, checkpoint (default: all there are)")
    parser.add_argument("--yes", action="store_true", help="with --pid: do not ask whether to begin")
    parser.add_argument("--repeat", type=count, default=3, metavar="N", help="turns of each way (default: 3)")
    probes = parser.add_argument_group("what clients ask (default: found by looking where the process listens)")
    one = probes.add_mutually_exclusive_group()
    one.add_argument("--probe", dest="asked", type=_command, metavar="CMD", help="a command; status 0: it serves")
    one.add_argument("--probe-redis", dest="asked", type=_redis, metavar="[HOST:]PORT", help="redis PING")
    one.add_argument("--probe-http", dest="asked", type=_http, metavar="URL", help="HTTP GET")
    one.add_argument("--probe-tcp", dest="asked", type=_tcp, metavar="[HOST:]PORT", help="TCP connect")
    output = parser.add_argument_group("what it writes")
    output.add_argument("--html", type=Path, metavar="FILE", help="a page with charts, in one file that loads nothing")
    add_output_options(parser)
    output.add_argument(
        "--images", type=Path, metavar="DIR", help="the folder for images (default: that of temporary files)"
    )
    parser.add_argument("--criu", type=Path, metavar="PATH", help="the CRIU to use (see dynacut checkpoint)")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="-- CMD …", help="the program to start for each turn"
    )


def run(arguments: argparse.Namespace) -> ExitStatus:
    """Measures and says what was measured."""
    from dynacut.jobs.compare.comparison import Comparison
    from dynacut.offline import processes
    from dynacut.shared.plan_file import load

    command = command_behind_dashes(arguments)
    if (arguments.pid is None) == (not command):
        raise wrong_usage("compare", "there must be something to compare on: either --pid or -- CMD")
    plan = load(arguments.plan)
    features = plan.only(arguments.feature).feature_names if arguments.feature else plan.feature_names
    processes.require_root("a comparison")
    processes.become_subreaper()
    ways, left_out = _available(arguments.ways or list(Way), arguments.criu)
    if arguments.pid is not None:
        _admit(arguments.pid)
        _ask(arguments, ways, features)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # as Ctrl-C: what is in force is undone first
    settings = Settings(arguments.plan.absolute(), tuple(features), arguments.criu)
    with Steps(shown=not arguments.quiet) as steps:
        comparison = Comparison(settings, ways, arguments.images, steps.tell, warn, renewed=arguments.pid is None)
        comparison.results.left_out.update(left_out)
        results = comparison.run(lambda: _target(arguments, command), arguments.repeat)
    _report(arguments, settings, results)
    if results.broken_off is not None:
        return _broken_off(results.broken_off)
    return ExitStatus.DONE if results.equal and not results.failures else ExitStatus.CHECK_FAILED


def _broken_off(error: BaseException) -> ExitStatus:
    """Says why not everything was measured, behind the document of what was."""
    if not isinstance(error, DynacutError):
        advice = "`dynacut live` on the same process shows what is in force"
        error = DynacutError("interrupted", advice, status=ExitStatus.UNKNOWN)
    print_error(error)
    return error.status


def _available(wanted: Sequence[Way], criu: Path | None) -> tuple[list[Way], dict[Way, str]]:
    left_out = {way: reason for way in wanted if (reason := why_not(way, criu))}
    for way, reason in left_out.items():
        warn(f"{way} is left out: {reason}")
    ways = [way for way in wanted if way not in left_out]
    if not ways:
        raise DynacutError("no way is left to compare", "install what is missing")
    return ways, left_out


def _admit(pid: int) -> None:
    """Raises:
    DynacutError: the process cannot be looked at, or this one descends from it.
    """
    from dynacut.live.admission import admit
    from dynacut.shared.proc import tree_of

    admit(pid, changing=False)
    if os.getpid() in tree_of(pid):
        raise DynacutError(
            f"dynacut descends from process {pid} and would measure, and dump, itself", "run it from elsewhere"
        )


def _ask(arguments: argparse.Namespace, ways: Sequence[Way], features: Sequence[str]) -> None:
    """Says what will happen to somebody's process, and asks. --ways and --yes are consent enough.

    Raises:
        DynacutError: nobody can be asked, or says no.
    """
    if not arguments.quiet:
        print(
            f"process {arguments.pid} and its descendants: {', '.join(map(printable, features))} will be disabled and "
            f"enabled again {counted(arguments.repeat, 'time')} by each of: {', '.join(ways)}; clients will ask "
            "all the time.",
            file=sys.stderr,
        )
        if Way.CHECKPOINT in ways:
            print(
                "checkpoint ENDS the processes and restores them with their pids. Meanwhile new connections are "
                "refused, and a supervisor may start others. From then on they are children of another parent.",
                file=sys.stderr,
            )
    if arguments.yes or arguments.ways:
        return
    if not sys.stdin.isatty():
        raise wrong_usage(
            "compare", "a comparison on a running process needs --yes, or --ways, where nobody can be asked"
        )
    print("Begin? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise DynacutError("nothing was done", "use -- CMD to compare on instances started for it")


@contextmanager
def _target(arguments: argparse.Namespace, command: Sequence[str]) -> Iterator[tuple[int, Probe]]:
    from dynacut.jobs.compare.probes import answers, guessed
    from dynacut.jobs.compare.target import instance, living_tree

    if arguments.pid is None:
        with instance(command, lambda pids: arguments.asked or guessed(pids)) as started:
            yield started
        return
    probe = arguments.asked or guessed(living_tree(arguments.pid))
    if probe is None:
        raise DynacutError(
            f"process {arguments.pid} listens at no TCP port of this machine", "give a probe, such as --probe CMD"
        )
    if not answers(probe):
        raise DynacutError(f"the server does not answer: {probe.label}", "try the request by hand")
    yield arguments.pid, probe


def _report(arguments: argparse.Namespace, settings: Settings, results: Results) -> None:
    from dynacut.cli.compare.document import document_of

    document = document_of(results, settings, arguments.repeat)
    for way, reason in results.left_out.items():
        if way in results.steps:
            warn(f"{way} is left out: {reason}")
    for way, failure in results.failures.items():
        warn(f"{way} failed ({failure.step}) and is left out: {failure.reason}")
    for line in document["warnings"]:
        warn(line)
    if arguments.html is not None:
        from dynacut.cli.compare.page import page_of
        from dynacut.cli.pages import write_text

        write_text(arguments.html, page_of(document))
    if arguments.json:
        print_json(document)
    elif not arguments.quiet:
        _print(document)
        if arguments.html is not None:
            print(f"→ {printable(str(arguments.html))}")


def _print(document: dict[str, Any]) -> None:
    from dynacut.cli.compare.document import MEASURES, cell, extent_of, rows_of, verdicts_of

    target = document["target"]
    print(f"{printable(target['name'])} ({extent_of(target)}): {printable(document['probe'])}")
    columns = rows_of(document)
    rows = [[each.title, *(cell(figures.get(each.name), each.unit) for _, _, figures in columns)] for each in MEASURES]
    names = ["median (worst)", *(f"{way} {step}".strip() for way, step, _ in columns)]
    print_table("comparison", names, rows, right=frozenset(range(1, len(names))))
    for way in document["ways"]:
        print(f"{way['way']}: {', '.join(text for text, _ in verdicts_of(way))}")


def _ways(text: str) -> list[Way]:
    try:
        return list(dict.fromkeys(Way(word.strip()) for word in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"of {', '.join(Way)}, separated by commas") from None


# The probes are not there before one is asked for: what they need of HTTP takes 30 ms to import.


def _command(text: str) -> Probe:
    from dynacut.jobs.compare.probes import CommandProbe

    return CommandProbe(text)


def _redis(text: str) -> Probe:
    from dynacut.jobs.compare.probes import RedisProbe, endpoint

    return RedisProbe(*endpoint(text))


def _http(text: str) -> Probe:
    from dynacut.jobs.compare.probes import http_probe

    return http_probe(text)


def _tcp(text: str) -> Probe:
    from dynacut.jobs.compare.probes import TcpProbe, endpoint

    return TcpProbe(*endpoint(text))
