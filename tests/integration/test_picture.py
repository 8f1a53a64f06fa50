"""dynacut trace --show: what the picture of a traced redis says is what the logs, readelf and nm say."""

from __future__ import annotations

import re
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from picture_page import Module, Page

from dynacut.shared.coverage.drcov import read_log

from .conftest import Dynacut
from .servers import Nginx, RedisConnection, free_port
from .test_trace import begin
from .tracer import Tracer

PHASES = ("start", "wanted", "unwanted")


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The logs of a redis that was started, asked for GET, and then for SET."""
    folder = tmp_path_factory.mktemp("logs")
    port = free_port()
    command = ("redis-server", "--port", port, "--save", "", "--dir", folder)
    log = folder / "redis.drcov"
    dynacut = Dynacut()
    with Tracer("-o", log, "--phase-name", "start", "--ready-port", port, "--", *command) as tracer:
        tracer.await_line("phase serving begins")
        (server,) = psutil.Process(tracer.process.pid).children()
        try:
            for phase, words in (("wanted", ("GET", "key")), ("unwanted", ("SET", "key", "value")), ("end", ("PING",))):
                begin(dynacut, server.pid, phase, tracer)
                with RedisConnection(port) as connection:
                    connection.command(*words)
            server.terminate()
            tracer.process.communicate(timeout=60)
            assert tracer.process.returncode == 0
        finally:
            with suppress(psutil.NoSuchProcess):
                server.kill()  # a tracer that failed leaves it running
    return [folder / f"redis.{phase}.drcov" for phase in PHASES]


def text_pages(path: str) -> int:
    """The pages of executable segments, as readelf shows them."""
    listed = subprocess.run(["readelf", "-lW", path], capture_output=True, text=True, check=True).stdout
    pages = 0
    for address, size in re.findall(r"LOAD +\w+ 0x(\w+) \w+ 0x(\w+) \w+ +R E", listed):
        start, end = int(address, 16), int(address, 16) + int(size, 16)
        pages += -(-end // 4096) - start // 4096
    return pages


def entry(module: Module, name: str) -> int:
    """A function's entry, on which nm and the page agree."""
    listed = subprocess.run(["nm", "-D", "/usr/bin/redis-check-rdb"], capture_output=True, text=True, check=True).stdout
    (address,) = (int(line.split()[0], 16) for line in listed.splitlines() if line.endswith(f" {name}"))
    assert module.functions[name][0] == address
    return address


def test_the_numbers_are_those_of_the_logs(logs: list[Path], dynacut: Dynacut, tmp_path: Path) -> None:
    html = tmp_path / "redis.html"
    document = dynacut.json("trace", "--show", *logs, "--html", html)
    assert document["phases"] == list(PHASES)
    assert document["warnings"] == []
    (module,) = document["modules"]
    (drawn,) = Page(html.read_text("utf-8")).modules
    coverages = [read_log(log).coverage for log in logs]
    for index, (phase, coverage) in enumerate(zip(PHASES, coverages, strict=True)):
        (covered,) = coverage.modules
        others = [other for number, other in enumerate(coverages) if number != index]
        only = coverage.difference(*others)
        told = module["phases"][index]
        assert (told["blocks"], told["bytes"]) == (covered.count, covered.size_bytes)
        assert (told["only_here"]["blocks"], told["only_here"]["bytes"]) == (only.count, only.size_bytes)
        pages = {
            page for start, size in covered.blocks.items() for page in range(start // 4096, -(-(start + size) // 4096))
        }
        assert told["pages"] == len(pages)
        assert drawn.rows[phase] == [covered.count, covered.size_bytes, len(pages), only.count, only.size_bytes]
        assert drawn.covered(phase) == covered.size_bytes
        assert all(phase in drawn.run_at(start).phases for start in list(covered.blocks)[:200])
    executed = coverages[0].union(*coverages[1:])
    assert module["never_executed"]["blocks"] == module["blocks"] - executed.count > 50_000
    assert module["pages"] == text_pages("/usr/bin/redis-check-rdb")
    assert 0 < module["idle_pages"] < module["pages"]


def test_functions_have_the_colour_of_their_phase(logs: list[Path], dynacut: Dynacut, tmp_path: Path) -> None:
    html = tmp_path / "redis.html"
    done = dynacut("trace", "--show", *logs, "--html", html)
    assert (done.returncode, done.stderr) == (0, "")
    (module,) = Page(html.read_text("utf-8")).modules
    for name, phases in (
        ("initServerConfig", {"start"}),
        ("getCommand", {"wanted"}),
        ("setCommand", {"unwanted"}),
        ("processCommand", {"wanted", "unwanted"}),
        ("debugCommand", set()),
    ):
        run = module.run_at(entry(module, name))
        assert run.phases == phases, name
    assert html.stat().st_size < 400_000
    strips = dict(re.findall(r"^  (.+?) +\|(.*)\|$", done.stdout, re.MULTILINE))
    assert list(strips) == ["only start", "only wanted", "only unwanted", "several phases", "never executed"]
    assert len({len(strip) for strip in strips.values()}) == 1
    assert all(strip.strip() for strip in strips.values())


def test_a_program_is_drawn_with_a_large_library(nginx: Nginx, dynacut: Dynacut, tmp_path: Path) -> None:
    """libcrypto: some 600 pages and 140,000 blocks, of which these requests need none."""
    log, html = tmp_path / "nginx.wanted.drcov", tmp_path / "nginx.html"
    (worker, *_) = nginx.workers
    with Tracer("--pid", worker, "--module", "nginx", "--module", "libcrypto", "-o", log) as tracer:
        tracer.await_line("armed")
        for _ in range(20):
            assert nginx.request("GET", "/missing")[0] == 404
        tracer.end()
    document = dynacut.json("trace", "--show", log, "--html", html)
    modules = {module["name"].partition(".")[0]: module for module in document["modules"]}
    assert set(modules) == {"nginx", "libcrypto"}
    drawn = Page(html.read_text("utf-8")).modules
    assert [module.name for module in drawn] == [module["name"] for module in document["modules"]]
    covered = {module.path: module for module in read_log(log).coverage.modules}
    for told, shown in zip(document["modules"], drawn, strict=True):
        assert not told["from_log_alone"]
        assert told["pages"] == text_pages(told["path"]) == sum(run.end - run.start for run in shown.runs) // 4096
        assert told["phases"][0]["bytes"] == covered[told["path"]].size_bytes == shown.covered("wanted")
    assert modules["libcrypto"]["never_executed"]["blocks"] == modules["libcrypto"]["blocks"] > 100_000
    assert html.stat().st_size < 1_000_000
    only = dynacut.json("trace", "--show", log, "--module", "nginx")
    assert only["modules"] == [modules["nginx"]]
