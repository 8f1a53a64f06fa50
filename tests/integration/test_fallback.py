"""dynacut live --fallback checkpoint: servers under seccomp, which the live backend refuses, changed all the same."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from dynacut.handlers.table import Table
from dynacut.live.ptrace.tracee import Tracee
from dynacut.live.rehearsal import rehearsed
from dynacut.offline import checkpoint, processes, round_trip
from dynacut.offline import restore as restore_module
from dynacut.offline.change import change
from dynacut.offline.criu import VARIABLE
from dynacut.offline.criu_options import Record
from dynacut.offline.restore import Restored
from dynacut.shared.binary import blocks
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.errors import DynacutError
from dynacut.shared.patch_set import ByteEdit, HandlerChange, PatchSet
from dynacut.shared.proc import children, executable, task_status
from dynacut.shared.target import Target

from .checkpoints import job, python_job, the_criu
from .conftest import Dynacut
from .programs import compile_program
from .servers import Nginx, Redis, RedisError, is_gone, is_running, wait_until
from .test_kill import start
from .test_live_redis import set_plan

SET_REDIRECTED = ("--disable", "setCommand", "--on-hit", "redirect=readonlyCommand", "--as", "set")
REFUSED = "runs under seccomp (a filter)"
FALLBACK = ("--fallback", "checkpoint")


@pytest.fixture(autouse=True)
def criu() -> None:
    """Everything here needs one."""
    the_criu()


@pytest.fixture(autouse=True)
def logs_of_failures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are kept for the user to read; here they go with the test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Where images lie; empty again when all went well."""
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


@contextmanager
def reaped(*pids: int) -> Iterator[None]:
    """Reaps processes when they end, as services' parents do: by a handler for SIGCHLD, which can be seen in /proc."""

    def reap(_: int, __: FrameType | None) -> None:
        for pid in pids:
            is_gone(pid)

    before = signal.signal(signal.SIGCHLD, reap)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


class ConfinedRedis(Redis):
    """redis-server under a seccomp filter."""

    def __init__(self, confined: Path) -> None:
        super().__init__()
        self._confined = confined

    def _prepare(self, program: Path) -> list[str]:
        return [str(self._confined), *super()._prepare(program)]


class ConfinedNginx(Nginx):
    """nginx, master and workers, under a seccomp filter."""

    def __init__(self, confined: Path) -> None:
        super().__init__()
        self._confined = confined

    def _prepare(self, program: Path) -> list[str]:
        return [str(self._confined), *super()._prepare(program)]


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    with ConfinedRedis(compile_program("confined", tmp_path)) as server:
        assert task_status(server.pid).seccomp == 2
        yield server


def test_redis_under_seccomp(redis: Redis, dynacut: Dynacut, images: Path) -> None:
    live = ("live", "--pid", redis.pid)
    redis.command("SET", "key", "before")
    done = dynacut(*live, *SET_REDIRECTED)
    assert done.returncode == 1
    assert REFUSED in done.stderr and "`dynacut live --fallback checkpoint`" in done.stderr

    with reaped(redis.pid):
        report = dynacut.json(*live, *SET_REDIRECTED, *FALLBACK, "--images", images)
    assert report["target"] == {"pid": redis.pid, "exe": "/usr/bin/redis-check-rdb"}
    assert [(each["name"], each["state"]) for each in report["features"]] == [("set", "disabled")]
    assert report["changed"] is True
    way = report["fallback"]
    assert REFUSED in way["refused"] and way["rolled_back"] is False and way["images"] is None
    assert 0 < way["rewrite"] < way["frozen_ms"] < report["wall_ms"]
    assert report["stopped_us"] == pytest.approx(way["frozen_ms"] * 1000, rel=0.01)
    assert list(images.iterdir()) == []

    assert task_status(redis.pid).seccomp == 2  # the filter is back as well
    assert isinstance(redis.command("SET", "key", "after"), RedisError)  # over the connection from before
    assert redis.command("GET", "key") == "before"
    (feature,) = dynacut.json(*live)["features"]
    assert (feature["state"], feature["hits"]) == ("disabled", 1)

    with reaped(redis.pid):
        done = dynacut(*live, "--undo", *FALLBACK, "--images", images)
    assert done.returncode == 0, done.stderr
    assert f"dynacut: warning: not live: process {redis.pid} (redis-server) {REFUSED}" in done.stderr
    assert f"process {redis.pid}: everything is as it was before (1 place changed)" in done.stdout
    assert "by checkpoint: dumped in" in done.stdout and "it stood still for" in done.stdout
    assert redis.command("SET", "key", "after") == "OK"
    assert dynacut.json(*live)["features"] == []


