"""dynacut compare on real servers: every way measured, the same bytes by all, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest

from dynacut.jobs.compare import comparison
from dynacut.jobs.compare.probes import CommandProbe
from dynacut.jobs.compare.target import state_of
from dynacut.jobs.compare.ways import Settings, Way
from dynacut.shared.errors import DynacutError

from .checkpoints import the_criu
from .conftest import Dynacut
from .programs import compile_program
from .servers import Nginx, Redis, free_port, wait_until
from .test_fallback import ConfinedRedis, reaped
from .test_live_redis import set_plan

PUT_PLAN = """\
format = 1
name = "nginx without uploads"

[[feature]]
name = "upload"
on_hit = "return=403"
sites = [{ at = "ngx_http_read_client_request_body" }]
"""
STEPS = ("disable", "undo")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return set_plan(tmp_path / "set.toml")


def way(report: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (each for each in report["ways"] if each["way"] == name)
    assert isinstance(found, dict)
    return found


def check(report: dict[str, Any], *names: str, repeat: int = 1) -> None:
    """These ways were gone, led to the same, and every figure is there once for each turn."""
    assert [each["way"] for each in report["ways"]] == list(names)
    assert report["equal"] is True
    for each in report["ways"]:
        assert each["same_text"] is each["same_tables"] is each["undone"] is True
        for step in STEPS:
            for name in ("client_us", "new_client_us", "failed", "lost", "stopped_us", "wall_us", "written_bytes"):
                assert len(each[step][name]["values"]) == repeat
            assert each[step]["lost"]["worst"] == 0
            assert each[step]["client_us"]["worst"] > 0
            assert each[step]["stopped_us"]["worst"] < each[step]["wall_us"]["worst"]


def images_in(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("dynacut-compare-*")]


def test_a_redis_is_started_compared_and_ended(dynacut: Dynacut, plan: Path, tmp_path: Path) -> None:
    the_criu()
    port = free_port()
    page = tmp_path / "page.html"
    command = ("--", "redis-server", "--port", port, "--bind", "127.0.0.1", "--save", "", "--dir", tmp_path)
    what = ("--plan", plan, "--repeat", 1, "--json", "--html", page, "--images", tmp_path)
    done = dynacut("compare", *what, *command)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    check(report, "live", "gdb", "checkpoint")
    assert report["probe"] == f"redis PING, 127.0.0.1:{port}"
    assert report["target"]["name"] == "redis-server"
    live, gdb, checkpoint = (way(report, name) for name in ("live", "gdb", "checkpoint"))
    for step in STEPS:
        assert live[step]["failed"]["worst"] == 0
        assert live[step]["written_bytes"]["worst"] == 0
        assert checkpoint[step]["written_bytes"]["median"] > 1 << 20
        assert gdb[step]["written_bytes"]["worst"] == 0
        assert checkpoint[step]["stopped_us"]["median"] < 2 * checkpoint[step]["client_us"]["worst"]
    assert live["disable"]["copied_bytes"]["median"] > 0
    assert "dynacut compare: redis-server" in page.read_text()
    assert images_in(tmp_path) == []
    assert not any(connection.laddr.port == port for connection in psutil.net_connections("tcp") if connection.laddr)


def test_a_running_redis_keeps_its_pid_its_data_and_its_clients(
    redis: Redis, dynacut: Dynacut, plan: Path, tmp_path: Path
) -> None:
    the_criu()
    assert redis.command("SET", "key", "old") == "OK"
    before = state_of([redis.pid])
    with reaped(redis.pid):
        report = dynacut.json(
            "compare", "--plan", plan, "--pid", redis.pid, "--repeat", 1, "--yes", "--ways", "live,checkpoint",
            "--images", tmp_path,
        )  # fmt: skip
    check(report, "live", "checkpoint")
    assert report["target"]["pid"] == redis.pid
    assert redis.command("GET", "key") == "old"
    assert redis.command("SET", "key", "new") == "OK"
    assert state_of([redis.pid]) == before
    assert images_in(tmp_path) == []


def test_nginx_is_compared_with_its_workers(nginx: Nginx, dynacut: Dynacut, tmp_path: Path) -> None:
    the_criu()
    plan = tmp_path / "put.toml"
    plan.write_text(PUT_PLAN)
    pids = [nginx.pid, *nginx.workers]
    with reaped(*pids):
        report = dynacut.json(
            "compare", "--plan", plan, "--pid", nginx.pid, "--repeat", 1, "--ways", "live,checkpoint",
            "--probe-http", f"http://127.0.0.1:{nginx.port}/index.html", "--images", tmp_path,
        )  # fmt: skip
    check(report, "live", "checkpoint")
    assert report["target"]["processes"] == len(pids)
    assert nginx.request("PUT", "/new.txt", "text")[0] == 201
    assert [nginx.pid, *nginx.workers] == pids


def test_a_way_whose_tool_is_missing_is_left_out_loudly(redis: Redis, dynacut: Dynacut, plan: Path) -> None:
    common = ("compare", "--plan", plan, "--pid", redis.pid, "--repeat", 1, "--criu", "/nonexistent/criu")
    done = dynacut(*common, "--ways", "live,checkpoint")
    assert done.returncode == 0
    assert "checkpoint is left out: " in done.stderr and "/nonexistent/criu" in done.stderr
    assert "live: the same code, the same table, undone completely, open connections survived" in done.stdout
    done = dynacut(*common, "--ways", "checkpoint")
    assert done.returncode == 1
    assert "no way is left to compare" in done.stderr


def failing_criu(folder: Path, action: str, *, after: int = 0) -> Path:
    """The real CRIU, but for one action, which fails once it has succeeded so many times."""
    criu, done = folder / "criu", folder / "done"
    done.touch()
    criu.write_text(f"""\
