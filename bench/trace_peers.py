"""Who collects coverage of a redis-server: dynacut, callgrind (valgrind), and Frida's Stalker in two ways."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.figures import DYNACUT
from bench.peers import PEER_FOLDER, has_package, package_environment
from bench.programs import BenchmarkError
from tests.integration.servers import Redis
from tests.integration.tracer import Tracer

CALLGRIND = "callgrind"
STALKER = "Frida's Stalker"
STALKER_BLOCKS = "Frida's Stalker, each block"
_PATIENCE = 60.0


@dataclass
class Collected:
    """attach_ms: from the start of the tool until it collects. found: blocks or, by callgrind, instructions."""

    attach_ms: float
    found: int = 0


@dataclass(frozen=True)
class Collector:
    """A tool. collecting: collects as long as the context lasts; afterwards `found` is set.

    attaches: whether to a redis that runs; else `server` starts one under the tool. share: how many of the requests it
    is asked to bear, as the slow ones would take minutes.
    """

    name: str
    server: Callable[[], Redis]
    collecting: Callable[[Redis, Path], AbstractContextManager[Collected]]
    attaches: bool
    share: float


def collectors() -> tuple[list[Collector], list[str]]:
    """The tools that are there; and for each that is not, what is missing and how to get it."""
    found = [Collector(DYNACUT, Redis, _traced, attaches=True, share=1.0)]
    missing = []
    if shutil.which("valgrind"):
        found.append(Collector(CALLGRIND, _CallgrindRedis, _ended, attaches=False, share=0.05))
    else:
        missing.append(f"{CALLGRIND}: valgrind is not installed (Debian: apt-get install valgrind)")
    if has_package("frida"):
        found.append(Collector(STALKER, Redis, partial(_stalked, "compile"), attaches=True, share=0.05))
        found.append(Collector(STALKER_BLOCKS, Redis, partial(_stalked, "block"), attaches=True, share=0.02))
    else:
        missing.append(f"{STALKER}: not installed (pip install --target {PEER_FOLDER} frida)")
    return found, missing


@contextmanager
def _traced(redis: Redis, folder: Path) -> Iterator[Collected]:
    started = time.perf_counter()
    with Tracer("--pid", redis.pid, "--json", "-o", folder / "redis.drcov") as tracer:
        tracer.await_line("armed")
        collected = Collected((time.perf_counter() - started) * 1000)
        yield collected
        (phase,) = json.loads(tracer.end())["phases"]
        collected.found = phase["blocks"]


@contextmanager
def _stalked(event: str, redis: Redis, folder: Path) -> Iterator[Collected]:
    del folder
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("trace_frida.py")), str(redis.pid), event],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=package_environment(),
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if line != "following\n":
            raise BenchmarkError(f"{STALKER} does not follow redis: {line}{process.communicate()[1]}")
        collected = Collected((time.perf_counter() - started) * 1000)
        yield collected
        output, errors = process.communicate(timeout=_PATIENCE)
        if not output.strip().isdigit():
            raise BenchmarkError(f"{STALKER} has ended without a result: {errors}")
        collected.found = int(output)
    finally:
        process.kill()
        process.communicate()


class _CallgrindRedis(Redis):
    """A redis-server under callgrind, which writes its log when redis ends."""

    def __init__(self) -> None:
        super().__init__({"shutdown-on-sigterm": "nosave"})
        self.log_file = self.directory / "callgrind"
        self.started_at = time.perf_counter()

    def _prepare(self, program: Path) -> list[str]:
        self.started_at = time.perf_counter()
        return [
            "valgrind", "--tool=callgrind", "--dump-instr=yes", "--compress-pos=no", "--compress-strings=no",
            f"--callgrind-out-file={self.log_file}", *super()._prepare(program),
        ]  # fmt: skip


@contextmanager
def _ended(redis: Redis, folder: Path) -> Iterator[Collected]:
    """Ends redis at the end, for the log; collecting has begun with the server."""
    del folder
    assert isinstance(redis, _CallgrindRedis)
    collected = Collected((time.perf_counter() - redis.started_at) * 1000)
    yield collected
    process = redis._process
    assert process is not None
    process.terminate()
    process.wait(_PATIENCE)
    collected.found = len(_instructions(redis.log_file))


def _instructions(log: Path) -> set[str]:
    """The addresses of the executable's instructions in callgrind's log ("Callgrind Format Specification")."""
    executable = str(Path(shutil.which("redis-server") or "").resolve())
    found = set()
    file = ""
    for line in log.read_text().splitlines():
        if line.startswith("ob="):
            file = line.removeprefix("ob=")
        elif line.startswith("0x") and file == executable:
            found.add(line.partition(" ")[0])
    return found