def test_a_plan_that_is_in_force_already_needs_no_dump(
    redis: Redis, dynacut: Dynacut, tmp_path: Path, images: Path
) -> None:
    plan = set_plan(tmp_path / "set.toml")
    command = ("live", "--pid", redis.pid, "--plan", plan, *FALLBACK, "--images", images)
    with reaped(redis.pid):
        assert dynacut.json(*command)["changed"] is True
    began = processes.start_time(redis.pid)
    with reaped(redis.pid):
        report = dynacut.json("live", "--pid", redis.pid, "--enable", "set", *FALLBACK, "--dry-run")
    assert report["edits"] == 1 and report["changed"] is False
    assert set(report["fallback"]) == {"refused"}
    again = dynacut(*command)
    assert (again.returncode, processes.start_time(redis.pid)) == (0, began), again.stderr
    assert "nothing to change" in again.stdout


def test_nginx_with_its_workers_under_seccomp(dynacut: Dynacut, images: Path, tmp_path: Path) -> None:
    with ConfinedNginx(compile_program("confined", tmp_path)) as nginx, nginx.connect() as connection:
        workers = nginx.workers
        assert connection.request("PUT", "/one", b"text")[0] == 201
        put = ("--disable", "ngx_http_read_client_request_body", "--on-hit", "return=403", "--as", "upload")
        with reaped(nginx.pid, *workers):
            report = dynacut.json("live", "--pid", nginx.pid, "--tree", *put, *FALLBACK, "--images", images)
        assert {each["pid"] for each in report["processes"]} == {nginx.pid, *workers}
        assert all(each["features"][0]["state"] == "disabled" for each in report["processes"])
        assert nginx.workers == workers
        assert connection.request("GET", "/one")[2] == b"text"
        for _ in range(4):  # whichever worker takes it
            assert nginx.request("PUT", "/two", b"text")[0] == 403


def test_what_can_be_done_live_is_done_live(dynacut: Dynacut) -> None:
    with Redis() as redis:
        began = processes.start_time(redis.pid)
        report = dynacut.json("live", "--pid", redis.pid, *SET_REDIRECTED, *FALLBACK)
        assert "fallback" not in report and report["changed"] is True
        assert processes.start_time(redis.pid) == began


# Refused, before anything is dumped.


@contextmanager
def untouched(redis: Redis, images: Path) -> Iterator[None]:
    """It was not dumped: a restored process started later; and no image is left."""
    began = processes.start_time(redis.pid)
    yield
    assert processes.start_time(redis.pid) == began
    assert list(images.iterdir()) == []
    assert redis.command("PING") == "PONG"


def test_a_change_that_does_not_fit(redis: Redis, dynacut: Dynacut, images: Path) -> None:
    with untouched(redis, images), reaped(redis.pid):
        done = dynacut("live", "--pid", redis.pid, "--disable", "no_such_function", *FALLBACK, "--images", images)
        assert done.returncode == 1
        assert "no_such_function" in done.stderr


def test_a_parent_that_does_not_reap(redis: Redis, dynacut: Dynacut, images: Path) -> None:
    with untouched(redis, images):
        done = dynacut("live", "--pid", redis.pid, *SET_REDIRECTED, *FALLBACK, "--images", images)
        assert done.returncode == 1
        assert f"process {os.getpid()} (" in done.stderr and "no handler for SIGCHLD, no wait" in done.stderr
        assert "dynacut: if it does, do it in steps: `dynacut checkpoint`" in done.stderr


