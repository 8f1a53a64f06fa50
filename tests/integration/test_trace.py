"""dynacut trace: coverage of running servers, of forks, threads and trees, in phases."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dynacut.shared.coverage.drcov import read_log

from .conftest import Dynacut
from .programs import Program
from .servers import Nginx, Redis, free_port, wait_until
from .tracer import Tracer
from .untouched import Snapshot


def begin(dynacut: Dynacut, pid: int, phase: str, tracer: Tracer) -> None:
    done = dynacut("trace", "--pid", pid, "--phase", phase)
    assert done.returncode == 0, done.stderr
    tracer.await_line(f"phase {phase} begins")


def test_phases_of_redis_tell_set_from_get(redis: Redis, dynacut: Dynacut, tmp_path: Path) -> None:
    before = Snapshot.of(redis.pid)
    log = tmp_path / "redis.drcov"
    with Tracer("--pid", redis.pid, "-o", log, "--phase-name", "warm") as tracer:
        tracer.await_line("armed")
        for _ in range(3):
            redis.command("SET", "key", "value")
            redis.command("GET", "key")
            redis.command("NONSENSE")
        for phase, words in (("wanted", ("GET", "key")), ("unwanted", ("SET", "key", "value")), ("end", ("PING",))):
            begin(dynacut, redis.pid, phase, tracer)
            redis.command(*words)
        tracer.end()
    assert Snapshot.of(redis.pid) == before
    wanted, unwanted = (read_log(tmp_path / f"redis.{phase}.drcov").coverage for phase in ("wanted", "unwanted"))
    done = dynacut("trace", "--subtract", tmp_path / "redis.unwanted.drcov", tmp_path / "redis.wanted.drcov", "-o", log)
    assert done.returncode == 0, done.stderr
    (module,) = read_log(log).coverage.modules
    set_command = 0xAB060 if 0xAB060 in module.blocks else None
    assert set_command is not None, "the entry of setCommand is not in the difference"
    assert wanted.count > 50
    assert unwanted.count > 50
    assert redis.command("SET", "key", "value") == "OK"


def test_a_program_is_traced_from_its_entry_and_its_readiness_begins_a_phase(tmp_path: Path) -> None:
    port = free_port()
    command = ("redis-server", "--port", port, "--save", "", "--dir", tmp_path)
    log = tmp_path / "redis.drcov"
    with Tracer("-o", log, "--phase-name", "init", "--ready-port", port, "--", *command) as tracer:
        tracer.await_line("phase serving begins")
        (server,) = psutil.Process(tracer.process.pid).children()
        subprocess.run(["redis-cli", "-p", str(port), "get", "x"], check=True, capture_output=True)
        subprocess.run(["redis-cli", "-p", str(port), "shutdown", "nosave"], check=False, capture_output=True)
        tracer.process.communicate(timeout=60)
        assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
    start, serving = (read_log(tmp_path / f"redis.{phase}.drcov").coverage for phase in ("init", "serving"))
    assert start.count > 3000, "redis executes about 5,000 blocks when it starts"
    assert 300 < serving.count < start.count


def test_blocks_that_only_a_forked_child_executes_are_recorded(redis: Redis, tmp_path: Path) -> None:
    """rdbSaveRio's blocks run in the child that BGSAVE forks."""
    log = tmp_path / "bgsave.drcov"
    redis.command("SET", "key", "value")
    with Tracer("--pid", redis.pid, "-o", log) as tracer:
        tracer.await_line("armed")
        redis.command("BGSAVE")
        wait_until(lambda: "rdb_bgsave_in_progress:0" in str(redis.command("INFO", "persistence")), "the save")
        tracer.end()
    assert (redis.directory / "dump.rdb").exists()
    symbols = subprocess.run(
        ["nm", "-D", "/usr/bin/redis-check-rdb"], capture_output=True, text=True, check=True
    ).stdout
    (entry,) = (int(line.split()[0], 16) for line in symbols.splitlines() if line.endswith(" rdbSaveRio"))
    (module,) = read_log(log).coverage.modules
    assert entry in module.blocks


def test_nginx_is_traced_with_its_workers(nginx: Nginx, tmp_path: Path) -> None:
    log = tmp_path / "nginx.drcov"
    (worker, *_) = nginx.workers
    with Tracer("--pid", worker, "-o", log) as tracer:
        tracer.await_line("armed")
        wait_until(lambda: nginx.request("GET", "/")[0] == 200, "an answer")
        for _ in range(20):
            assert nginx.request("GET", "/missing")[0] == 404
        tracer.end()
    assert read_log(log).coverage.count > 100
    assert nginx.request("PUT", "/x", "1")[0] == 201


