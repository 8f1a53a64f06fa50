"""The command line: usage, errors and exit statuses, tables and JSON; nothing here touches a process but to look."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynacut.cli import console
from dynacut.cli.main import main
from dynacut.live import change as change_module
from dynacut.live.change import Outcome
from dynacut.live.ptrace.stop_clock import StopClock
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.plan import Scope
from dynacut.shared.report import FeatureReport, Foreign, Inspection, SiteReport
from dynacut.shared.target import Module

Capture = pytest.CaptureFixture[str]
PLAN = 'format = 1\n[[feature]]\nname = "set"\nsites = [{ at = "x+0x10" }]\n'


def ends(*arguments: str) -> int:
    """The exit status of a command, also where argparse ends it."""
    try:
        return main(arguments)
    except SystemExit as exit_:
        assert isinstance(exit_.code, int)
        return exit_.code


def errors(capsys: Capture) -> list[str]:
    """The lines on stderr; stdout must be empty, and there must be no traceback."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err.splitlines()


# Usage.


def test_help_names_commands_and_exit_statuses(capsys: Capture) -> None:
    assert ends("--help") == 0
    text = capsys.readouterr().out
    assert "live" in text and "exit status: 0 done; 1 refused" in text


def test_help_of_live_names_every_option_with_examples(capsys: Capture) -> None:
    assert ends("live", "--help") == 0
    text = capsys.readouterr().out
    options = ("pid", "name", "tree", "plan", "feature", "disable", "on-hit", "as", "enable", "undo", "scope")
    for option in (*options, "dry-run", "json", "timeout", "verbose", "quiet"):
        assert f"--{option}" in text
    assert "dynacut live --pid 4711 --undo" in text
    for action in ("terminate=CODE", "redirect=SITE", "return=VALUE", "skip=N", "learn"):
        assert action in text


def test_the_version_is_shown(capsys: Capture) -> None:
    assert ends("--version") == 0
    assert capsys.readouterr().out.startswith("dynacut ")


def test_the_command_runs_as_a_module_too() -> None:
    done = subprocess.run([sys.executable, "-m", "dynacut.cli.main", "live", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["live", "--pid"],
        ["live", "--pid", "x"],
        ["live", "--pid", "1", "--name", "x"],
        ["live", "--pid", "1", "--timeout", "0"],
        ["live", "--pid", "1", "--timeout", "nan"],
        ["live", "--pid", "1", "--timeout", "inf"],
        ["live", "--pid", "1", "--timeout", "x"],
        ["live", "--pid", "1", "--scope", "all"],
        ["live", "--pid", "1", "--disable"],
        ["live", "--pid", "1", "--nothing"],
    ],
)
def test_wrong_usage_is_exit_status_2(arguments: list[str], capsys: Capture) -> None:
    assert ends(*arguments) == 2
    lines = errors(capsys)
    if arguments:
        assert len(lines) == 2 and all(line.startswith("dynacut: ") for line in lines)
        assert lines[1] == f"dynacut: see dynacut{' live' if arguments[0] == 'live' else ''} --help"
    else:
        assert lines[0].startswith("usage: ") and any("switch features" in line for line in lines)


def test_live_without_a_target_says_how_to_name_one(capsys: Capture) -> None:
    assert ends("live") == 2
    assert "--pid P, --name N or --remote" in errors(capsys)[-1]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--undo", "--enable", "x"], "--enable and --undo exclude each other"),
        (["--undo", "--disable", "x"], "--disable and --undo exclude each other"),
        (["--plan", "x", "--undo"], "--plan and --undo exclude each other"),
        (["--plan", "x", "--disable", "y", "--enable", "z"], "--plan and --disable and --enable exclude each other"),
        (["--feature", "x"], "--feature chooses among the features of a plan"),
        (["--disable", "x", "--feature", "x"], "--feature chooses among the features of a plan"),
        (["--on-hit", "learn"], "--on-hit and --as belong to --disable"),
        (["--enable", "x", "--as", "y"], "--on-hit and --as belong to --disable"),
        (["--dry-run"], "--dry-run without a change"),
        (["--disable", "x", "--on-hit", "die"], "'die' is no action for a hit"),
        (["--disable", "x", "--on-hit", "terminate=256"], "not a number from 0 to 255"),
        (["--disable", "x", "--as", "a\nb"], "a feature's name is"),
        (["--disable", "x" * 64], "a feature's name is"),
    ],
)
def test_options_that_contradict_each_other_are_exit_status_2(
    options: list[str], problem: str, capsys: Capture
) -> None:
    assert ends("live", "--pid", str(os.getpid()), *options) == 2
    lines = errors(capsys)
    assert len(lines) == 2, "one line saying what is wrong, and one what to do"
    assert problem in lines[0]
    assert all(line.startswith("dynacut: ") for line in lines)


