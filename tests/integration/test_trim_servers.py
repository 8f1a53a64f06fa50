"""dynacut trim of real servers: redis, nginx with its workers, lighttpd; they go on doing their work.

What is removed of redis and lighttpd goes on learning: what their state makes them do only later (redis numbers its
clients, in a tree whose shape depends on the numbers) is not to fail a test. bench/trim.py removes for good.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from .checkpoints import the_criu
from .conftest import Dynacut
from .http_workload import reload, requests
from .servers import Lighttpd, Nginx, Server, free_port, wait_until
from .trims import Trims, assert_trimmed, ended

WORKLOAD = Path(__file__).with_name("http_workload.py")


def brought_back(dynacut: Dynacut, report: dict[str, Any]) -> int:
    """How many of the removed blocks were needed after all since the report; few."""
    learned = dynacut.json("live", "--tree", "--pid", report["target"]["pid"], "--learned")["learned"]
    (module,) = report["modules"]
    assert module["removed"]["blocks"] - len(learned) >= 0.9 * module["startup"]["blocks"]
    return len(learned)


def answers(port: int) -> bool:
    """Whether a redis-server answers there."""
    asked = subprocess.run(["redis-cli", "-p", str(port), "ping"], capture_output=True, check=False)
    return b"PONG" in asked.stdout


def rate(port: int, test: str) -> float:
    """Requests per second that redis-benchmark sees."""
    done = subprocess.run(
        ["redis-benchmark", "-p", str(port), "-n", "20000", "-t", test, "--csv"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return float(done.stdout.splitlines()[-1].split(",")[1].strip('"'))


@pytest.mark.slow
def test_redis_serves_its_whole_benchmark(trim: Trims, dynacut: Dynacut, tmp_path: Path) -> None:
    the_criu()
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    port, other = free_port(), free_port()
    # What redis's replicationCron does every tenth time, once in ten seconds, it is to do every time.
    options = ("--save", "", "--dir", str(tmp_path), "--repl-ping-replica-period", "1")
    work = f"redis-benchmark -p {port} -n 300 -q"
    save = f"redis-cli -p {port} bgsave && until redis-cli -p {port} info | grep -q in_progress:0; do sleep 0.05; done"
    passes = ("--passes", "5", "--quiet-passes", "2", "--idle", "0.1", "--linger", "1")
    command = ("redis-server", "--port", str(port), *options)
    report = trim("--ready-port", port, "--workload", work, "--serve", save, *passes, "--", *command)
    assert_trimmed(report)
    pid = report["target"]["pid"]
    subprocess.run(work.split(), check=True, capture_output=True, timeout=120)
    with subprocess.Popen(["redis-server", "--port", str(other), *options], stdout=subprocess.DEVNULL) as untouched:
        wait_until(lambda: answers(other), "the untouched redis")
        pairs = [(rate(port, "get"), rate(other, "get")) for _ in range(3)]
        untouched.terminate()
    assert brought_back(dynacut, report) < 100
    assert max(one for one, _ in pairs) > 0.5 * max(both for _, both in pairs), pairs  # figures: bench/trim.py
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 0
    assert "bye bye" in (trim.directory / "output.log").read_text()


def command_of(server: Server) -> list[str]:
    """Its command line, with its port and files; the server itself is ended."""
    command: list[str] = server._process.args  # type: ignore[union-attr, assignment]
    server.end()
    return command


@pytest.mark.slow
def test_nginx_serves_reloads_and_ends(nginx: Nginx, trim: Trims, dynacut: Dynacut) -> None:
    """The master and its workers, for good, by way of a checkpoint; reload and graceful shutdown were traced."""
    the_criu()
    port, command = nginx.port, command_of(nginx)
    work = f"{sys.executable} {WORKLOAD} {port} --reload $DYNACUT_PID"
    phases = ("--ready-port", port, "--workload", work, "--shutdown", "kill -QUIT $DYNACUT_PID")
    passes = ("--passes", "8", "--quiet-passes", "2", "--idle", "0.2", "--linger", "0")
    report = trim(*phases, *passes, "--scope", "page", "--on-hit", "terminate", "--", *command)
    assert_trimmed(report)
    pid = report["target"]["pid"]
    requests(port)
    reload(pid)
    requests(port)
    (feature,) = dynacut.json("live", "--tree", "--pid", pid)["features"]
    assert (feature["state"], feature["hits"]) == ("disabled", 0)
    os.kill(pid, signal.SIGQUIT)
    assert ended(pid) == 0


@pytest.mark.slow
def test_lighttpd_serves_and_ends(lighttpd: Lighttpd, trim: Trims, dynacut: Dynacut) -> None:
    """In the running process."""
    port, command = lighttpd.port, command_of(lighttpd)
    work = f"{sys.executable} {WORKLOAD} {port}"
    how = ("--live", "--quiet-passes", "2", "--idle", "0.2", "--linger", "2")
    report = trim(*how, "--ready-port", port, "--workload", work, "--", *command)
    assert_trimmed(report)
    pid = report["target"]["pid"]
    requests(port)
    # With a connection left, an untouched lighttpd ends with 1 as well, and by other code than was traced here.
    wait_until(lambda: len(psutil.Process(pid).net_connections("tcp")) == 1, "the end of all connections")
    assert brought_back(dynacut, report) < 100
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 0
    assert "server stopped by UID" in (trim.directory / "output.log").read_text().splitlines()[-1]
