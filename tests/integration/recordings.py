"""Servers recorded by `dynacut trace` from their start to their end, and the workload that they get."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from .conftest import Dynacut
from .servers import HttpServer, Redis, Server, free_port, wait_until
from .test_trace import begin
from .tracer import Tracer

COMMANDS = (
    *("FLUSHALL", "SET key value", "GET key", "PING", "LPUSH list a b", "LRANGE list 0 -1", "INCR n", "DEL key"),
    *("NONSENSE", "GET", "EXPIRE n 100", "TYPE list", "MSET a 1 b 2", "MGET a b c", "EXISTS a", "APPEND a 2"),
)
REQUESTS = (
    *(("GET", "/"), ("HEAD", "/"), ("GET", "/missing"), ("OPTIONS", "/"), ("NONSENSE", "/")),
    *(("PUT", "/new.txt"), ("GET", "/new.txt"), ("DELETE", "/new.txt"), ("MKCOL", "/folder/"), ("DELETE", "/folder/")),
)


def work(server: Server) -> list[object]:
    """The workload: everything that the server has to go on doing, and what it answers."""
    if isinstance(server, Redis):
        with server.connect() as connection:
            return [connection.command(*line.split()) for line in COMMANDS]
    assert isinstance(server, HttpServer)
    replies: list[object] = []
    for method, path in REQUESTS:
        status, _, body = server.request(method, path, "text" if method == "PUT" else None)
        replies.append((method, path, status, body))
    return replies


@dataclass(frozen=True)
class Recording:
    """A run of a server under the tracer: its start, its service, its end."""

    init: Path
    serving: Path
    end: Path

    @property
    def logs(self) -> tuple[str | Path, ...]:
        return ("--init", self.init, "--serving", self.serving, self.end)

    @property
    def logs_without_service(self) -> tuple[str | Path, ...]:
        """As if no request had been recorded: nearly everything that serves is taken for start-up code too."""
        return ("--init", self.init, "--serving", self.end)


def record(
    kind: type[Server],
    folder: Path,
    *,
    use: Callable[[int, int], None] | None = None,
    end: signal.Signals = signal.SIGTERM,
) -> Recording:
    """Records one. use: what it serves besides the workload, called with port and pid. end: the signal that ends it."""
    # What redis does in every tenth pass of replicationCron, one a second, it does in every one.
    server = Redis({"repl-ping-replica-period": 1}) if kind is Redis else kind()
    try:
        server.port = free_port()
        program = shutil.which(server.program, path=f"{os.environ['PATH']}:/usr/sbin")
        assert program is not None
        options = ("-o", folder / "log.drcov", "--phase-name", "init", "--ready-port", server.port)
        with Tracer(*options, "--", *server._prepare(Path(program))) as tracer:
            tracer.await_line("phase serving begins")
            (child,) = psutil.Process(tracer.process.pid).children()
            for _ in range(3):
                work(server)
            if isinstance(server, Redis):
                await_timers(server)
            if use is not None:
                use(server.port, child.pid)
            begin(Dynacut(), child.pid, "end", tracer)
            child.send_signal(end)
            _, errors = tracer.process.communicate(timeout=60)
            assert tracer.process.returncode == 0, errors
    finally:
        server._temporary.cleanup()
    return Recording(*(folder / f"log.{phase}.drcov" for phase in ("init", "serving", "end")))


def await_timers(redis: Redis) -> None:
    """Everything that redis does by itself, the rarest every five seconds, also for a client that asks nothing."""
    with redis.connect(), redis.connect() as client:

        def uptime() -> int:
            found = re.search(r"uptime_in_seconds:(\d+)", str(client.command("INFO", "server")))
            assert found is not None
            return int(found[1])

        began = uptime()
        wait_until(lambda: uptime() >= began + 7, "seven seconds of redis's own time", timeout=60)