#!/bin/sh
[ "$1" = {action} ] || exec {the_criu().path} "$@"
[ $(wc -l < {done}) -lt {after} ] || exit 1
{the_criu().path} "$@" && echo >> {done}
""")
    criu.chmod(0o755)
    return criu


def test_a_way_that_is_refused_midway_is_left_out(redis: Redis, dynacut: Dynacut, plan: Path, tmp_path: Path) -> None:
    criu = failing_criu(tmp_path, "dump")
    with reaped(redis.pid):
        report = dynacut.json(
            "compare", "--plan", plan, "--pid", redis.pid, "--ways", "checkpoint,live", "--repeat", 1, "--criu", criu,
            "--images", tmp_path,
        )  # fmt: skip
    check(report, "live")
    (left,) = report["left_out"]
    assert left["way"] == "checkpoint"
    assert "CRIU cannot dump process" in left["reason"]
    assert images_in(tmp_path) == []
    assert redis.command("SET", "key", "value") == "OK"


def test_a_way_that_fails_midway_is_put_back_and_the_others_go_on(
    redis: Redis, dynacut: Dynacut, plan: Path, tmp_path: Path
) -> None:
    """A CRIU that dumps once: the plan is applied by checkpoint, and cannot be undone by it."""
    criu = failing_criu(tmp_path, "dump", after=1)
    before = state_of([redis.pid])
    with reaped(redis.pid):
        done = dynacut(
            "compare", "--plan", plan, "--pid", redis.pid, "--ways", "checkpoint,live", "--repeat", 1, "--criu", criu,
            "--images", tmp_path, "--json",
        )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "checkpoint failed (undo) and is left out: " in done.stderr
    report = json.loads(done.stdout)
    check(report, "live")
    (failed,) = report["failed"]
    assert (failed["way"], failed["step"], failed["restored"]) == ("checkpoint", "undo", True)
    assert "CRIU cannot dump process" in failed["reason"]
    assert state_of([redis.pid]) == before
    assert redis.command("SET", "key", "value") == "OK"
    assert images_in(tmp_path) == []


def test_an_instance_that_is_lost_is_replaced(dynacut: Dynacut, plan: Path, tmp_path: Path) -> None:
    criu = failing_criu(tmp_path, "restore")
    page = tmp_path / "page.html"
    command = ("--", "redis-server", "--port", free_port(), "--bind", "127.0.0.1", "--save", "", "--dir", tmp_path)
    what = ("--plan", plan, "--ways", "checkpoint,live", "--repeat", 1, "--criu", criu, "--images", tmp_path)
    done = dynacut("compare", *what, "--json", "--html", page, *command)
    assert done.returncode == 3, done.stderr
    report = json.loads(done.stdout)
    check(report, "live")
    (failed,) = report["failed"]
    assert (failed["way"], failed["step"], failed["restored"]) == ("checkpoint", "disable", False)
    assert "checkpoint failed (disable)" in page.read_text()
    assert images_in(tmp_path) == []


def test_under_a_seccomp_filter_only_the_checkpoint_is_left(dynacut: Dynacut, plan: Path, tmp_path: Path) -> None:
    the_criu()
    with ConfinedRedis(compile_program("confined", tmp_path)) as redis, reaped(redis.pid):
        report = dynacut.json(
            "compare", "--plan", plan, "--pid", redis.pid, "--ways", "live,checkpoint", "--repeat", 1,
            "--images", tmp_path,
        )  # fmt: skip
        check(report, "checkpoint")
        (left,) = report["left_out"]
        assert left["way"] == "live" and "seccomp" in left["reason"]
        assert redis.command("SET", "key", "value") == "OK"


def test_a_process_whose_parent_does_not_reap_is_not_dumped(redis: Redis, dynacut: Dynacut, plan: Path) -> None:
    the_criu()
    what = ("--plan", plan, "--pid", redis.pid, "--ways", "checkpoint,live", "--repeat", 1)
    report = dynacut.json("compare", *what)
    check(report, "live")
    (left,) = report["left_out"]
    assert "does not look as if it reaped its children" in left["reason"]


def test_a_probe_that_the_plan_refuses_is_named(redis: Redis, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state_of([redis.pid])
    monkeypatch.setattr(comparison, "_PATIENCE_SECONDS", 0.5)
    probe = CommandProbe(f"redis-cli -e -p {redis.port} set key value")
    measuring = comparison.Comparison(Settings(plan, ("set",), None), [Way.LIVE], None, print, print, renewed=False)
    with pytest.raises(DynacutError, match="clients are no longer answered") as raised:
        measuring.run(lambda: nullcontext((redis.pid, probe)), 1)
    assert raised.value.advice == "give a probe that the plan does not refuse"
    assert state_of([redis.pid]) == before


def test_a_process_that_cannot_be_restored_leaves_its_image(
    redis: Redis, dynacut: Dynacut, plan: Path, tmp_path: Path
) -> None:
    """A CRIU whose restore fails: what is left is the image, the message says where, and it can be restored."""
    criu = failing_criu(tmp_path, "restore")
    redis.command("SET", "key", "old")
    with reaped(redis.pid):
        done = dynacut(
            "compare", "--plan", plan, "--pid", redis.pid, "--ways", "checkpoint", "--criu", criu, "--images", tmp_path
        )
    assert done.returncode == 4, done.stderr
    (left,) = images_in(tmp_path)
    assert f"dynacut restore {tmp_path / left}/image" in done.stderr
    dynacut.json("restore", tmp_path / left / "image", "--tcp-close")
    with redis.connect() as client:
        assert client.command("GET", "key") == "old"


def test_a_command_as_probe_and_a_plain_connection(redis: Redis, dynacut: Dynacut, plan: Path) -> None:
    common = ("compare", "--plan", plan, "--pid", redis.pid, "--repeat", 1, "--ways", "live")
    check(dynacut.json(*common, "--probe", f"redis-cli -p {redis.port} ping"), "live")
    check(dynacut.json(*common, "--probe-tcp", redis.port), "live")


def test_nobody_is_asked_where_nobody_can_answer(redis: Redis, dynacut: Dynacut, plan: Path) -> None:
    done = dynacut("compare", "--plan", plan, "--pid", redis.pid)
    assert done.returncode == 2
    assert "needs --yes, or --ways" in done.stderr
    assert "checkpoint ENDS the processes" in done.stderr or "checkpoint is left out" in done.stderr


@pytest.mark.parametrize("answer", [b"n\n", b"\n", b"\x04"])
def test_a_no_at_the_terminal_touches_nothing(redis: Redis, plan: Path, answer: bytes) -> None:
    before = state_of([redis.pid])
    terminal, theirs = os.openpty()
    try:
        os.write(terminal, answer)
        done = subprocess.run(
            [sys.executable, "-m", "dynacut.cli.main", "compare", "--plan", plan, "--pid", str(redis.pid)],
            stdin=theirs,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(terminal)
        os.close(theirs)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Begin? [y/N]" in done.stderr and "nothing was done" in done.stderr
    assert state_of([redis.pid]) == before


def test_what_is_in_force_already_is_not_undone(redis: Redis, dynacut: Dynacut, plan: Path) -> None:
    dynacut.json("live", "--pid", redis.pid, "--plan", plan)
    done = dynacut("compare", "--plan", plan, "--pid", redis.pid, "--ways", "live")
    assert done.returncode == 1
    assert "has features disabled already: set" in done.stderr
    (feature,) = dynacut.json("live", "--pid", redis.pid)["features"]
    assert feature["state"] == "disabled"


def test_a_plan_that_does_not_fit_touches_nothing(redis: Redis, dynacut: Dynacut, plan: Path) -> None:
    before = state_of([redis.pid])
    plan.write_text(plan.read_text().replace('old = "', 'old = "00 '))
    done = dynacut("compare", "--plan", plan, "--pid", redis.pid, "--ways", "live,checkpoint")
    assert done.returncode == 1
    assert "the plan cannot be applied" in done.stderr and "the plan says" in done.stderr
    assert state_of([redis.pid]) == before


def test_a_program_that_does_not_serve_is_refused_and_ended(dynacut: Dynacut, plan: Path) -> None:
    done = dynacut("compare", "--plan", plan, "--ways", "live", "--", "/nonexistent/server")
    assert done.returncode == 1 and "cannot be executed" in done.stderr
    done = dynacut("compare", "--plan", plan, "--ways", "live", "--", "true")
    assert done.returncode == 1 and "ended at once" in done.stderr


def test_processes_above_dynacut_are_refused(dynacut: Dynacut, plan: Path) -> None:
    done = dynacut("compare", "--plan", plan, "--ways", "live", "--pid", os.getpid())
    assert done.returncode == 1
    assert "descends from process" in done.stderr


@pytest.mark.parametrize(("number", "turns"), [(signal.SIGINT, 0), (signal.SIGTERM, 1)])
def test_an_interruption_puts_everything_back(
    redis: Redis, dynacut: Dynacut, plan: Path, number: signal.Signals, turns: int
) -> None:
    """Ctrl-C as soon as the feature is off; what was measured until then is told."""
    before = state_of([redis.pid])
    command = ["compare", "--plan", plan, "--pid", redis.pid, "--ways", "live", "--repeat", 1000, "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dynacut.cli.main", *map(str, command)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background it may be ignored
    )
    try:
        for _ in range(turns):
            wait_until(lambda: state_of([redis.pid]).features == ["set"], "the feature to be off", 60.0)
            wait_until(lambda: state_of([redis.pid]) == before, "the feature to be on", 60.0)
        wait_until(lambda: state_of([redis.pid]).features == ["set"], "the feature to be off", 60.0)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60.0)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 4
    assert b"Traceback" not in errors
    report = json.loads(output)
    if turns:
        check(report, "live", repeat=turns)
        assert report["broken_off"] == "interrupted"
    else:
        assert report["error"]["problem"] == "interrupted"
    assert state_of([redis.pid]) == before
    assert dynacut.json("live", "--pid", redis.pid)["features"] == []


@pytest.mark.skipif(shutil.which("chromium") is None, reason="this machine has no chromium to open the page with")
def test_a_browser_shows_the_page(redis: Redis, dynacut: Dynacut, plan: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    dynacut.json("compare", "--plan", plan, "--pid", redis.pid, "--ways", "live", "--repeat", 1, "--html", page)
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom", page],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "set off and on again: redis-server" in done.stdout
    assert done.stdout.count('class="bar"') == 3 + 3 + 2 + 2
