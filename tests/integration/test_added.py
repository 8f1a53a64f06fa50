"""Plans that add memory and take pages of code away: redis's SET goes through code that was not there before."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from dynacut.live.process import Process
from dynacut.offline.images.image import Image
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.symbols import symbols
from dynacut.shared.plan import Plan, PlannedEdit, PlannedMemory, PlannedModule, PlannedRemoval
from dynacut.shared.plan_file import dumps
from dynacut.shared.proc import read_mappings

from .conftest import Dynacut
from .load import Load
from .servers import Redis, RedisError
from .test_live_redis import EXECUTABLE
from .test_offline import checkpointed, table_of, text_of
from .test_pages import joined, text_pages
from .untouched import Snapshot

CODE, DATA = 0x1234_5000_0000, 0x1234_5001_0000
PAGE = 4096


def offset_of(name: str) -> int:
    """Of a function of redis."""
    return next(one.offset for one in symbols(ElfFile.open(EXECUTABLE)) if one.name == name)


def jump_to(address: int) -> bytes:
    """movabs rax, address; jmp rax."""
    return b"\x48\xb8" + struct.pack("<Q", address) + b"\xff\xe0"


def detour_plan(path: Path, pid: int) -> Path:
    """SET goes by new code, which counts in new memory, to readonlyCommand. For one process: addresses are absolute."""
    base = min(part.start for part in read_mappings(pid) if part.path == str(EXECUTABLE))
    elf, entry = ElfFile.open(EXECUTABLE), offset_of("setCommand")
    count = b"\x48\xb8" + struct.pack("<Q", DATA + 8) + b"\xf0\x48\xff\x00"  # movabs rax, …; lock inc qword [rax]
    code = count + jump_to(base + offset_of("readonlyCommand"))
    jump = jump_to(CODE)
    plan = Plan(
        "SET counted and refused",
        edits=(PlannedEdit(f"redis-server+{entry:#x}", elf.read(entry, len(jump)), jump, "set"),),
        modules={"redis-server": PlannedModule(str(EXECUTABLE), elf.build_id)},
        added=(
            PlannedMemory(f"{CODE:#x}", PAGE, "r-x", code, "set"),
            PlannedMemory(f"{DATA:#x}", 4 * PAGE, "rw-", b"counter:" + struct.pack("<Q", 100), "set"),
        ),
    )
    path.write_text(dumps(plan))
    return path


def places(pid: int) -> list[tuple[int, int]]:
    """What is mapped of the plan's memory."""
    return [(part.start, part.end) for part in read_mappings(pid) if CODE <= part.start < DATA + (1 << 20)]


MAPPED = [(CODE, CODE + PAGE), (DATA, DATA + 4 * PAGE)]


def counted(pid: int) -> int:
    """What the new code has counted."""
    with Process(pid) as process:
        return int(struct.unpack("<Q", process.read(DATA + 8, 8))[0])


def test_memory_comes_and_goes_under_load(redis: Redis, dynacut: Dynacut, tmp_path: Path) -> None:
    plan = detour_plan(tmp_path / "plan.toml", redis.pid)
    target = ("live", "--pid", redis.pid)
    before = Snapshot.of(redis.pid)

    def sets() -> Callable[[], object]:
        connection = redis.connect()
        return lambda: connection.command("SET", "other", "x")

    with Load.each(sets, threads=3) as load:
        load.wait_for(200)
        (feature,) = dynacut.json(*target, "--plan", plan)["features"]
        assert (feature["name"], feature["state"], feature["added_bytes"]) == ("set", "disabled", 5 * PAGE)
        assert places(redis.pid) == MAPPED
        assert isinstance(redis.command("SET", "key", "x"), RedisError)
        assert redis.command("GET", "key") is None
        load.wait_for(200)
        dynacut.json(*target, "--enable", "set")
        assert places(redis.pid) == []
        assert redis.command("SET", "key", "x") == "OK"
        again = dynacut(*target, "--disable", "set")
        assert again.returncode == 1 and "give the plan again" in again.stderr
        dynacut.json(*target, "--plan", plan)
        assert counted(redis.pid) >= 100
        load.wait_for(200)
        assert dynacut.json(*target, "--undo")["features"] == []
        load.wait_for(200)
    assert load.failures == 0, load.first
    assert places(redis.pid) == []
    assert Snapshot.of(redis.pid) == before
    assert redis.command("SET", "key", "y") == "OK"


@pytest.mark.parametrize("engine", ["ptrace", "gdb"])
def test_live_and_offline_add_the_same(redis: Redis, dynacut: Dynacut, tmp_path: Path, engine: str) -> None:
    plan = detour_plan(tmp_path / "plan.toml", redis.pid)
    dynacut.json("checkpoint", "--pid", redis.pid, tmp_path / "image", "--leave-running")
    dynacut.json("offline", tmp_path / "image", "--plan", plan, "-o", tmp_path / "layer")
    dynacut.json("live", "--pid", redis.pid, "--plan", plan, "--engine", engine)
    with Image(tmp_path / "layer") as rewritten, Process(redis.pid) as live:
        (offline,) = rewritten.processes
        assert text_of(offline) == text_of(live)
        assert table_of(offline) == table_of(live)
        ours, theirs = (
            [part for part in each.mappings if (part.start, part.end) in MAPPED] for each in (offline, live)
        )
        assert ours == theirs and len(ours) == 2
        assert [offline.read(part.start, part.size) for part in ours] == [
            live.read(part.start, part.size) for part in theirs
        ]

    dynacut.json("live", "--pid", redis.pid, "--undo", "--engine", engine)
    assert places(redis.pid) == []
    assert redis.command("SET", "key", "y") == "OK"


