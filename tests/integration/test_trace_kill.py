"""A tracer that is killed, under everything at once: io-threads, load, forks that save, blocks armed again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pytest

from .conftest import Dynacut
from .load import Load
from .servers import Redis
from .test_trace import begin
from .tracer import Tracer
from .untouched import Snapshot

_REARMS = 30
_KILLS = 12
_PATIENCE = 60.0
"""Seconds for what takes one on a machine that does nothing else."""


class Saves:
    """Makes redis fork and save, one BGSAVE after the other, from `with` to its end; each must end well."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.done = 0
        self.failure = ""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_PATIENCE)
        assert not self._thread.is_alive(), "a BGSAVE does not end"

    def _run(self) -> None:
        try:
            with self._redis.connect(_PATIENCE) as connection:
                while not self._stop.is_set():
                    started = connection.command("BGSAVE")
                    assert started == "Background saving started", started
                    while "rdb_bgsave_in_progress:1" in (state := str(connection.command("INFO", "persistence"))):
                        time.sleep(0.002)
                    assert "rdb_last_bgsave_status:ok" in state, state
                    self.done += 1
        except (OSError, AssertionError) as error:
            self.failure = repr(error)


@contextmanager
def benchmark(redis: Redis) -> Iterator[None]:
    """redis-benchmark on redis, as long as the context lasts."""
    command = ["redis-benchmark", "-p", str(redis.port), "-c", "20", "-l", "-q", "-t", "set,get,lpush,lrange_100,mset"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        yield
        assert process.poll() is None, f"redis-benchmark ended: {process.communicate()[1].decode()}"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_redis_outlives_every_tracer(dynacut: Dynacut, tmp_path: Path) -> None:
    """It answers throughout, its children end well, and in the end its code is the file's."""
    with Redis({"io-threads": 4, "io-threads-do-reads": "yes"}) as redis:
        redis.command("SET", "key", "value")
        before = Snapshot.of(redis.pid)

        def get() -> object:
            with redis.connect(_PATIENCE) as connection:
                return connection.command("GET", "key")

        with Load(get, threads=2, expect="value") as load, Saves(redis) as saves, benchmark(redis):
            _arm_again_and_again(dynacut, redis, load, tmp_path / "trace.drcov")
            assert not saves.failure
            rearmed_saves = saves.done
            for _ in range(_KILLS):
                _kill_one(dynacut, redis, load, tmp_path / "trace.drcov")
                assert not saves.failure
        assert (load.failures, load.wrong, saves.failure) == (0, 0, ""), f"{load.first}\n{redis.log}"
        assert rearmed_saves > 0
        assert saves.done > rearmed_saves
        report = dynacut.json("live", "--pid", redis.pid, "--undo")
        assert report["warnings"] == []
        after = Snapshot.of(redis.pid)
        assert after.code == before.code
        assert after.mappings == before.mappings
        # jemalloc may have made threads of its own meanwhile.
        assert {tid: after.masks.get(tid) for tid in before.masks} == before.masks
        assert redis.is_running()
        assert redis.command("GET", "key") == "value"


def _arm_again_and_again(dynacut: Dynacut, redis: Redis, load: Load, log: Path) -> None:
    with Tracer("--pid", redis.pid, "-o", log) as tracer:
        tracer.await_line("armed")
        for number in range(_REARMS):
            begin(dynacut, redis.pid, f"p{number}", tracer)
            load.wait_for(3, _PATIENCE)
        tracer.end()


def _kill_one(dynacut: Dynacut, redis: Redis, load: Load, log: Path) -> None:
    with Tracer("--pid", redis.pid, "-o", log) as tracer:
        if random.random() < 0.5:
            tracer.await_line("armed")
            if random.random() < 0.7:
                begin(dynacut, redis.pid, "again", tracer)
        time.sleep(random.random() * 1.5)  # the instant of the kill, not a condition
        assert tracer.process.poll() is None, tracer.process.communicate()[1]
        os.kill(tracer.process.pid, signal.SIGKILL)
    load.wait_for(3, _PATIENCE)
    assert redis.is_running(), redis.log
    with redis.connect(_PATIENCE) as connection:  # four io-threads and whatever else the machine does: slow is not dead
        assert connection.command("PING") == "PONG"
