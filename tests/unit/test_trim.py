"""The parts of `dynacut trim` that need no process: its state, its report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dynacut.cli.trim.command import end_recorded
from dynacut.jobs.trim.outcome import (
    ROUND_COLUMNS,
    Amount,
    change_rows,
    code_rows,
    module_reports,
    round_rows,
    rounds_of,
    summary_of,
)
from dynacut.jobs.trim.service import Service
from dynacut.jobs.trim.state import State
from dynacut.offline.processes import become_subreaper, end_tree, start_time
from dynacut.shared.coverage.coverage import Coverage
from dynacut.shared.coverage.startup import StartupCode
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.on_hit import OnHit
from dynacut.shared.plan import Plan, PlannedFeature, PlannedModule, PlannedSite, Scope

REQUEST: dict[str, Any] = {"command": ["server", "--port", "1"], "workload": ["true"], "pid": None}


def test_a_state_remembers_what_is_done(tmp_path: Path) -> None:
    state = State(tmp_path / "trim", REQUEST)
    assert (tmp_path / "trim").stat().st_mode & 0o777 == 0o700
    assert state.details("trace") is None
    state.finish("trace", {"blocks": 7})
    state.process = (4711, 99)
    again = State(tmp_path / "trim", REQUEST)
    assert again.details("trace") == {"blocks": 7}
    assert again.process == (4711, 99)
    state.note("memory", {"rss": 4})
    state.finish("plan", {})
    state.forget("trace", "check")
    latest = State(tmp_path / "trim", REQUEST)
    assert latest.noted("memory") == {"rss": 4}
    assert latest.noted("other") is None
    assert (latest.details("trace"), latest.details("plan")) == (None, {})
    again.process = None
    assert State(tmp_path / "trim", REQUEST).process is None


def test_only_the_instance_itself_is_ended_not_who_got_its_pid_later(tmp_path: Path) -> None:
    state = State(tmp_path / "trim", REQUEST)
    with subprocess.Popen(["sleep", "1000"]) as child:
        started = start_time(child.pid)
        assert started is not None
        state.process = (child.pid, started - 1)
        end_recorded(state)
        assert child.poll() is None
        state.process = (child.pid, started)
        end_recorded(state)
        assert State(tmp_path / "trim", REQUEST).process is None
        child.wait(timeout=10)


_MASTER = """
import os, time
while True:
    worker = os.fork()
    if not worker:
        time.sleep(1000)
    print(worker, flush=True)
    os.wait()
