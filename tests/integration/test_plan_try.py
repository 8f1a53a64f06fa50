"""From traffic to a tried plan, with no address found by hand: redis, nginx and lighttpd, all of them stripped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from .conftest import Dynacut
from .load import Load
from .programs import compile_program
from .servers import HttpServer, Lighttpd, Nginx, Redis, RedisError, free_port, wait_until
from .test_offline import checkpointed
from .test_trace import begin
from .tracer import Tracer
from .untouched import Snapshot

REDIS_REQUESTS = (
    *(
        "GET key",
        "PING",
        "LPUSH list a",
        "INCR n",
        "DEL x",
        "NONSENSE",
        "GET",
        "APPEND s x",
        "EXISTS key",
        "MGET key n",
    ),
    *("EXPIRE s 100", "TYPE key", "STRLEN key", "GETSET q 1", "SETNX z 1", "MSET a 1 b 2", "INFO", "TTL s"),
)


def record(
    dynacut: Dynacut, pid: int, log: Path, wanted: Callable[[], None], unwanted: Callable[[], None], *modules: str
) -> None:
    """Two phases: wanted requests, several passes of them; then the unwanted ones."""
    chosen = [word for module in modules for word in ("--module", module)]
    with Tracer("--pid", pid, "-o", log, "--phase-name", "warm", *chosen) as tracer:
        tracer.await_line("armed")
        wanted()
        unwanted()
        begin(dynacut, pid, "wanted", tracer)
        for _ in range(4):
            wanted()
        begin(dynacut, pid, "unwanted", tracer)
        unwanted()
        unwanted()
        begin(dynacut, pid, "end", tracer)
        tracer.end()


def logs(log: Path) -> tuple[str | Path, ...]:
    stem = log.name.removesuffix(".drcov")
    return (
        "--wanted",
        log.with_name(f"{stem}.wanted.drcov"),
        "--unwanted",
        log.with_name(f"{stem}.unwanted.drcov"),
    )


def test_redis_set(redis: Redis, dynacut: Dynacut, tmp_path: Path) -> None:
    redis.command("SET", "key", "value")
    before = Snapshot.of(redis.pid)

    def wanted() -> None:
        for line in REDIS_REQUESTS:
            redis.command(*line.split())

    def unwanted() -> None:
        redis.command("SET", "key", "value")

    log, plan = tmp_path / "redis.drcov", tmp_path / "set.toml"
    record(dynacut, redis.pid, log, wanted, unwanted)
    cli = f"redis-cli -p {redis.port} -e"
    report = dynacut.json(
        "plan", *logs(log), "--name", "set", "-o", plan, "--try", "--pid", redis.pid,
        "--probe-unwanted", f"{cli} set probe x", "--probe-wanted", f"{cli} get key",
        "--probe-wanted", f"{cli} lpush list x", "--probe-wanted", f"{cli} incr n",
    )  # fmt: skip
    assert report["works"] is True
    assert Snapshot.of(redis.pid) == before

    dynacut.json("live", "--pid", redis.pid, "--plan", plan)
    assert isinstance(redis.command("SET", "key", "other"), RedisError)
    assert redis.command("GET", "key") == "value"
    assert isinstance(redis.command("LPUSH", "list", "x"), int)
    dynacut.json("live", "--pid", redis.pid, "--undo")
    assert redis.command("SET", "key", "other") == "OK"


def check_http(
    server: HttpServer, dynacut: Dynacut, tmp_path: Path, method: str, traced: int, modules: list[str], *options: str
) -> None:
    """One method of a web server: traffic, plan, refusal by the server itself, undo."""

    def wanted() -> None:
        for request in ("GET /", "HEAD /", "GET /missing", "POST /", "OPTIONS /", "NONSENSE /"):
            server.request(*request.split())
        if method != "PUT":
            server.request("PUT", "/w.txt", "w")
        if method != "DELETE":
            (server.docroot / "d.txt").write_text("d")
            server.request("DELETE", "/d.txt")
        server.request("PUT" if method != "PUT" else "DELETE", "/no/such/folder/x", "")

    def do(name: str) -> int:
        """The unwanted request; its status."""
        if method == "DELETE":
            (server.docroot / name).write_text("u")
        if method == "MKCOL":
            (server.docroot / name).rmdir() if (server.docroot / name).exists() else None
            return server.request(method, f"/{name}/")[0]
        return server.request(method, f"/{name}", "u" if method == "PUT" else None)[0]

    def unwanted() -> None:
        assert do("u") in (200, 201, 204)

    log, plan = tmp_path / "http.drcov", tmp_path / "method.toml"
    record(dynacut, traced, log, wanted, unwanted, *modules)
    url = f"http://127.0.0.1:{server.port}"
    file = tmp_path / "file"
    file.write_text("x")
    probe = f"curl -sf -o /dev/null -T {file} {url}/p.txt"
    if method == "DELETE":
        probe = f"touch {server.docroot}/p.txt; curl -sf -o /dev/null -X DELETE {url}/p.txt"
    if method == "MKCOL":
        probe = f"rmdir {server.docroot}/p; curl -sf -o /dev/null -X MKCOL {url}/p/"
    report = dynacut.json(
        "plan", *logs(log), "--name", "method", "-o", plan, "--try", *options, "--pid", server.pid,
        "--probe-unwanted", probe, "--probe-wanted", f"curl -sf -o /dev/null {url}/",
    )  # fmt: skip
    assert report["works"] is True

    dynacut.json("live", "--pid", server.pid, *options, "--plan", plan)
    for _ in range(4):
        assert do("v") >= 400
    assert server.request("GET", "/")[::2] == (200, b"hello\n")
    assert server.request("GET", "/missing")[0] == 404
    dynacut.json("live", "--pid", server.pid, *options, "--undo")
    assert do("v") in (200, 201, 204)
    check_offline(server, dynacut, plan, do)


def check_offline(server: HttpServer, dynacut: Dynacut, plan: Path, do: Callable[[str], int]) -> None:
    """The same plan by way of a checkpoint, under load: the connections go on, and the method is refused."""

    def get() -> Callable[[], object]:
        connection = server.connect()
        return lambda: connection.request("GET", "/")[::2] == (200, b"hello\n")

    with Load.each(get, threads=2, expect=True) as gets:
        gets.wait_for(50)
        image = checkpointed(server, dynacut, plan.with_name("image"))
        dynacut.json("offline", image, "--plan", plan, "-o", plan.with_name("layer"))
        dynacut.json("restore", plan.with_name("layer"))
        for _ in range(4):
            assert do("v") >= 400
        gets.wait_for(50)
        dynacut.json("live", "--pid", server.pid, "--tree", "--undo")
        assert do("v") in (200, 201, 204)
    assert (gets.failures, gets.wrong) == (0, 0), gets.first


@pytest.mark.parametrize("method", ["PUT", "DELETE", "MKCOL"])
def test_nginx(dynacut: Dynacut, tmp_path: Path, method: str) -> None:
    with Nginx(workers=1) as nginx:
        (worker,) = nginx.workers
        check_http(nginx, dynacut, tmp_path, method, worker, [], "--tree")


def test_requests_that_the_server_refuses_show_the_way(dynacut: Dynacut, tmp_path: Path) -> None:
    """--error: PUT to a folder is a conflict for nginx, so its own refusal of PUT is known, and preferred."""
    log, plan = tmp_path / "http.drcov", tmp_path / "put.toml"
    with Nginx(workers=1) as nginx:
        (worker,) = nginx.workers

        def get() -> None:
            assert nginx.request("GET", "/")[0] == 200
            assert nginx.request("GET", "/missing")[0] == 404

        def put() -> None:
            assert nginx.request("PUT", "/u.txt", "u")[0] in (201, 204)

        with Tracer("--pid", worker, "-o", log, "--phase-name", "warm") as tracer:
            tracer.await_line("armed")
            for _ in range(3):
                get()
            begin(dynacut, worker, "wanted", tracer)
            for _ in range(4):
                get()
            begin(dynacut, worker, "unwanted", tracer)
            put()
            begin(dynacut, worker, "error", tracer)
            assert nginx.request("PUT", "/folder/", "u")[0] == 409
            begin(dynacut, worker, "end", tracer)
            tracer.end()
        url = f"http://127.0.0.1:{nginx.port}"
        probes = (
            "--try", "--tree", "--pid", nginx.pid, "--probe-wanted", f"curl -sf -o /dev/null {url}/",
            "--probe-unwanted", f"curl -sf -o /dev/null -T {plan.with_suffix('.body')} {url}/p.txt",
        )  # fmt: skip
        plan.with_suffix(".body").write_text("x")
        told = dynacut.json("plan", *logs(log), "--error", tmp_path / "http.error.drcov", "-o", plan, *probes)
        untold = dynacut.json("plan", *logs(log), "-o", tmp_path / "other.toml")
        assert told["works"] is True
        assert "refused requests" in told["reason"]
        assert "refused requests" not in untold["reason"]
        dynacut.json("live", "--tree", "--pid", nginx.pid, "--plan", plan)
        assert nginx.request("PUT", "/u.txt", "u")[0] >= 400
        get()


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_lighttpd(lighttpd: Lighttpd, dynacut: Dynacut, tmp_path: Path, method: str) -> None:
    check_http(lighttpd, dynacut, tmp_path, method, lighttpd.pid, ["lighttpd", "mod_webdav"])


@pytest.fixture
def commands(dynacut: Dynacut, tmp_path: Path) -> Commands:
    """A server with a table of commands, of which `store` is unwanted, and its coverage."""
    program, port, log = compile_program("commands", tmp_path), free_port(), tmp_path / "commands.drcov"
    found = Commands(program, port, logs(log))
    with Tracer("-o", log, "--ready-port", port, "--", program, port) as tracer:
        pid = int(tracer.await_line("armed").partition("process ")[2].split()[0])
        tracer.await_line("phase serving begins")
        try:
            for phase in ("warm", "wanted", "unwanted"):
                begin(dynacut, pid, phase, tracer)
                for line in ("store x",) if phase == "unwanted" else ("get", "ping", "nonsense", "ping x"):
                    found.ask(line)
        finally:
            os.kill(pid, signal.SIGKILL)  # which ends the trace as well
        tracer.process.communicate(timeout=60)
        assert tracer.process.returncode == 0
    return found


@dataclass(frozen=True)
class Commands:
    program: Path
    port: int
    logs: tuple[str | Path, ...]

    @property
    def server(self) -> tuple[str | int | Path, ...]:
        return ("--", self.program, self.port)

    def probe(self, line: str) -> str:
        return f"{self.program} {self.port} {line}"

    def ask(self, line: str) -> bool:
        return subprocess.run(self.probe(line).split(), stdin=subprocess.DEVNULL, check=False).returncode == 0


def test_an_instance_is_started_and_started_again_when_a_trial_ends_it(
    commands: Commands, dynacut: Dynacut, tmp_path: Path
) -> None:
    """The first way leads to a command that ends the server; the record of it stands in the plan."""
    plan = tmp_path / "store.toml"
    options = (*commands.logs, "--name", "store", "-o", plan, "--try")
    probes = ("--probe-unwanted", commands.probe("store x"), "--probe-wanted", commands.probe("get"))
    done = dynacut("plan", "--json", *options, *probes, *commands.server)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["trials"] == ["it ends the server", "works"]
    assert report["works"] is True
    assert (report["entry"], report["blocks"]) == ("store", report["functions"][0]["blocks"])
    assert "1. store → leave: it ends the server" in plan.read_text()
    assert not commands.ask("get"), "the instance was ended"
    server = subprocess.Popen([str(word) for word in commands.server[1:]], stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: commands.ask("store one"), "the server")
        dynacut.json("live", "--pid", server.pid, "--plan", plan)
        assert not commands.ask("store two")
        assert commands.ask("get")
        assert commands.ask("ping")
        dynacut.json("live", "--pid", server.pid, "--undo")
        assert commands.ask("store three")
    finally:
        server.kill()
        server.wait()


def test_no_instance_is_left_behind(commands: Commands, dynacut: Dynacut, tmp_path: Path) -> None:
    """Whether its probes fail from the start, no way works, or the trial is interrupted."""
    plan = tmp_path / "store.toml"
    options = ("plan", *commands.logs, "-o", plan, "--try", "--probe-wanted", commands.probe("get"))
    done = dynacut(*options, "--probe-unwanted", "false", *commands.server)
    assert done.returncode == 1
    assert "does not answer as it should: false: exit status 1" in done.stderr
    done = dynacut(*options, "--probe-unwanted", commands.probe("store x"), "--trials", "1", *commands.server)
    assert done.returncode == 1
    assert "1. store → leave: it ends the server" in done.stderr
    assert not plan.exists()
    assert not commands.ask("get")
    done = dynacut(*options, "--probe-unwanted", "true", "--", tmp_path / "missing", "--flag")
    assert done.returncode == 1
    assert "cannot be executed" in done.stderr
    begun = tmp_path / "begun"
    command = [*options, "--probe-unwanted", f"test ! -e {begun} || sleep 8; {commands.probe('store x')}"]
    with subprocess.Popen(
        [sys.executable, "-m", "dynacut.cli.main", *map(str, [*command, "--probe-timeout", "90", *commands.server])],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as trial:  # fmt: skip
        wait_until(lambda: commands.ask("get"), "the instance", 60)
        begun.touch()
        trial.send_signal(signal.SIGINT)
        trial.wait(60)
    assert not commands.ask("get")


def test_what_was_found_is_told_with_names_lines_and_instructions(
    commands: Commands, dynacut: Dynacut, tmp_path: Path
) -> None:
    done = dynacut("plan", *commands.logs, "--name", "store", "-o", tmp_path / "store.toml")
    assert done.returncode == 0, done.stderr
    source = (Path(__file__).parent / "programs" / "commands.c").read_text().splitlines()
    line = source.index("NOIPA static void store(int client, const char *word)") + 2  # where its brace opens
    assert re.search(rf"^commands\tstore\t\d+ of \d+\tentered by them only\tcommands.c:{line}$", done.stdout, re.M)
    assert re.search(rf"stopped at store \(commands\+0x[0-9a-f]+, commands.c:{line}\)", done.stdout)
    assert re.search(r"^    0x[0-9a-f]+: [0-9a-f ]+ call 0x[0-9a-f]+  ; say$", done.stdout, re.M)
    assert 'Why: store ("store") is called only through a table of 5 functions' in done.stdout
    assert re.search(r"\d+ other ways found, the next: store → ", done.stdout)
    assert "not tried yet" in done.stdout