# Refusals.


def test_a_plan_that_is_not_there_is_exit_status_1(tmp_path: Path, capsys: Capture) -> None:
    assert ends("live", "--pid", str(os.getpid()), "--plan", str(tmp_path / "none.toml")) == 1
    lines = errors(capsys)
    assert len(lines) == 2 and "none.toml cannot be read: No such file" in lines[0]


def test_each_problem_of_a_plan_is_a_line(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN + 'on_hit = "die"\nscope = "all"')
    assert ends("live", "--pid", str(os.getpid()), "--plan", str(path)) == 1
    lines = errors(capsys)
    assert lines[0] == f"dynacut: {path}: not a plan"
    assert [line[:4] for line in lines[1:3]] == ["  - ", "  - "]
    assert lines[3].startswith("dynacut: plans are described")


@pytest.mark.parametrize("pid", ["0", "-1", str(1 << 22), "9" * 30])
def test_a_process_that_is_not_there_is_exit_status_1(pid: str, capsys: Capture) -> None:
    assert ends("live", "--pid", pid) == 1
    assert 1 <= len(errors(capsys)) <= 2


def test_a_name_that_no_process_has_is_exit_status_1(capsys: Capture) -> None:
    assert ends("live", "--name", "no-such-process-4711") == 1
    assert "no-such-process-4711" in errors(capsys)[0]


