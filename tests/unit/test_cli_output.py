"""What commands print: JSON, tables on a terminal and off it, warnings, and what is shown for now."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_cli import Capture, ends, errors

from dynacut.cli import console
from dynacut.cli.steps import Steps
from dynacut.live import change as change_module
from dynacut.live.change import Outcome
from dynacut.live.ptrace.stop_clock import StopClock
from dynacut.shared.errors import DynacutError
from dynacut.shared.plan import Scope
from dynacut.shared.report import FeatureReport, Foreign, Inspection, SiteReport
from dynacut.shared.target import Module


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


def steps_on(terminal: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a terminal of that kind, 40 characters wide, gets of a step and a warning amid it."""
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    with Steps() as steps:
        steps.tell("a step whose name is too long for one line")
        console.warn("look out")
    return stderr.getvalue()


def test_a_step_is_one_line_and_gone_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    step, warning = steps_on("xterm", monkeypatch).removeprefix("\r\x1b[K").split("\r\x1b[K")
    assert step.startswith("a step whose") and len(step) == 39
    assert warning == "dynacut: warning: look out\n"


def test_a_terminal_that_cannot_take_back_a_line_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert steps_on("dumb", monkeypatch) == "dynacut: warning: look out\n"


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
