"""The command line: usage, errors and exit statuses; nothing here touches a process but to look."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dynacut.cli.main import main
from dynacut.live import change as change_module
from dynacut.live.change import Outcome
from dynacut.shared.errors import DynacutError, ExitStatus

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
        ["live", "--pid", "1", "--und"],
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