def test_an_image_with_added_memory_runs_and_is_undone(redis: Redis, dynacut: Dynacut, tmp_path: Path) -> None:
    plan = detour_plan(tmp_path / "plan.toml", redis.pid)
    assert redis.command("SET", "key", "x") == "OK"
    with redis.connect() as client:
        assert client.command("GET", "key") == "x"
        image = checkpointed(redis, dynacut, tmp_path / "image")
        dynacut.json("offline", image, "--plan", plan, "-o", tmp_path / "layer")
        undone = dynacut.json("offline", tmp_path / "layer", "--undo", "-o", tmp_path / "undone")
        assert undone["features"] == []
        with Image(image) as one, Image(tmp_path / "undone") as other:
            ranges = [{(part.start, part.end) for part in each.processes[0].mappings} for each in (one, other)]
            assert ranges[0] <= ranges[1] and not ranges[1] & set(MAPPED)
        dynacut.json("restore", tmp_path / "layer")
        assert isinstance(client.command("SET", "key", "y"), RedisError)
        assert client.command("GET", "key") == "x"
        assert counted(redis.pid) == 101
        dynacut.json("live", "--pid", redis.pid, "--undo")
        assert places(redis.pid) == []
        assert client.command("SET", "key", "y") == "OK"


def removal_plan(path: Path) -> Path:
    """Two pages of redis's sentinel, which a server does not run."""
    starts = sorted(one.offset for one in symbols(ElfFile.open(EXECUTABLE)) if one.name.startswith("sentinel"))
    first = -(-starts[0] // PAGE) * PAGE
    assert first + 2 * PAGE < starts[-1]
    modules = {"redis-server": PlannedModule(str(EXECUTABLE), ElfFile.open(EXECUTABLE).build_id)}
    removal = PlannedRemoval(f"redis-server+{first:#x}", 2 * PAGE, "sentinel")
    path.write_text(dumps(Plan("without pages", modules=modules, removed=(removal,))))
    return path


def test_pages_of_code_go_and_come_back(redis: Redis, dynacut: Dynacut, tmp_path: Path) -> None:
    plan, before, pages = removal_plan(tmp_path / "plan.toml"), Snapshot.of(redis.pid), text_pages(redis.pid)
    dynacut.json("checkpoint", "--pid", redis.pid, tmp_path / "image", "--leave-running")
    dynacut.json("offline", tmp_path / "image", "--plan", plan, "-o", tmp_path / "layer")
    (feature,) = dynacut.json("live", "--pid", redis.pid, "--plan", plan)["features"]
    assert (feature["state"], feature["unmapped_pages"]) == ("disabled", 2)
    assert text_pages(redis.pid) == pages - 2
    with Image(tmp_path / "layer") as rewritten, Process(redis.pid) as live:
        (offline,) = rewritten.processes
        assert text_of(offline) == text_of(live)
        assert table_of(offline) == table_of(live)
    assert redis.command("SET", "key", "x") == "OK"
    dynacut.json("live", "--pid", redis.pid, "--undo")
    assert text_pages(redis.pid) == pages
    assert joined(Snapshot.of(redis.pid)) == joined(before)


def test_what_cannot_be_is_refused(redis: Redis, dynacut: Dynacut, tmp_path: Path) -> None:
    stack = next(part for part in read_mappings(redis.pid) if part.path == "[stack]")
    data = next(part for part in read_mappings(redis.pid) if part.path == str(EXECUTABLE) and part.writable)
    base = min(part.start for part in read_mappings(redis.pid) if part.path == str(EXECUTABLE))
    before = Snapshot.of(redis.pid)
    for edit, says in (
        (f'at = "{stack.start:#x}"\nmap = 4096', "is not free: [stack] is there"),
        ('at = "0x12345001"\nmap = 4096', "is no address for memory"),
        ('at = "0x1000"\nmap = 4096', "is no address for memory"),
        (f'at = "redis-server+{data.start - base:#x}"\nunmap = 4096', "is not in the code of"),
        (f'at = "redis-server+{offset_of("setCommand"):#x}"\nunmap = 4096', "is not where a page begins"),
        ('at = "0x12340000"\nmap = 4096\nprotection = "rwx"', "protection is one of r--, rw-, r-x"),
        ('at = "0x12340000"\nmap = 100', "map is a number of bytes in whole pages of 4096"),
    ):
        (tmp_path / "plan.toml").write_text(f"format = 1\n[[edit]]\n{edit}\n")
        done = dynacut("live", "--pid", redis.pid, "--plan", tmp_path / "plan.toml")
        assert done.returncode == 1 and says in done.stderr, done.stderr
    assert Snapshot.of(redis.pid) == before