def test_a_traced_process(redis: Redis, dynacut: Dynacut, images: Path) -> None:
    ready, done = os.pipe(), os.pipe()
    tracer = os.fork()
    if tracer == 0:
        os.close(done[1])
        Tracee(redis.pid)
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(0)
    try:
        assert os.read(ready[0], 1) == b"x"
        with untouched(redis, images):
            refused = dynacut("live", "--pid", redis.pid, *SET_REDIRECTED, *FALLBACK, "--images", images)
            assert refused.returncode == 1
            assert f"is traced already, by process {tracer}" in refused.stderr
            assert "CRIU cannot dump a traced process either" in refused.stderr
    finally:
        os.kill(tracer, signal.SIGKILL)
        os.waitpid(tracer, 0)
        for end in (*ready, *done):
            os.close(end)


def test_what_criu_cannot_dump(tmp_path: Path, dynacut: Dynacut, images: Path) -> None:
    """One half of a unix connection."""
    mine, other = socket.socketpair()
    confined = compile_program("confined", tmp_path)
    with mine, other, job(confined, "/bin/sleep", "1000", pass_fds=[other.fileno()]) as pid, reaped(pid):
        wait_until(lambda: task_status(pid).name == "sleep" and task_status(pid).seccomp == 2, "sleep runs")
        began = processes.start_time(pid)
        done = dynacut("live", "--pid", pid, "--disable", "sleep+0x2000", *FALLBACK, "--images", images)
        assert done.returncode == 1
        assert (processes.start_time(pid), list(images.iterdir())) == (began, [])


