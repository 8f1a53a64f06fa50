"""Scope page: redis without its sentinel, whose code is not only int3 bytes then but gone."""

from __future__ import annotations

from pathlib import Path

from dynacut.live.process import Process
from dynacut.offline.images.image import Image
from dynacut.shared.binary.block_cache import cached_block_map
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.symbols import symbols
from dynacut.shared.on_hit import OnHit
from dynacut.shared.plan import Plan, PlannedFeature, PlannedModule, PlannedSite, Scope
from dynacut.shared.plan_file import dumps
from dynacut.shared.proc import read_mappings
from dynacut.shared.region import find_region

from .conftest import Dynacut
from .servers import Redis
from .test_live_redis import EXECUTABLE, benchmark
from .test_offline import checkpointed, table_of
from .untouched import Snapshot


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


def text_pages(pid: int) -> int:
    """How many pages of the executable's code are mapped."""
    return sum(part.size // 4096 for part in read_mappings(pid) if part.executable and part.path == str(EXECUTABLE))


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
    with Image(tmp_path / "layer") as rewritten, Process(redis.pid) as live:
        (offline,) = rewritten.processes
        ours = [part for part in offline.mappings if part.executable and part.is_file]
        theirs = [part for part in live.mappings if part.executable and part.is_file]
        assert [(part.start, part.end, part.file_offset) for part in ours] == [
            (part.start, part.end, part.file_offset) for part in theirs
        ]
        for part in ours:
            assert offline.read(part.start, part.size) == live.read(part.start, part.size)
        assert table_of(offline) == table_of(live)
        assert find_region(offline) is not None
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


def test_learning_by_pages_is_refused(redis: Redis, dynacut: Dynacut, tmp_path: Path) -> None:
    done = dynacut("live", "--pid", redis.pid, "--plan", sentinel_plan(tmp_path / "plan.toml", "learn"))
    assert done.returncode == 1
    assert "use block" in done.stderr
