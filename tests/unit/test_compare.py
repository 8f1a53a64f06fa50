"""dynacut compare without a server of others: its options, its document and its page."""

from __future__ import annotations

import argparse
import json
import mmap
import os
from pathlib import Path
from typing import Any

import pytest
from html_elements import Elements

from dynacut.cli.compare import command
from dynacut.cli.compare.document import MEASURES, cell, document_of, rows_of, verdicts_of
from dynacut.cli.compare.page import page_of
from dynacut.cli.main import main
from dynacut.cli.quantities import shown
from dynacut.jobs.compare.prober import Seen
from dynacut.jobs.compare.results import Facts, Measured, Observed, Results
from dynacut.jobs.compare.target import memory_of
from dynacut.jobs.compare.ways import Run, Settings, Step, Way, why_not

PLAN = 'format = 1\n[[feature]]\nname = "set"\nsites = [{ at = "x+0x10" }]\n'
# Options.


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--pid", "1", "--", "true"),
        ("--pid", "1", "--repeat", "0"),
        ("--pid", "1", "--ways", "live,magic"),
        ("--pid", "1", "--probe-redis", "host"),
        ("--pid", "1", "--probe-tcp", "70000"),
        ("--pid", "1", "--probe-http", "ftp://x/"),
        ("--pid", "1", "--probe-tcp", "80", "--probe", "true"),
    ],
)
def test_wrong_usage_is_said(arguments: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN)
    try:
        status = main(["compare", "--plan", str(plan), *arguments])
    except SystemExit as exit_:
        assert isinstance(exit_.code, int)
        status = exit_.code
    assert status == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_plan_that_cannot_be_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--plan", str(tmp_path / "none.toml"), "--", "true"]) == 1
    assert "none.toml cannot be read" in capsys.readouterr().err


def test_ways_are_taken_once_each() -> None:
    parser = argparse.ArgumentParser()
    command.prepare_parser(parser)
    arguments = parser.parse_args(["--plan", "p", "--ways", "checkpoint,live,checkpoint", "--", "a", "--pid", "3"])
    assert arguments.ways == [Way.CHECKPOINT, Way.LIVE]
    assert arguments.pid is None
    assert arguments.command == ["--", "a", "--pid", "3"]


def test_a_way_without_its_tools_is_left_out_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert why_not(Way.LIVE, None) == ""
    assert "gdb" in why_not(Way.GDB, None)
    assert why_not(Way.CHECKPOINT, tmp_path / "criu") != ""


# Memory.


def test_memory_that_is_touched_shows() -> None:
    before = memory_of([os.getpid()])
    size = 8 << 20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as data:  # not what was freed before
        for page in range(0, size, mmap.PAGESIZE):
            data[page] = 1
        added = memory_of([os.getpid()]).since(before)
    assert added["anonymous"] >= size
    assert added["virtual"] >= size
    assert added["copied"] < 1 << 20


# Document and page.


def results(*, failed: int = 0, name: str = "redis-server") -> Results:
    seen = Seen(1500.0, 1000, 0, 0, 1.0, answered=True)
    fresh = Seen(2000.0, 100, failed, 0, 2.0, answered=True)
    observed = Observed(seen, fresh, seen)
    memory = {"anonymous": 4096, "pss": 4096, "virtual": 1 << 20, "copied": 8192}
    found = Results(steps={way: {step: [] for step in Step} for way in Way})
    for way in (Way.LIVE, Way.CHECKPOINT):
        for step in Step:
            for wall_ms in (100.0, 300.0, 200.0):
                parts = {"dump_ms": 60.0, "rewrite_ms": 2.0, "restore_ms": 70.0}
                of_live = {"stopped_us": 9, "longest_stop_us": 5.0}
                report = {"stopped_us": 123.4, **parts} if way is Way.CHECKPOINT else of_live
                found.steps[way][step].append(Measured(observed, Run(0, report, (), wall_ms), memory, 0))
        found.same_text[way] = found.same_tables[way] = found.undone[way] = True
    found.quiet = [observed]
    found.left_out[Way.GDB] = "no <gdb>"
    found.facts = Facts(4711, name, "/usr/bin/redis-check-rdb", 1, 5, 5 << 20)
    found.probe = "redis PING, 127.0.0.1:6379"
    return found


def document(**options: Any) -> dict[str, Any]:
    return document_of(results(**options), Settings(Path("/plan.toml"), ("set",), None), 3)


def test_the_document_has_medians_worsts_and_all_values() -> None:
    found = json.loads(json.dumps(document(failed=7)))
    assert found["schema"] == 1
    assert found["target"]["pid"] == 4711
    assert found["equal"] is True
    assert [way["way"] for way in found["ways"]] == ["live", "checkpoint"]
    assert found["left_out"] == [{"way": "gdb", "reason": "no <gdb>"}]
    live = found["ways"][0]["disable"]
    assert live["wall_us"] == {"median": 200_000.0, "worst": 300_000.0, "values": [100_000.0, 300_000.0, 200_000.0]}
    assert live["stopped_us"]["median"] == 5.0, "the longest stop where there are several"
    assert found["ways"][1]["undo"]["stopped_us"]["median"] == 123.4
    assert live["client_us"]["worst"] == 1500.0
    assert live["new_client_us"]["worst"] == 2000.0
    assert live["failed"]["worst"] == 7
    assert found["nobody"]["failed"]["worst"] == 7
    names = {measure.name for measure in MEASURES}
    assert names <= set(found["ways"][1]["undo"])
    assert names - set(live) == {"dump_ms", "rewrite_ms", "restore_ms"}


def test_what_is_not_equal_is_said() -> None:
    found = results()
    found.same_tables[Way.CHECKPOINT] = False
    assert not found.equal
    way = document_of(found, Settings(Path("/p"), ("set",), None), 1)["ways"][1]
    assert [text for text, good in verdicts_of(way) if not good] == ["ANOTHER TABLE than by the first way"]


def test_a_cell_has_the_worst_where_it_is_another() -> None:
    assert cell({"median": 5.0, "worst": 5.0, "values": [5.0]}, "µs") == "5.00 µs"
    assert cell({"median": 5.0, "worst": 7.0, "values": [5.0, 7.0]}, "µs") == "5.00 µs (7.00 µs)"
    assert cell(None, "µs") == ""


def test_the_page_loads_nothing_and_shows_every_figure() -> None:
    found = document(name="<script>alert(1)</script>")
    page = Elements(page_of(found))
    assert page.loads_nothing
    assert any("<script>alert(1)</script>" in text for text in page.texts)
    assert any("no <gdb>" in text for text in page.texts)
    for measure in MEASURES:
        assert measure.title in page.texts
        for _, _, figures in rows_of(found):
            if measure.name in figures:
                assert shown(figures[measure.name]["median"], measure.unit) in page.texts


def test_bars_are_as_long_as_the_logarithm_of_what_they_show() -> None:
    page = Elements(page_of(document()))
    bars = page.styles("bar")
    # "client waited" comes first: 1500 µs for nobody and four steps, between 1 ms and 10 ms.
    assert bars[:5] == ["width: 17.61%"] * 5
    assert all(0 <= float(style.split()[1].rstrip("%")) <= 100 for style in bars)
