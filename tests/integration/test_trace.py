"""dynacut trace: coverage of running servers, of forks and threads, in phases, and what a killed tracer leaves."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dynacut.shared.drcov import read

from .conftest import Dynacut
from .load import Load
from .servers import Nginx, Redis, free_port, wait_until
from .untouched import Snapshot


class Tracer:
    """`dynacut trace` in the background."""

    def __init__(self, *arguments: str | int | Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dynacut.cli.main", "trace", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def await_line(self, word: str) -> str:
        """Waits for a line of its progress that contains a word."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if word in line:
                return line
        raise AssertionError(f"the tracer ended without saying {word!r}")

    def end(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        _, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, errors


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
    wanted, unwanted = (read(tmp_path / f"redis.{phase}.drcov") for phase in ("wanted", "unwanted"))
    done = dynacut("trace", "--subtract", tmp_path / "redis.unwanted.drcov", tmp_path / "redis.wanted.drcov", "-o", log)
    assert done.returncode == 0, done.stderr
    (module,) = read(log).modules
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
    start, serving = (read(tmp_path / f"redis.{phase}.drcov") for phase in ("init", "serving"))
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
    (module,) = read(log).modules
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
    assert read(log).count > 100
    assert nginx.request("PUT", "/x", "1")[0] == 201


def test_a_killed_tracer_leaves_a_server_that_works(dynacut: Dynacut, tmp_path: Path) -> None:
    """SIGKILL at random instants, under load with io-threads, while blocks are armed, hit, and armed again."""
    with Redis({"io-threads": 4, "io-threads-do-reads": "yes"}) as redis:
        redis.command("SET", "key", "value")
        before = Snapshot.of(redis.pid)

        def get() -> object:
            with redis.connect() as connection:
                return connection.command("GET", "key")

        with Load(get, threads=4, expect="value") as load:
            for _ in range(8):
                with Tracer("--pid", redis.pid, "-o", tmp_path / "x.drcov") as tracer:
                    if random.random() < 0.5:
                        tracer.await_line("armed")
                        dynacut("trace", "--pid", redis.pid, "--phase", "again")
                    time.sleep(random.random() * 1.5)  # the instant of the kill, not a condition
                    os.kill(tracer.process.pid, signal.SIGKILL)
                load.wait_for(50)
                assert isinstance(redis.command("INCR", "counter"), int)
            report = dynacut.json("live", "--pid", redis.pid, "--undo")
            assert report["warnings"] == []
            load.wait_for(50)
        assert (load.failures, load.wrong) == (0, 0), load.first
        assert Snapshot.of(redis.pid) == before


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