def test_the_traceback_is_shown_on_demand(tmp_path: Path, capsys: Capture) -> None:
    assert ends("live", "-vv", "--pid", str(os.getpid()), "--plan", str(tmp_path / "none.toml")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback ") and "none.toml cannot be read" in lines[-2]


def failure(status: ExitStatus) -> Callable[..., Outcome]:
    def fail(*_: object, **__: object) -> Outcome:
        raise DynacutError("it went wrong", "do this", status=status, details=["one", "two"])

    return fail


@pytest.mark.parametrize("status", list(ExitStatus)[1:])
def test_the_status_of_an_error_is_the_exit_status(
    status: ExitStatus, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(change_module, "change", failure(status))
    assert ends("live", "--pid", "1", "--undo") == status
    assert errors(capsys) == ["dynacut: it went wrong", "  - one", "  - two", "dynacut: do this"]


@pytest.mark.parametrize("status", list(ExitStatus)[1:])
def test_an_error_is_a_json_document_too(status: ExitStatus, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(change_module, "change", failure(status))
    assert ends("live", "--pid", "1", "--undo", "--json") == status
    captured = capsys.readouterr()
    error = {"problem": "it went wrong", "details": ["one", "two"], "advice": "do this", "status": status}
    assert json.loads(captured.out) == {"schema": 1, "error": error}
    assert captured.err.splitlines() == ["dynacut: it went wrong", "  - one", "  - two", "dynacut: do this"]


@pytest.mark.parametrize(
    "words",
    [["live", "--json", "--nothing"], ["live", "--json"], ["nothing", "--json"], ["doctor", "--json", "superfluous"]],
)
def test_wrong_usage_is_a_json_document_too(words: list[str], capsys: Capture) -> None:
    assert ends(*words) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["status"] == 2 and error["problem"] and error["advice"]


def test_the_json_of_a_traced_program_is_its_own(capsys: Capture) -> None:
    """What stands behind -- asks nothing of dynacut."""
    assert ends("trace", "--", "program", "--json") == 2
    assert len(errors(capsys)) == 2


def test_an_interruption_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupt(*_: object, **__: object) -> Outcome:
        raise KeyboardInterrupt

    monkeypatch.setattr(change_module, "change", interrupt)
    assert ends("live", "--pid", "1", "--undo") == ExitStatus.UNKNOWN
    assert len(errors(capsys)) == 1
    assert ends("live", "--pid", "1", "--undo", "--json") == ExitStatus.UNKNOWN
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["problem"], error["status"]) == ("interrupted", ExitStatus.UNKNOWN) and "dynacut live" in error[
        "advice"
    ]


def test_a_reader_that_goes_away_is_no_error() -> None:
    """As with `dynacut live --pid P | head -0`."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "dynacut.cli.main", "live", "--pid", str(os.getpid())]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert "Traceback" not in done.stderr and "BrokenPipeError" not in done.stderr
    assert done.returncode == 0


# What is printed.


def outcome(*features: FeatureReport, pids: tuple[int, ...] = (4711,), changed: bool = True) -> Outcome:
    module = Module(
        "server", frozenset({"server"}), "/srv/server", Path("/srv/server"), Path("/"), 0x1000, 0x3000, True, ()
    )
    foreign = Foreign("server+0x20", 1, b"\xcc", b"\x55")
    clock = StopClock()
    clock.add(12_345)
    clock.add(50_000)
    processes = [
        Inspection(pid, "/srv/server", (module,), features, (foreign,), ("watch out", "watch out")) for pid in pids
    ]
    return Outcome(processes, edits=2, changed=changed, clock=clock, skipped=["process 5 (other) runs /bin/other"])


@pytest.fixture
def shows(monkeypatch: pytest.MonkeyPatch) -> Callable[[Outcome], None]:
    """Looking and changing give an outcome, and touch nothing."""

    def show(given: Outcome) -> None:
        monkeypatch.setattr(change_module, "look", lambda *_, **__: given)
        monkeypatch.setattr(change_module, "change", lambda *_, **__: given)

    return show


@pytest.mark.parametrize("options", [["--on-hit", ""], ["--as", ""]])
def test_an_empty_option_is_not_taken_for_none(
    options: list[str], shows: Callable[[Outcome], None], capsys: Capture
) -> None:
    """An unset variable of a script: `--on-hit "$ACTION"` must not become terminate."""
    shows(outcome(SET))
    assert ends("live", "--pid", "4711", "--disable", "x", *options) == 2
    assert len(errors(capsys)) == 2


@pytest.mark.parametrize("options", [["--scope", "block"], ["--scope", "block", "--undo"]])
def test_a_scope_with_nothing_to_disable_is_wrong_usage(
    options: list[str], shows: Callable[[Outcome], None], capsys: Capture
) -> None:
    shows(outcome(SET))
    assert ends("live", "--pid", "4711", *options) == 2, "it is accepted and does nothing"
    assert len(errors(capsys)) == 2


def site(patched: bool = True, hits: int = 3) -> SiteReport:
    return SiteReport("server+0x10", 0x1010, 1, "redirect=server+0x40", hits, patched)


SET = FeatureReport("set", (site(), site(hits=4)))
GET = FeatureReport("[bold]get", (site(patched=False, hits=0),))


def document(capsys: Capture) -> dict[str, Any]:
    captured = capsys.readouterr()
    loaded = json.loads(captured.out)
    assert isinstance(loaded, dict)
    return loaded


def test_json_has_the_documented_shape(shows: Callable[[Outcome], None], capsys: Capture) -> None:
    shows(outcome(SET, GET))
    assert ends("live", "--pid", "4711", "--undo", "--json") == 0
    found = document(capsys)
    assert found["schema"] == 1
    assert found["target"] == {"pid": 4711, "exe": "/srv/server"}
    assert found["features"] == [
        {"name": "set", "state": "disabled", "sites": 2, "patched": 2, "hits": 7},
        {"name": "[bold]get", "state": "enabled", "sites": 1, "patched": 0, "hits": 0},
    ]
    assert found["changed"] is True
    assert (found["stopped_us"], found["longest_stop_us"]) == (62.3, 50.0)
    assert found["wall_ms"] >= 0
    assert found["modules"] == [{"name": "server", "path": "/srv/server", "base": "0x1000"}]
    assert found["foreign"] == [{"pid": 4711, "at": "server+0x20", "size": 1, "found": "cc", "original": "55"}]
    assert found["warnings"] == ["watch out", "watch out"]
    assert "edits" not in found and "processes" not in found


def test_json_of_a_dry_run_tells_the_edits(shows: Callable[[Outcome], None], capsys: Capture) -> None:
    shows(outcome(SET, changed=False))
    assert ends("live", "--pid", "4711", "--undo", "--json", "--dry-run", "-v") == 0
    found = document(capsys)
    assert (found["edits"], found["changed"]) == (2, False)
    assert [site["at"] for site in found["features"][0]["site_list"]] == ["server+0x10"] * 2


def test_json_of_a_tree_adds_up_hits_and_lists_processes(shows: Callable[[Outcome], None], capsys: Capture) -> None:
    given = outcome(SET, GET, pids=(4711, 4712))
    given.processes[0] = outcome(FeatureReport("set", (site(patched=False),))).processes[0]
    shows(given)
    assert ends("live", "--pid", "4711", "--tree", "--json") == 0
    found = document(capsys)
    by_name = {feature["name"]: feature for feature in found["features"]}
    assert (by_name["set"]["hits"], by_name["set"]["state"], by_name["set"]["patched"]) == (10, "disabled", 2)
    assert by_name["[bold]get"]["state"] == "enabled"
    assert [process["pid"] for process in found["processes"]] == [4711, 4712]


def test_json_is_one_line_when_nobody_reads_along(shows: Callable[[Outcome], None], capsys: Capture) -> None:
    shows(outcome(SET))
    ends("live", "--pid", "4711", "--json")
    assert capsys.readouterr().out.count("\n") == 1


def test_warnings_go_to_stderr_once_each(shows: Callable[[Outcome], None], capsys: Capture) -> None:
    shows(outcome(SET, pids=(4711, 4712)))
    ends("live", "--pid", "4711", "--quiet")
    assert errors(capsys) == [
        "dynacut: warning: watch out",
        "dynacut: warning: left alone: process 5 (other) runs /bin/other",
    ]


def test_tables_are_tab_separated_off_a_terminal(shows: Callable[[Outcome], None], capsys: Capture) -> None:
    shows(outcome(SET, GET))
    ends("live", "--pid", "4711", "-v")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "process 4711: /srv/server"
    assert "FEATURE\tSTATE\tSITES\tHITS" in lines
    assert "set\tdisabled\t2/2\t7" in lines
    assert "[bold]get\tenabled\t0/1\t0" in lines
    assert "set\tserver+0x10\t1\tredirect=server+0x40\tpatched\t3" in lines
    assert "4711\tserver+0x20\t1\t55\tcc" in lines


def test_modules_are_listed_on_demand(shows: Callable[[Outcome], None], capsys: Capture) -> None:
    shows(outcome(SET))
    ends("live", "--pid", "4711")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "process 4711: /srv/server, 1 module (-v lists them)"
    assert "MODULE\tBASE\tPATH" not in lines
    ends("live", "--pid", "4711", "-v")
    assert "server\t0x1000\t/srv/server" in capsys.readouterr().out.splitlines()


def test_many_processes_are_added_up(shows: Callable[[Outcome], None], capsys: Capture) -> None:
    given = outcome(SET, GET, pids=(4711, 4712, 4713))
    given.processes[1] = outcome(FeatureReport("set", (site(patched=False),)), pids=(4712,)).processes[0]
    shows(given)
    ends("live", "--pid", "4711", "--tree")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("process 4711 and 2 more: /srv/server")
    assert "FEATURE\tSTATE\tPROCESSES\tSITES\tHITS" in lines
    assert "set\tdisabled\t2/3\t4/5\t17" in lines
    assert "[bold]get\tenabled\t0/3\t0/2\t0" in lines
    ends("live", "--pid", "4711", "--tree", "-v")
    lines = capsys.readouterr().out.splitlines()
    assert "4712\tset\tenabled\t0/1\t3" in lines and "4713\tset\tdisabled\t2/2\t7" in lines


def test_a_change_is_told_in_one_line(shows: Callable[[Outcome], None], capsys: Capture) -> None:
    shows(outcome(SET))
    ends("live", "--pid", "4711", "--undo")
    told = capsys.readouterr().out.splitlines()[0]
    assert told.startswith("process 4711: ") and "2 places changed" in told and "62 µs in all" in told
    shows(outcome(SET, changed=False))
    ends("live", "--pid", "4711", "--undo")
    assert capsys.readouterr().out.startswith("process 4711: nothing to change\n")
    ends("live", "--pid", "4711", "--undo", "--dry-run")
    assert "2 places would be changed; everything fits, nothing was touched" in capsys.readouterr().out


def test_quiet_prints_nothing(shows: Callable[[Outcome], None], capsys: Capture) -> None:
    shows(outcome(SET))
    ends("live", "--pid", "4711", "--undo", "-q")
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch, title: str, columns: list[str], rows: list[list[str]]) -> str:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    console.print_table(title, columns, rows, right=frozenset({1}))
    return terminal.getvalue()


def test_a_terminal_gets_a_table_with_title(monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_terminal(monkeypatch, "features", ["feature", "hits"], [["[bold]set", "7"], ["get", "12345"]])
    assert "features" in text and "[bold]set" in text
    lines = text.splitlines()
    (short,) = [line for line in lines if "set" in line]
    (long,) = [line for line in lines if "get" in line]
    assert short.rstrip().endswith("    7") and long.rstrip().endswith("12345")
    assert len(short.rstrip()) == len(long.rstrip())


def test_a_hostile_path_does_not_reach_the_terminal_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in a container may be called anything; /proc/PID/maps escapes line breaks only."""
    text = on_terminal(monkeypatch, "modules", ["path"], [["/tmp/\x1b]0;owned\x07\x1b[2Jx"]])
    assert "\x1b]" not in text and "\x1b[2J" not in text and "\x07" not in text


def test_a_path_that_is_not_utf_8_can_be_printed(capsys: Capture) -> None:
    console.print_table("modules", ["path"], [[os.fsdecode(b"/tmp/\xff")]])
    assert "/tmp/" in capsys.readouterr().out


def test_an_error_with_control_characters_is_one_line(capsys: Capture) -> None:
    """comm and paths of the target get into labels."""
    console.print_error(DynacutError("process 5 (a\x1b[2J\nb) is gone"))
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "\x1b" not in captured.err


def test_a_report_can_be_printed_in_any_encoding(
    shows: Callable[[Outcome], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old locale, in a terminal or a cron job, has no µ."""
    shows(outcome(SET))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert ends("live", "--pid", "4711", "--undo") == 0
    sys.stdout.flush()
    assert b"62 ?s in all" in written.getvalue()


def test_every_scope_can_be_asked_for(capsys: Capture) -> None:
    ends("live", "--help")
    text = capsys.readouterr().out
    assert all(str(scope) in text for scope in Scope)


# What nobody has foreseen.


def test_a_report_that_cannot_be_written_is_no_refusal() -> None:
    """Exit status 1 would say that nothing was touched."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dynacut.cli.main", "live", "--pid", str(os.getpid())],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == ExitStatus.UNKNOWN
    assert "No space left" in done.stderr
    assert len(done.stderr.splitlines()) == 2, done.stderr


def test_without_stdout() -> None:
    command = f"exec {sys.executable} -m dynacut.cli.main live --pid {os.getpid()} >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_bug_is_told_in_two_lines(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(change_module, "look", broken)
    assert ends("live", "--pid", str(os.getpid())) == ExitStatus.UNKNOWN
    first, second = errors(capsys)
    assert "KeyError" in first and "-vv" in second
