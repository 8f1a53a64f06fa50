"""dynacut trim: start-up code removed from a service, the whole way in one command."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacut.cli.arguments import (
    add_output_options,
    command_behind_dashes,
    count,
    pause,
    seconds,
    tcp_port,
    wrong_usage,
)
from dynacut.cli.console import print_json, warn
from dynacut.cli.steps import Steps
from dynacut.handlers.table import Action
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.on_hit import SYNTAX as ON_HIT_SYNTAX
from dynacut.shared.on_hit import OnHit
from dynacut.shared.plan import Scope

if TYPE_CHECKING:
    from dynacut.jobs.trim.state import State
    from dynacut.jobs.trim.steps import Trim

HELP = "remove start-up code from a service: trace, learn, remove, in one go"
USAGE = ("dynacut trim -o DIR [PHASES] [WHAT] (-- CMD … | --pid P --init F …)",)
DESCRIPTION = (
    "Remove what a service executes at start-up only. An instance is traced from its first instruction to its end, "
    "under the workload; another is checkpointed, restored with its start-up code as `learn`, put to work until "
    "nothing more is learned, checkpointed again, and restored with the rest removed. What is needed later after all "
    "puts itself back; with --on-hit terminate it ends the service. DIR keeps every step; the same command again goes "
    "on where it was interrupted."
)
EPILOG = """examples:
  dynacut trim -o redis-trim/ --ready-port 6379 --workload 'redis-benchmark -q' \\
      --serve 'redis-cli bgsave' -- redis-server redis.conf
  dynacut trim -o nginx-trim/ --ready-port 80 --workload ./requests.sh --serve 'kill -HUP $DYNACUT_PID; sleep 1' \\
      -- nginx -g 'daemon off;'
  dynacut trim -o trim/ --live --pid 4711 --init start.drcov --workload ./requests.sh
"""
_BY_CHECKPOINT = ("trace", "plan", "checkpoint", "learn", "remove", "check")
_LIVE = ("trace", "plan", "live")
_TOLD = ("init_blocks", "serving_blocks", "blocks", "passes", "learned", "standing", "sites", "processes", "hits")
_TITLES = {
    "trace": "which blocks run at start-up, and which later",
    "plan": "start-up code: init minus all later phases",
    "checkpoint": "an untouched instance, put aside",
    "learn": "start-up code to be learned from, restored, put to work, put aside",
    "remove": "what was not learned goes, in the image",
    "check": "restored for good, the workload once more",
    "live": "learned from, then removed, in the running process",
}


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("-o", dest="directory", type=Path, required=True, metavar="DIR", help="keeps everything")
    parser.add_argument("--pid", type=int, metavar="P", help="a service that runs already; needs --init")
    parser.add_argument("--live", action="store_true", help="change the running process, without a checkpoint")
    phases = parser.add_argument_group("phases")
    phases.add_argument("--ready-port", type=tcp_port, metavar="N", help="start-up ends when TCP port N answers")
    phases.add_argument("--ready-log", metavar="REGEX", help="… when the program's output has such a line")
    phases.add_argument("--workload", action="append", metavar="CMD", help="shell command; must succeed (repeatable)")
    phases.add_argument("--serve", action="append", default=[], metavar="CMD", help="of other phases, such as a reload")
    phases.add_argument(
        "--shutdown",
        action="append",
        default=[],
        metavar="CMD",
        help="ends a traced instance; repeatable: each way on an instance of its own (default: SIGTERM)",
    )
    phases.add_argument("--init", nargs="+", type=Path, default=[], metavar="F", help="with --pid: logs of start-up")
    phases.add_argument("--serving", nargs="+", type=Path, default=[], metavar="F", help="coverage of further phases")
    phases.add_argument("--passes", type=count, default=30, metavar="N", help="of the workload at most (default: 30)")
    phases.add_argument(
        "--quiet-passes", type=count, default=3, metavar="N", help="that bring nothing new (default: 3)"
    )
    phases.add_argument("--idle", type=pause, default=1.0, metavar="S", help="wait after each pass (default: 1)")
    phases.add_argument(
        "--linger",
        type=pause,
        default=12.0,
        metavar="S",
        help="then leave the service to its timers for S seconds (default: 12)",
    )
    phases.add_argument(
        "--learn-for", type=pause, default=0.0, metavar="S", help="learn for S seconds at least, workload and all"
    )
    phases.add_argument("--timeout", type=seconds, default=300.0, metavar="S", help="for each command (default: 300)")
    what = parser.add_argument_group("what to remove, and how")
    what.add_argument("--module", action="append", default=[], metavar="M", help="of this (default: the executable)")
    what.add_argument("--on-hit", default="learn", metavar="ACTION", help=f"{ON_HIT_SYNTAX} (default: learn)")
    what.add_argument("--scope", choices=[str(scope) for scope in Scope], default="block", help="(default: block)")
    parser.add_argument("--criu", type=Path, metavar="PATH", help="the CRIU to use")
    parser.add_argument("--end", action="store_true", help="end the trimmed service when the report is made")
    add_output_options(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD …", help="the service, in the foreground")


def run(arguments: argparse.Namespace) -> ExitStatus:
    """Does every step that is not done yet, then reports."""
    command = command_behind_dashes(arguments)
    _check_usage(arguments, command)
    from dynacut.cli.trim.report import print_report, write_report
    from dynacut.jobs.trim.state import State
    from dynacut.offline.processes import become_subreaper, require_root

    require_root("a trim")
    become_subreaper()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends, or puts back, the service as Ctrl-C does
    state = State(arguments.directory, _request(arguments, command))
    names = _LIVE if arguments.live else _BY_CHECKPOINT
    if state.details(names[-1]) is None:
        # The instance of a trim that was killed would be in the way of the next one's.
        end_recorded(state, ", of the trim that was interrupted, is ended")
    with Steps(shown=not arguments.quiet) as steps:
        trim = _trim(arguments, command, state, steps.tell)
        _do(trim, names, steps, quiet=arguments.quiet)
        steps.tell("drawing the report")
        report = write_report(trim, names)
    if arguments.end:
        end_recorded(state)
    if arguments.json:
        print_json(report)
    elif not arguments.quiet:
        print_report(report, ended=arguments.end)
    return ExitStatus.DONE


def _check_usage(arguments: argparse.Namespace, command: list[str]) -> None:
    if (arguments.pid is None) == (not command):
        raise wrong_usage("trim", "give the service: either -- CMD or --pid P")
    if not arguments.workload:
        raise wrong_usage("trim", "--workload is missing: what is not in it, or in --serve, may be removed")
    if OnHit.parse(arguments.on_hit).action is Action.LEARN and arguments.scope == Scope.PAGE:
        raise DynacutError(
            "--scope page unmaps pages, which cannot come back when they are needed after all",
            "add --on-hit terminate if that is to end the service, or take --scope block",
            status=ExitStatus.USAGE,
        )
    if arguments.pid is not None:
        if not arguments.init:
            raise DynacutError(
                "the start-up of a process that runs has passed: which blocks it executed is not known",
                "give it by --init F, from `dynacut trace -o F --ready-port N -- CMD`; or let trim start it: -- CMD",
                status=ExitStatus.USAGE,
            )
        if arguments.ready_port is not None or arguments.ready_log is not None or arguments.shutdown:
            raise wrong_usage("trim", "--ready-port, --ready-log and --shutdown belong to -- CMD")
        if arguments.end:
            raise wrong_usage("trim", "--end belongs to -- CMD: a service that ran before is not ended")
    elif arguments.init:
        raise wrong_usage("trim", "--init belongs to --pid: with -- CMD start-up is traced")
    elif arguments.ready_port is None and arguments.ready_log is None:
        raise wrong_usage("trim", "when does start-up end? give --ready-port N or --ready-log REGEX")


def _request(arguments: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """What a directory's steps depend on."""
    names = ("pid", "live", "ready_port", "ready_log", "workload", "serve", "shutdown", "module", "on_hit", "scope")
    logs = {name: [str(path.absolute()) for path in getattr(arguments, name)] for name in ("init", "serving")}
    return {"command": command, **{name: getattr(arguments, name) for name in names}, **logs}


