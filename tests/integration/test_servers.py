"""The tests' own tools: servers, load, and the programs in programs/."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from .load import Load
from .programs import Program, compile_program, feature
from .servers import (
    HttpServer,
    Lighttpd,
    Nginx,
    Redis,
    RedisError,
    Server,
    ServerFailed,
    ServerMissing,
    is_running,
    wait_until,
)

STILL = ("counter", "ownhandler", "fullmask", "forker", "seccomp", "altstack", "nondumpable", "eintr")
BUSY = {"counter": "calls", "threads": "right", "crunch": "calls"}


def test_redis_replies(redis: Redis) -> None:
    assert redis.command("SET", "key", "value") == "OK"
    assert redis.command("GET", "key") == "value"
    assert redis.command("GET", "other") is None
    assert redis.command("INCR", "n") == 1
    assert redis.command("MGET", "key", "other") == ["value", None]
    assert redis.command("NOSUCH") == RedisError("ERR unknown command 'NOSUCH', with args beginning with: ")
    with redis.connect() as connection:
        assert connection.command("PING") == "PONG"
    assert os.getsid(redis.pid) == redis.pid


def test_nginx_serves(nginx: Nginx) -> None:
    assert len(nginx.workers) == 2
    assert nginx.pid not in nginx.workers
    check_dav(nginx)


def test_lighttpd_serves(lighttpd: Lighttpd) -> None:
    assert lighttpd.workers == [lighttpd.pid]
    check_dav(lighttpd)


def check_dav(server: HttpServer) -> None:
    assert server.request("GET", "/")[::2] == (200, b"hello\n")
    with server.connect() as connection:
        assert connection.request("PUT", "/new", "text")[0] == 201
        assert connection.request("GET", "/new")[::2] == (200, b"text")
        assert connection.request("MKCOL", "/folder/")[0] == 201
        assert connection.request("DELETE", "/new")[0] == 204
        assert connection.request("GET", "/new")[0] == 404


@pytest.mark.parametrize("kind", [Redis, Nginx, Lighttpd])
def test_nothing_is_left(kind: type[Server]) -> None:
    server = kind()
    try:
        server.start()
    except ServerMissing as error:
        pytest.skip(str(error))
    family = [server.pid, *(child.pid for child in psutil.Process(server.pid).children())]
    os.kill(server.pid, signal.SIGKILL)  # its workers become orphans
    wait_until(lambda: not server.is_running(), "the end of the server")
    server.__exit__(None, None, None)
    assert not any(map(is_running, family))
    assert not server.directory.exists()


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(ServerFailed, match="nonsense"), Redis({"nonsense": 1}):
        pass


def test_load_counts(load: Callable[..., Load]) -> None:
    answers = iter([True, False, *[True] * 1_000_000])
    lock = threading.Lock()

    def call() -> bool:
        with lock:
            return next(answers)

    busy = load(call)
    busy.wait_for(100)
    busy.stop()
    assert busy.wrong == 1
    assert busy.count >= 99
    assert busy.failures == 0


def test_load_on_connections_of_its_own(redis: Redis) -> None:
    redis.command("SET", "key", "value")

    def connected() -> Callable[[], object]:
        connection = redis.connect()
        return lambda: connection.command("GET", "key")

    with Load.each(connected, threads=3, expect="value") as busy:
        busy.wait_for(1000)
    assert (busy.failures, busy.wrong) == (0, 0), busy.first


@pytest.mark.parametrize("name", STILL)
def test_feature(program: Callable[..., Program], name: str) -> None:
    running = program(name)
    assert running.ask("feature 3") == str(feature(3)) == "19"
    assert running.end() == 0


@pytest.mark.parametrize("name", BUSY)
def test_busy_programs_find_nothing_wrong(program: Callable[..., Program], name: str) -> None:
    running = program(name, 2)
    wait_until(lambda: running.counters()[BUSY[name]] > 1000, f"work of {name}")
    assert running.counters()["wrong"] == 0


def test_spinner(program: Callable[..., Program]) -> None:
    running = program("spinner", 3)
    assert running.ask("reset") == "ok"
    assert len(running.ask("report").split()) == 3
    assert running.ask("sites 5") == "10005"


def test_own_handler(program: Callable[..., Program]) -> None:
    running = program("ownhandler")
    assert running.ask("int3") == "hits 1 code 128"  # SI_KERNEL
    assert running.ask("int 3") == "hits 2 code 128"
    assert running.ask("raise") == "hits 3 code -6"  # SI_TKILL
    assert running.ask("own") == "1"


def test_full_mask(program: Callable[..., Program]) -> None:
    running = program("fullmask")
    for how in ("signal", "blocked", "ppoll"):
        assert running.ask(f"{how} 4") == str(feature(4))
    assert running.ask("masks") == "handler 1 thread 1"


def test_forker(program: Callable[..., Program]) -> None:
    running = program("forker")
    assert running.ask("fork 3") == "exit 0 result 19"
    child = int(running.ask("spawn"))
    assert running.ask("each 4") == str(feature(4))
    assert psutil.Process(child).ppid() == running.pid


@pytest.mark.parametrize("kind", ["allow", "errno", "kill"])
def test_seccomp(program: Callable[..., Program], kind: str) -> None:
    running = program("seccomp", kind)
    assert "Seccomp:\t2" in Path(f"/proc/{running.pid}/status").read_text()
    assert running.ask("feature 3") == "19"


def test_eintr(program: Callable[..., Program]) -> None:
    running = program("eintr")
    assert running.ask("report") == "blocked 7"
    assert running.ask("wake") == "woken 6"


def test_altstack(program: Callable[..., Program]) -> None:
    assert program("altstack").ask("deep 4") == str(feature(4))


def test_vforker(program: Callable[..., Program]) -> None:
    running = program("vforker")
    child = running.read_line()
    assert child.startswith("child ")
    assert psutil.Process(running.pid).status() == psutil.STATUS_DISK_SLEEP
    assert running.ask("wake") == "resumed 0"
    assert running.ask("feature 3") == "19"


def test_an_undumpable_program_belongs_to_root(tmp_path: Path) -> None:
    with Program(compile_program("nondumpable", tmp_path)) as running:
        assert Path(f"/proc/{running.pid}/mem").stat().st_uid == 0