def test_without_a_criu(redis: Redis, dynacut: Dynacut, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/nonexistent/criu")
    with untouched(redis, images), reaped(redis.pid):
        done = dynacut("live", "--pid", redis.pid, *SET_REDIRECTED, *FALLBACK, "--images", images)
        assert done.returncode == 1
        assert "no CRIU works" in done.stderr and "make criu" in done.stderr


def test_nowhere_to_write(redis: Redis, dynacut: Dynacut, images: Path) -> None:
    with untouched(redis, images), reaped(redis.pid):
        done = dynacut("live", "--pid", redis.pid, *SET_REDIRECTED, *FALLBACK, "--images", images / "none")
        assert done.returncode == 1
        assert "give another folder by --images DIR" in done.stderr


def test_usage(dynacut: Dynacut) -> None:
    for arguments in (FALLBACK, ("--undo", "--images", "/tmp")):
        assert dynacut("live", "--pid", os.getpid(), *arguments).returncode == 2


@pytest.mark.parametrize("scope", ["entry", "block"])
def test_no_program_is_read_or_decoded_while_it_stands_still(
    redis: Redis, images: Path, scope: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nor is anything there from an earlier run: all is found out before, in the rehearsal."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("the process stands still")

    def frozen(*arguments: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ElfFile, "open", too_late)
            patch.setattr(blocks, "is_instruction_boundary", too_late)
            patch.setattr(blocks.BlockMap, "of", too_late)
            return change(*arguments, **options)

    monkeypatch.setattr(round_trip, "change", frozen)
    command = ("live", "--pid", redis.pid, *SET_REDIRECTED, "--scope", scope, *FALLBACK, "--images", images)
    with reaped(redis.pid):
        status, _, errors = start(*command).result(60)
    assert status == 0, errors
    assert isinstance(redis.command("SET", "key", "value"), RedisError)


def test_a_rehearsal_looks_at_children_that_run_other_programs() -> None:
    """Where the change fits them, they are changed in the image as well; where it does not, they are left alone."""
    code = "import subprocess; subprocess.run(['sleep', '1000'])"
    with job(*python_job(code)) as pid:
        wait_until(lambda: [task_status(each).name for each in children(pid)] == ["sleep"], "the child")
        (child,) = children(pid)
        seen, refusing = list[str](), set[str]()

        def resolve(target: Target, _: Table | None) -> PatchSet:
            seen.append(target.exe)
            if target.exe in refusing:
                raise DynacutError("it does not fit")
            return PatchSet((ByteEdit(4096, b"a", b"b"),), HandlerChange.KEEP, ("f",), (), (), ())

        programs = [executable(each) for each in (pid, child)]
        with rehearsed(pid, resolve, tree=True) as rehearsal:
            assert (rehearsal.edits, seen) == (2, programs)
        refusing.add(programs[1])
        with rehearsed(pid, resolve, tree=True) as rehearsal:
            assert (rehearsal.edits, seen[2:]) == (1, programs)
        refusing.add(programs[0])
        with pytest.raises(DynacutError, match="does not fit"), rehearsed(pid, resolve, tree=True):
            pass


# What goes wrong once it is dumped.


def test_a_rewriting_that_fails_restores_the_original(
    redis: Redis, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis.command("SET", "key", "before")

    def full(*_: object, **__: object) -> None:
        raise DynacutError("the layer cannot be written: No space left on device", "free some")

    monkeypatch.setattr(round_trip, "change", full)
    began = processes.start_time(redis.pid)
    with reaped(redis.pid):
        status, out, errors = start("live", "--pid", redis.pid, *SET_REDIRECTED, *FALLBACK, "--images", images).result(
            60
        )
    assert (status, out) == (1, ""), errors
    assert "No space left on device" in errors and "it was dumped and restored, unchanged" in errors
    assert processes.start_time(redis.pid) != began
    (left,) = images.iterdir()
    assert str(left) in errors and left.stat().st_mode & 0o777 == 0o700
    assert redis.command("GET", "key") == "before"
    assert redis.command("SET", "key", "after") == "OK"


def test_a_disk_that_is_full_is_noticed_before_the_process_is_dumped(
    redis: Redis, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dynacut's own file of the image cannot be written: nothing has been done to the process then."""

    def full(_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Record, "packed", full)
    with reaped(redis.pid):
        status, _, errors = start("live", "--pid", redis.pid, *SET_REDIRECTED, *FALLBACK, "--images", images).result(60)
    assert status == 1 and "dynacut.json cannot be written: No space left on device" in errors
    assert is_running(redis.pid)
    assert redis.command("SET", "key", "after") == "OK"


def test_a_layer_that_cannot_be_restored_is_rolled_back(
    redis: Redis, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = restore_module.restore

    def damaged(directory: Path, **options: Any) -> Restored:
        (directory / f"core-{redis.pid}.img").unlink()
        return restore(directory, **options)

    monkeypatch.setattr(round_trip, "restore", damaged)
    command = ("live", "--pid", redis.pid, *SET_REDIRECTED, *FALLBACK, "--images", images)
    with reaped(redis.pid):
        status, out, errors = start(*command, "--json").result(60)
    assert status == 3, errors
    assert "the original was, and the process runs as before" in errors
    report = json.loads(out)
    assert report["changed"] is False and report["features"] == [] and report["fallback"]["rolled_back"] is True
    (left,) = images.iterdir()
    assert report["fallback"]["images"] == str(left) and str(left) in errors
    assert redis.command("SET", "key", "after") == "OK"


def test_a_parent_that_breaks_its_word(redis: Redis, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a handler for SIGCHLD, which does not reap: the image is named, and can be restored as soon as it does."""
    monkeypatch.setattr(checkpoint, "_REAP_TIMEOUT", 0.2)
    monkeypatch.setattr(restore_module, "_REAP_TIMEOUT", 0.2)
    monkeypatch.setattr(round_trip, "_REAP_TIMEOUT", 0.2)
    with reaped():
        status, out, errors = start("live", "--pid", redis.pid, *SET_REDIRECTED, *FALLBACK, "--images", images).result(
            60
        )
    assert (status, out) == (4, ""), errors
    (left,) = images.iterdir()
    assert f"dynacut restore {left / 'rewritten'}" in errors
    assert is_gone(redis.pid)
    status, out, errors = start("restore", left / "rewritten").result(60)
    assert status == 0, errors
    assert isinstance(redis.command("SET", "key", "after"), RedisError)


@pytest.mark.parametrize("delay", [0.25, 0.4, 0.5, 0.6, 0.8])
def test_an_interrupt_does_not_lose_the_process(redis: Redis, images: Path, delay: float) -> None:
    """Ctrl-C comes into force when the process runs again, whether it comes before, amid or after the round trip."""
    command = [sys.executable, "-m", "dynacut.cli.main", "live", "--pid", str(redis.pid), *SET_REDIRECTED, *FALLBACK]
    with reaped(redis.pid), subprocess.Popen([*command, "--images", images], stderr=subprocess.PIPE) as process:
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode in (0, 4, -signal.SIGINT), errors
    assert is_running(redis.pid)
    disabled = isinstance(redis.command("SET", "key", "x"), RedisError)
    assert disabled or process.returncode
    assert list(images.iterdir()) == []
