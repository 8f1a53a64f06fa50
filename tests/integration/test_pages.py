"""Scope page: code that is not only int3 bytes then but gone. redis without its sentinel; nginx and lighttpd without
pages that no later phase has executed anything of."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from dynacut.live.process import Process
from dynacut.offline.images.image import Image
from dynacut.shared.binary.block_cache import cached_block_map
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.symbols import symbols
from dynacut.shared.coverage.drcov import read_union
from dynacut.shared.coverage.startup import startup_code, startup_plan
from dynacut.shared.on_hit import OnHit
from dynacut.shared.plan import Plan, PlannedFeature, PlannedModule, PlannedSite, Scope
from dynacut.shared.plan_file import dumps
from dynacut.shared.proc import read_mappings

from .checkpoints import the_criu
from .conftest import Dynacut
from .http_workload import reload, requests
from .recordings import Recording, record, work
from .servers import HttpServer, Nginx, Redis
from .test_live_redis import EXECUTABLE, benchmark
from .test_offline import checkpointed, end, table_of, tree_of
from .trims import ended
from .untouched import Snapshot

_MOST_BLOCKS = 8_000  # in a plan: more take their time


def sentinel_plan(path: Path, on_hit: str = "terminate") -> Path:
    """All blocks from the first to the last function that is called sentinel…: a server does not run them."""
    elf = ElfFile.open(EXECUTABLE)
    starts = [one.offset for one in symbols(elf) if one.kind == "function" and one.name.startswith("sentinel")]
    inside = cached_block_map(elf).blocks_in(min(starts), max(starts))
    sites = tuple(PlannedSite(f"redis-server+{block.start:#x}", block.size) for block in inside)
    feature = PlannedFeature("sentinel", OnHit.parse(on_hit), Scope.PAGE, sites)
    plan = Plan("no sentinel", (feature,), modules={"redis-server": PlannedModule(str(EXECUTABLE), elf.build_id)})
    path.write_text(dumps(plan))
    return path


def cold_plan(recording: Recording, path: Path) -> Path:
    """What start-up executed, and what never ran, on pages that no later phase has executed anything of."""
    init, later = (read_union(logs, print) for logs in ([recording.init], [recording.serving, recording.end]))
    (part,) = startup_code(init, [later])
    warm = {page for offset, size in part.later.items() for page in (offset // 4096, (offset + size - 1) // 4096)}
    text = part.code.elf.section(".text")
    assert text is not None
    start = text.address - part.code.elf.link_base
    blocks = [
        block
        for block in part.code.blocks.blocks_in(start, start + text.size)
        if not warm & {block.start // 4096, (block.end - 1) // 4096}
    ]
    cold = replace(part, init={block.start: block.size for block in blocks[-_MOST_BLOCKS:]})
    path.write_text(dumps(startup_plan([cold], OnHit.parse("terminate"), Scope.PAGE)))
    return path


def text_pages(pid: int) -> int:
    """How many pages of the executable's code are mapped."""
    executable = str(Path(f"/proc/{pid}/exe").readlink())
    return sum(part.size // 4096 for part in read_mappings(pid) if part.executable and part.path == executable)


def test_pages_go_and_come_back_under_load(redis: Redis, dynacut: Dynacut, tmp_path: Path) -> None:
    plan = sentinel_plan(tmp_path / "plan.toml")
    target = ("live", "--pid", redis.pid)
    before, pages = Snapshot.of(redis.pid), text_pages(redis.pid)
    with benchmark(redis):
        report = dynacut.json(*target, "--plan", plan)
        (feature,) = report["features"]
        gone = feature["unmapped_pages"]
        assert gone >= 8
        assert text_pages(redis.pid) == pages - gone
        assert feature["state"] == "disabled"
        assert feature["patched"] == feature["sites"]
        assert redis.command("SET", "key", "x") == "OK"
        dynacut.json(*target, "--enable", "sentinel")
        assert text_pages(redis.pid) == pages
        assert dynacut.json(*target)["features"][0]["state"] == "enabled"
        dynacut.json(*target, "--disable", "sentinel")
        assert text_pages(redis.pid) == pages - gone
        dynacut.json(*target, "--undo")
    assert text_pages(redis.pid) == pages
    after = Snapshot.of(redis.pid)
    # One VMA became several; what is mapped, and from where, is the same.
    assert joined(after) == joined(before)
    assert after.masks == before.masks


def joined(snapshot: Snapshot) -> dict[int, bytes]:
    """The code of a snapshot, neighbouring mappings in one piece."""
    whole: dict[int, bytes] = {}
    for start in sorted(snapshot.code):
        previous = next((first for first, data in whole.items() if first + len(data) == start), None)
        if previous is None:
            whole[start] = snapshot.code[start]
        else:
            whole[previous] += snapshot.code[start]
    return whole


def test_pages_are_unmapped_in_an_image_as_live(redis: Redis, dynacut: Dynacut, tmp_path: Path) -> None:
    """The same VMAs, the same bytes, the same table; after the restore live maps the pages back."""
    plan = sentinel_plan(tmp_path / "plan.toml")
    redis.disconnect()
    image = tmp_path / "image"
    dynacut.json("checkpoint", "--pid", redis.pid, image, "--leave-running")
    report = dynacut.json("offline", image, "--plan", plan, "-o", tmp_path / "layer")
    gone = report["features"][0]["unmapped_pages"]
    pages = text_pages(redis.pid)
    dynacut.json("live", "--pid", redis.pid, "--plan", plan)
    assert_the_same(tmp_path / "layer", [redis.pid])
    dynacut.json("live", "--pid", redis.pid, "--undo")

    checkpointed(redis, dynacut, tmp_path / "second")
    dynacut.json("offline", tmp_path / "second", "--plan", plan, "-o", tmp_path / "without")
    dynacut.json("offline", tmp_path / "without", "--undo", "-o", tmp_path / "undone")
    dynacut.json("restore", tmp_path / "without")
    assert text_pages(redis.pid) == pages - gone
    with redis.connect() as client:
        assert client.command("SET", "key", "x") == "OK"
        dynacut.json("live", "--pid", redis.pid, "--undo")
        assert text_pages(redis.pid) == pages
        assert client.command("GET", "key") == "x"


def assert_the_same(image: Path, pids: list[int]) -> None:
    """An image's processes and those that run have the same code mapped at the same places, and the same table."""
    with Image(image) as rewritten:
        assert sorted(process.pid for process in rewritten.processes) == sorted(pids)
        for offline in rewritten.processes:
            with Process(offline.pid) as live:
                ours, theirs = (
                    [part for part in of.mappings if part.executable and part.is_file] for of in (offline, live)
                )
                assert [(part.start, part.end, part.file_offset) for part in ours] == [
                    (part.start, part.end, part.file_offset) for part in theirs
                ]
                for part in ours:
                    assert offline.read(part.start, part.size) == live.read(part.start, part.size)
                assert table_of(offline) == table_of(live)


@pytest.mark.parametrize(("name", "end_by"), [("nginx", signal.SIGQUIT), ("lighttpd", signal.SIGINT)])
def test_cold_pages_of_a_web_server_go_both_ways(
    name: str, end_by: signal.Signals, request: pytest.FixtureRequest, dynacut: Dynacut, tmp_path: Path
) -> None:
    """For good, in all processes: the whole workload passes, nginx reloads, and both end gracefully."""
    the_criu()
    server: HttpServer = request.getfixturevalue(name)

    def use(port: int, pid: int) -> None:
        requests(port)
        if isinstance(server, Nginx):
            reload(pid)
            requests(port)

    expected, pages = work(server), text_pages(server.pid)
    plan = cold_plan(record(type(server), tmp_path, use=use, end=end_by), tmp_path / "plan.toml")
    tree, image = ("live", "--tree", "--pid", server.pid), tmp_path / "image"
    dynacut.json("checkpoint", "--pid", server.pid, image, "--leave-running")
    dynacut.json("offline", image, "--standing", "-o", tmp_path / "offline.drcov")
    dynacut.json(*tree, "--standing", "-o", tmp_path / "live.drcov")
    dynacut.json("plan", "--plan", plan, "--keep", tmp_path / "live.drcov", tmp_path / "offline.drcov")
    report = dynacut.json("offline", image, "--plan", plan, "-o", tmp_path / "layer")
    gone = report["features"][0]["unmapped_pages"]
    assert gone >= 4
    dynacut.json(*tree, "--plan", plan)
    assert_the_same(tmp_path / "layer", tree_of(server))

    def assert_it_works() -> None:
        assert [text_pages(pid) for pid in tree_of(server)] == [pages - gone] * len(tree_of(server))
        use(server.port, server.pid)
        assert work(server) == expected
        assert dynacut.json(*tree)["features"][0]["hits"] == 0

    assert_it_works()
    dynacut.json(*tree, "--undo")
    assert [text_pages(pid) for pid in tree_of(server)] == [pages] * len(tree_of(server))
    end(tree_of(server))
    dynacut.json("restore", tmp_path / "layer")
    assert_it_works()
    os.kill(server.pid, end_by)
    assert ended(server.pid) == 0


def test_learning_by_pages_is_refused(redis: Redis, dynacut: Dynacut, tmp_path: Path) -> None:
    done = dynacut("live", "--pid", redis.pid, "--plan", sentinel_plan(tmp_path / "plan.toml", "learn"))
    assert done.returncode == 1
    assert "use block" in done.stderr
