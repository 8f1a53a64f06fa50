"""Debian's redis-server: SET switched off and on again under the feet of connected clients."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.symbols import SymbolTable

from .conftest import Dynacut, Rounds
from .load import Load
from .servers import Redis, RedisError, is_gone, wait_until
from .untouched import Snapshot

SET_TO_ERROR = ("--disable", "setCommand", "--on-hit", "redirect=readonlyCommand", "--as", "set")
EXECUTABLE = Path("/usr/bin/redis-check-rdb")


@contextmanager
def benchmark(redis: Redis) -> Iterator[subprocess.Popen[str]]:
    """redis-benchmark asking for GET, PING and LPUSH all the time."""
    command = ["redis-benchmark", "-p", str(redis.port), "-q", "-l", "-c", "8", "-t", "get,ping,lpush", "-n", "20000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            before = commands_processed(redis)
            wait_until(lambda: commands_processed(redis) > before + 5000, "load from redis-benchmark")
            yield process
            assert process.poll() is None, f"redis-benchmark ended: {process.communicate()[0]}"
        finally:
            process.kill()


def commands_processed(redis: Redis) -> int:
    information = redis.command("INFO", "stats")
    assert isinstance(information, str)
    return int(information.split("total_commands_processed:")[1].split()[0])


def set_plan(path: Path) -> Path:
    """A plan file for SET, made from the ELF file alone."""
    elf = ElfFile.open(EXECUTABLE)
    symbols = SymbolTable.of(elf, EXECUTABLE)
    (site,), (error,) = symbols.lookup("setCommand"), symbols.lookup("readonlyCommand")
    path.write_text(
        f"""
        format = 1
        name = "redis without SET"

        [module.redis-server]
        path = "{EXECUTABLE}"
        build_id = "{elf.build_id}"

        [[feature]]
        name = "set"
        on_hit = "redirect=redis-server+{error.offset:#x}"
        scope = "entry"
        sites = [{{ at = "redis-server+{site.offset:#x}", old = "{elf.read(site.offset, 2).hex(" ")}" }}]
        """
    )
    return path


def check_set_is_off(redis: Redis) -> None:
    """SET answers an error over the connection that has been open all the time; the rest works."""
    assert isinstance(redis.command("SET", "key", "new"), RedisError)
    assert redis.command("GET", "key") == "old"
    assert redis.command("PING") == "PONG"
    assert isinstance(redis.command("LPUSH", "list", "x"), int)


@pytest.mark.parametrize("way", ["sites", "plan", pytest.param("name", marks=pytest.mark.alone)])
def test_set_is_switched_off_and_on_again_under_load(redis: Redis, dynacut: Dynacut, tmp_path: Path, way: str) -> None:
    other = Redis()
    with other:
        other_before = Snapshot.of(other.pid)
        target: tuple[str | int, ...] = ("--pid", redis.pid)
        if way == "name":
            other.end()
            target = ("--name", "redis-server")
        what: tuple[str | Path, ...] = SET_TO_ERROR
        if way == "plan":
            what = ("--plan", set_plan(tmp_path / "set.toml"))
        assert redis.command("SET", "key", "old") == "OK"
        before = Snapshot.of(redis.pid)
        with benchmark(redis):
            report = dynacut.json("live", *target, *what)
            assert report["changed"] is True
            assert report["features"] == [{"name": "set", "state": "disabled", "sites": 1, "patched": 1, "hits": 0}]
            for _ in range(3):
                check_set_is_off(redis)
            (feature,) = dynacut.json("live", *target)["features"]
            assert feature["hits"] == 3
            if way != "name":
                assert other.command("SET", "key", "x") == "OK"
                assert Snapshot.of(other.pid).code == other_before.code

            assert dynacut.json("live", *target, "--enable", "set")["features"][0]["state"] == "enabled"
            assert redis.command("SET", "key", "again") == "OK"
            assert redis.command("SET", "key", "old") == "OK"
            assert dynacut.json("live", *target, "--disable", "set")["features"][0]["state"] == "disabled"
            check_set_is_off(redis)

            report = dynacut.json("live", *target, "--undo")
            assert report["features"] == []
            assert redis.command("SET", "key", "undone") == "OK"
        assert Snapshot.of(redis.pid) == before


def test_terminate_ends_the_server_upon_set(redis: Redis, dynacut: Dynacut) -> None:
    dynacut.json("live", "--pid", redis.pid, "--disable", "setCommand", "--on-hit", "terminate")
    assert redis.command("GET", "key") is None
    with pytest.raises(OSError):
        redis.command("SET", "key", "x")
    wait_until(lambda: not redis.is_running(), "the end of redis")


def test_return_skips_a_function_whose_caller_copes(redis: Redis, dynacut: Dynacut) -> None:
    """lookupKeyRead returning NULL: every key looks absent to GET."""
    redis.command("SET", "key", "old")
    dynacut.json(
        "live", "--pid", redis.pid, "--disable", "lookupKeyReadOrReply", "--on-hit", "return=0", "--as", "read"
    )
    with redis.connect(timeout=1) as connection, pytest.raises(TimeoutError):
        connection.command("GET", "key")  # the function would have made the reply: without it there is none
    assert redis.command("PING") == "PONG"
    dynacut.json("live", "--pid", redis.pid, "--undo")
    assert redis.command("GET", "key") == "old"


def test_a_thousand_times_off_and_on_under_load(redis: Redis, dynacut: Dynacut, rounds: Rounds) -> None:
    """Every SET is answered, by OK or by the error; everything else is answered as ever."""
    redis.command("SET", "key", "old")
    cycles = Path(__file__).with_name("cycles.py")

    def connected(words: tuple[str, ...]) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            connection = redis.connect()
            return lambda: connection.command(*words)

        return make

    def setting() -> Callable[[], object]:
        connection = redis.connect()

        def call() -> bool:
            reply = connection.command("SET", "other", "x")
            return reply == "OK" or (isinstance(reply, RedisError) and "cluster" in str(reply))

        return call

    with (
        Load.each(connected(("GET", "key")), 1, "old") as gets,
        Load.each(connected(("PING",)), 1, "PONG") as pings,
        Load.each(setting, 1, True) as sets,
    ):
        done = subprocess.run(
            [sys.executable, str(cycles), str(redis.pid), str(len(rounds(1000))), *dynacut.options],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        for one in (gets, pings, sets):
            one.wait_for(100)
    for one in (gets, pings, sets):
        assert (one.failures, one.wrong) == (0, 0), one.first
    hits = dynacut.json("live", "--pid", redis.pid)["features"]
    assert hits == json.loads(done.stdout)
    assert hits[0]["hits"] > 0, "SET was never caught while it was off"
    assert not is_gone(redis.pid)