def end_recorded(state: State, warning: str = "") -> None:
    """Ends the instance that the state tells of, but no later process of the same pid."""
    from dynacut.offline.processes import end_tree, start_time

    if (process := state.process) is not None:
        pid, started = process
        if start_time(pid) == started:
            if warning:
                warn(f"process {pid}{warning}")
            end_tree(pid)
        state.process = None


def _trim(arguments: argparse.Namespace, command: list[str], state: State, tell: Callable[[str], None]) -> Trim:
    from dynacut.jobs.trim.instance import Instance
    from dynacut.jobs.trim.rounds import Patience
    from dynacut.jobs.trim.service import Service
    from dynacut.jobs.trim.steps import Trim
    from dynacut.jobs.trim.tracer import PhaseTracer

    service = Service(
        tuple(command),
        arguments.directory.absolute(),
        tuple(arguments.workload),
        tuple(arguments.serve),
        tuple(arguments.shutdown) or (None,),
        arguments.ready_port,
        arguments.ready_log,
        arguments.timeout,
    )
    instance = Instance(service, state, tell, arguments.pid, arguments.criu)
    patience = Patience(arguments.passes, arguments.quiet_passes, arguments.linger)
    return Trim(
        instance,
        PhaseTracer(instance, tuple(arguments.module), arguments.idle, patience),
        tuple(arguments.init),
        tuple(arguments.serving),
        arguments.learn_for,
        OnHit.parse(arguments.on_hit),
        Scope(arguments.scope),
        warn,
    )


def _do(trim: Trim, names: Sequence[str], steps: Steps, *, quiet: bool) -> None:
    """Does the steps that are not done. If one fails, the service is left as it was before."""
    for number, name in enumerate(names, 1):
        try:
            _step(trim, name, f"{number}/{len(names)} {name}", steps, quiet=quiet)
        except KeyboardInterrupt:
            trim.instance.fall_back()
            left = "has ended" if trim.instance.given is None else "runs as before"
            following = next(name for name in names if trim.instance.state.details(name) is None)
            raise DynacutError(
                f"interrupted; the service {left}", f"the same command again goes on with step {following}"
            ) from None
        except BaseException:
            trim.instance.fall_back()
            raise


def _step(trim: Trim, name: str, title: str, steps: Steps, *, quiet: bool) -> None:
    """Does a step, unless it is done."""
    state = trim.instance.state
    said = state.details(name)
    if said is None:
        trim.tracer.tell(title)
        began = time.perf_counter()
        said = getattr(trim, name)()
        said = {**said, "seconds": round(time.perf_counter() - began, 1)}
        state.finish(name, said)
        suffix = f"{said['seconds']} s"
    else:
        suffix = "done before"
    if quiet:
        return
    numbers = [f"{key.replace('_', ' ')} {said[key]:,}" for key in _TOLD if key in said]
    text = f"{title}: {_TITLES[name]} ({', '.join([*numbers, suffix])})"
    steps.say(text)