"""


def test_a_master_that_replaces_its_workers_is_ended_with_all_of_them() -> None:
    with subprocess.Popen([sys.executable, "-c", _MASTER], stdout=subprocess.PIPE, text=True) as master:
        assert master.stdout is not None
        first = int(master.stdout.readline())
        os.kill(first, signal.SIGKILL)
        second = int(master.stdout.readline())
        become_subreaper()
        assert end_tree(master.pid) == []
        assert start_time(second) is None
        assert master.stdout.read() == "", "no third one"


def test_a_directory_serves_one_request(tmp_path: Path) -> None:
    State(tmp_path / "trim", REQUEST)
    with pytest.raises(DynacutError, match="another command or other options") as caught:
        State(tmp_path / "trim", {**REQUEST, "workload": ["false"]})
    assert caught.value.status is ExitStatus.USAGE


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 1}', "null", "\xff"])
def test_a_damaged_state_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(text, "latin-1")
    with pytest.raises(DynacutError, match="cannot be read"):
        State(tmp_path, REQUEST)


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    with pytest.raises(DynacutError, match="is not empty"):
        State(tmp_path, REQUEST)
    with pytest.raises(DynacutError, match="cannot be made"):
        State(tmp_path / "precious" / "trim", REQUEST)
    with pytest.raises(DynacutError, match="is no directory"):
        State(tmp_path / "precious", REQUEST)
    assert [entry.name for entry in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_directory_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "trim"
    State(directory, REQUEST)
    directory.chmod(mode)
    with pytest.raises(DynacutError, match="can be written by, others, who could choose what is removed"):
        State(directory, REQUEST)
    directory.chmod(0o755)
    State(directory, REQUEST)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trim").mkdir(0o700)
    os.chown(tmp_path / "trim", 12345, 12345)
    with pytest.raises(DynacutError, match="belongs to, or"):
        State(tmp_path / "trim", REQUEST)


def test_logs_are_not_written_through_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("workload.log", "output.log"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(DynacutError, match=r"workload.log cannot be written: .* symbolic links"):
        Service((), tmp_path, ("true",)).work(os.getpid())
    with pytest.raises(DynacutError, match="cannot be executed"):
        Service(("/bin/echo", "over"), tmp_path, (), ready_log="over").start()
    assert victim.read_text() == "precious"


def test_a_wrong_regular_expression_is_told_before_the_program_is_started(tmp_path: Path) -> None:
    service = Service(("/bin/touch", str(tmp_path / "started")), tmp_path, (), ready_log="(")
    with pytest.raises(DynacutError, match="is no regular expression") as caught:
        service.start()
    assert caught.value.status is ExitStatus.USAGE
    assert not (tmp_path / "started").exists()


def test_commands_know_the_process_and_fail_with_their_last_lines(tmp_path: Path) -> None:
    service = Service((), tmp_path, ('test "$DYNACUT_PID" = 1',), ("echo seen; exit 7",))
    with pytest.raises(DynacutError, match="status 7 of: echo seen") as caught:
        service.work(1)
    assert caught.value.status is ExitStatus.CHECK_FAILED
    assert caught.value.details[-1] == "seen"
    assert len((tmp_path / "workload.log").read_text().splitlines()) == 3


def test_a_command_that_does_not_end_is_given_up(tmp_path: Path) -> None:
    service = Service((), tmp_path, ("sleep 60",), timeout=0.1)
    with pytest.raises(DynacutError, match="no end within"):
        service.work(1)


def startup() -> StartupCode:
    """Start-up runs 0x10-0x40, service 0x30-0x60."""
    module = SimpleNamespace(name="server", path="/bin/server")
    code = SimpleNamespace(module=module, elf=SimpleNamespace(build_id="ab"), blocks=None)
    return StartupCode(cast(Any, code), {0x10: 8, 0x20: 16, 0x28: 8, 0x30: 4}, {0x30: 4, 0x50: 16})


def final_plan(*offsets: int) -> Plan:
    sites = tuple(PlannedSite(f"server+{offset:#x}", 8) for offset in offsets)
    feature = PlannedFeature("startup", OnHit.parse("terminate"), Scope.BLOCK, sites)
    return Plan("p", (feature,), (), {"server": PlannedModule("/bin/server", "ab")})


def test_a_report_counts_what_ran_and_what_goes() -> None:
    (report,) = module_reports(
        [startup()], final_plan(0x10, 0x20), Coverage(()), Coverage(()), {"/bin/server": (100, 80)}
    )
    assert report.init == Amount(4, 36)
    assert report.serving == Amount(2, 20)
    assert report.startup == Amount(3, 32)
    assert report.removed == Amount(2, 24)
    assert report.removed_share == pytest.approx(2 / 3)
    document = json.loads(json.dumps(report.as_json()))
    assert document["removed"] == {"blocks": 2, "bytes": 24}
    assert document["gadgets"] == {"before": 100, "after": 80}
    memory = {"rss": 4096, "pss": 2048}
    rows = code_rows([report])
    assert ["removed (66.7%)", "server", "2", "24"] in rows
    process = {"memory_before": memory, "memory_after": memory, "text_pages": 9, "unmapped_pages": 3}
    changes = change_rows([report], process)
    assert ["ROP gadgets", "server", "100", "80"] in changes
    assert ["mapped pages of text", "", "9", "6"] in changes
    assert {len(row) for row in [*rows, *changes]} == {4}


QUIET = {"passes": 3, "seconds": 20.2, "blocks": 0, "last_new_seconds": 0.0, "quiet": True}
TRACED = {"passes": 1200, "seconds": 20.2, "blocks": 5, "last_new_seconds": 7.4, "quiet": False}


def test_a_report_says_how_sure_it_is() -> None:
    rounds = rounds_of({"trace": {"rounds": [TRACED]}, "plan": {}, "live": {"round": QUIET}})
    assert [each["round"] for each in rounds] == ["trace", "learn"]
    assert round_rows(rounds) == [["traced", "1,200", "20", "7 s", "13 s"], ["learned", "3", "20", "none came", "20 s"]]
    assert {len(row) for row in round_rows(rounds)} == {len(ROUND_COLUMNS)}


@pytest.mark.parametrize(
    ("on_hit", "learning", "says"),
    [
        ("learn", QUIET, "put themselves back, and `dynacut live --pid 7 --tree --learned` lists them"),
        ("terminate", QUIET, "does not come back: what no round reached is not known"),
        ("learn", {**TRACED, "blocks": 1, "quiet": True}, "1 block had to come back"),
        ("learn", {**TRACED, "quiet": True}, "5 blocks had to come back, the last 7 s into the 20 s of learning"),
        ("learn", TRACED, "Blocks still came as the learn round ended"),
    ],
)
def test_the_summary_says_what_a_hit_does_and_what_speaks_against_it(
    on_hit: str, learning: dict[str, Any], says: str
) -> None:
    reports = module_reports([startup()], final_plan(0x10, 0x20), Coverage(()), Coverage(()), {})
    steps: dict[str, dict[str, Any]] = {"trace": {"rounds": []}, "checkpoint": {}, "learn": {"round": learning}}
    lines = summary_of(reports, steps, OnHit.parse(on_hit), 7)
    assert lines[0] == "2 of 3 basic blocks that only start-up executes are removed (66.7%)."
    assert any(says in line for line in lines)
    assert lines[-1].startswith("Resident memory is smaller after any restore")