def test_a_tree_is_traced_as_one_with_the_workers_it_has_and_those_it_gets(
    nginx: Nginx, dynacut: Dynacut, tmp_path: Path
) -> None:
    """The code of PUT runs in one worker in each phase; the last of them was started while the tree was traced."""
    log = tmp_path / "nginx.drcov"
    before = {pid: Snapshot.of(pid) for pid in (nginx.pid, *nginx.workers)}
    first, second = nginx.workers
    with Tracer("--pid", nginx.pid, "--tree", "-o", log, "--phase-name", "get") as tracer:
        tracer.await_line("armed")
        assert nginx.request("GET", "/")[0] == 200
        begin(dynacut, nginx.pid, "first", tracer)
        served_by(nginx, first, second, "PUT")
        begin(dynacut, nginx.pid, "second", tracer)
        served_by(nginx, second, first, "PUT")
        begin(dynacut, nginx.pid, "anew", tracer)
        os.kill(second, signal.SIGKILL)
        wait_until(lambda: second not in nginx.workers and len(nginx.workers) == 2, "a new worker")
        (third,) = {*nginx.workers} - {first}
        served_by(nginx, third, first, "PUT")
        tracer.end()
    get, *puts = (read_log(tmp_path / f"nginx.{phase}.drcov").coverage for phase in ("get", "first", "second", "anew"))
    modules = [put.difference(get).module("nginx") for put in puts]
    assert min(module.count for module in modules) > 50, "the blocks of PUT"
    common = modules[0].intersection(modules[1]).intersection(modules[2])
    assert common.count > 0.8 * modules[0].count, "PUT is PUT, whoever serves it"
    assert len(read_log(tmp_path / "nginx.first.drcov").coverage.modules) == 1, "one file, merged"
    for pid in (nginx.pid, first):
        assert Snapshot.of(pid) == before[pid]
    assert Snapshot.of(third).code == before[first].code
    assert nginx.request("PUT", "/x", "1")[0] in (201, 204)


def served_by(nginx: Nginx, worker: int, other: int, method: str) -> None:
    """A request that one worker answers, as the other one is stopped meanwhile."""
    os.kill(other, signal.SIGSTOP)
    try:
        wait_until(lambda: psutil.Process(other).status() == psutil.STATUS_STOPPED, "the stop")
        assert nginx.request(method, f"/{worker}.txt", "x")[0] in (201, 204)
    finally:
        os.kill(other, signal.SIGCONT)


def test_code_that_runs_while_signals_are_blocked_is_left_out(
    program: Callable[..., Program], dynacut: Dynacut, tmp_path: Path
) -> None:
    """pthread_create blocks every signal: an int3 in there would end the program, which makes threads all the time."""
    target = program("creators")
    done = dynacut("trace", "--pid", target.pid, "-o", tmp_path / "x", "--module", "libc")
    assert done.returncode == 1
    assert "cannot be traced: it blocks every signal" in done.stderr
    done = dynacut("trace", "--pid", target.pid, "-o", tmp_path / "x", "--module", "ld-linux-x86-64")
    assert done.returncode == 1
    assert "the dynamic linker" in done.stderr
    done = dynacut("trace", "--pid", target.pid, "-o", tmp_path / "x.drcov", "--all-modules", "--for", "1")
    assert done.returncode == 0, done.stderr
    assert "not traced" in done.stderr and "libc.so.6" in done.stderr
    assert {module.name for module in read_log(tmp_path / "x.drcov").coverage.modules} == {"creators"}
    assert target.is_running()
    before = target.counters()["right"]
    wait_until(lambda: target.counters()["right"] > before + 100, "further threads")


def test_a_program_with_the_c_library_in_it_is_refused(
    program: Callable[..., Program], dynacut: Dynacut, tmp_path: Path
) -> None:
    target = program("creators", flags=("-static",))
    done = dynacut("trace", "--pid", target.pid, "-o", tmp_path / "x")
    assert done.returncode == 1
    assert "is part of it" in done.stderr
    assert target.is_running()


def test_a_trace_of_nothing_is_refused(redis: Redis, dynacut: Dynacut, tmp_path: Path) -> None:
    done = dynacut("trace", "--pid", redis.pid, "-o", tmp_path / "x", "--module", "nonsense")
    assert done.returncode == 1
    assert "has no module 'nonsense'" in done.stderr
    done = dynacut("trace", "-o", tmp_path / "x", "--", tmp_path / "no-such-program")
    assert done.returncode == 1
    assert "cannot be executed" in done.stderr
    done = dynacut("trace", "--pid", redis.pid, "--phase", "x")
    assert done.returncode == 1
    assert "not being traced" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--pid", "1"], ["--merge", "a", "--pid", "3", "-o", "x"]])
def test_wrong_usage_is_said(dynacut: Dynacut, arguments: list[str]) -> None:
    assert dynacut("trace", *arguments).returncode == 2
