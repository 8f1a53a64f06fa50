"""From traffic to a tried plan, with no address found by hand: redis, nginx and lighttpd, all of them stripped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Dynacut
from .load import Load
from .servers import HttpServer, Lighttpd, Nginx, Redis, RedisError
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
