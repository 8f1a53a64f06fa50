"""Start-up code of real servers: recorded, planned, removed with a round that learns and then for good, put back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from dynacut.handlers.table import TableSite
from dynacut.live.process import Process
from dynacut.offline.images.image import Image
from dynacut.shared.coverage.drcov import read_log
from dynacut.shared.plan_file import load as load_plan
from dynacut.shared.region import find_region
from dynacut.shared.target import Target

from .checkpoints import the_criu
from .conftest import Dynacut
from .load import Load
from .recordings import Recording, record, work
from .servers import HttpServer, Nginx, Redis, Server, is_running, wait_until
from .test_offline import checkpointed, table_of, text_of, tree_of
from .test_trace import served_by
from .untouched import Snapshot


def revisit(server: Server) -> None:
    """What the recorded phases do not have, and start-up code is needed for: settings are read (again)."""
    if isinstance(server, Redis):
        with server.connect() as connection:
            assert connection.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru") == "OK"
            assert connection.command("CONFIG", "SET", "maxmemory-policy", "noeviction") == "OK"
        return
    assert isinstance(server, HttpServer)
    if isinstance(server, Nginx):
        before = {*server.workers}
        os.kill(server.pid, signal.SIGHUP)
        wait_until(lambda: len(server.workers) == 2 and not before & {*server.workers}, "workers with new settings")
    else:
        before_log = server.log.count("server started")
        os.kill(server.pid, signal.SIGUSR1)
        wait_until(lambda: server.log.count("server started") > before_log, "a graceful restart")
    wait_until(lambda: server.request("GET", "/")[0] == 200, "an answer")


def learned_at_length(server: Server, dynacut: Dynacut, use: Callable[[], None], log: Path) -> list[object]:
    """Uses the server until it has learned nothing new three times; gives the blocks. Timers are in the recording."""
    counts: list[int] = []
    while len({*counts[-4:]}) > 1 or len(counts) < 4:
        use()
        found: list[object] = dynacut.json("live", "--tree", "--pid", server.pid, "--learned", "-o", log)["learned"]
        counts.append(len(found))
        assert len(counts) < 40, "it learns on and on"
    return found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[type[Server]], Recording]:
    """The recording of a kind of server; made once."""
    return cache(lambda kind: record(kind, tmp_path_factory.mktemp(kind.program)))


def codes_of(server: Server) -> dict[int, dict[int, bytes]]:
    return {pid: Snapshot.of(pid).code for pid in tree_of(server)}


@pytest.mark.parametrize(("name", "scope"), [("redis", "entry"), ("nginx", "block"), ("lighttpd", "block")])
def test_start_up_code_goes_and_the_service_goes_on(
    name: str,
    scope: str,
    request: pytest.FixtureRequest,
    recorded: Callable[[type[Server]], Recording],
    dynacut: Dynacut,
    tmp_path: Path,
) -> None:
    server: Server = request.getfixturevalue(name)
    plan, learned, final = (tmp_path / file for file in ("plan.toml", "learned.drcov", "final.toml"))
    report = dynacut.json("plan", *recorded(type(server)).logs, "--scope", scope, "-o", plan)
    (module,) = report["modules"]
    count = module["startup_only"]["blocks"]
    assert 0.3 < module["share"] < 0.8
    assert count > 1000

    expected, before = work(server), codes_of(server)
    tree = ("live", "--tree", "--pid", server.pid)
    dynacut.json(*tree, "--plan", plan)

    def use() -> None:
        assert work(server) == expected

    found = learned_at_length(server, dynacut, use, learned)
    dynacut.json(*tree, "--undo")
    assert codes_of(server) == before

    kept = dynacut.json("plan", "--plan", plan, "--keep", learned, "--on-hit", "terminate", "-o", final)
    assert (kept["kept"], kept["sites"]) == (len(found), count - len(found))
    assert kept["sites"] >= 0.9 * count
    dynacut.json(*tree, "--plan", final)
    assert [work(server) for _ in range(3)] == [expected] * 3
    processes = dynacut.json(*tree)["processes"]
    assert sorted(process["pid"] for process in processes) == sorted(tree_of(server))
    for process in processes:
        (feature,) = process["features"]
        assert (feature["patched"], feature["sites"], feature["hits"]) == (kept["sites"], kept["sites"], 0)
    dynacut.json(*tree, "--undo")
    assert codes_of(server) == before
    assert work(server) == expected


@pytest.mark.parametrize(("name", "scope"), [("redis", "block"), ("nginx", "entry"), ("lighttpd", "entry")])
def test_what_was_left_out_of_the_phases_is_learned_and_then_stays(
    name: str,
    scope: str,
    request: pytest.FixtureRequest,
    recorded: Callable[[type[Server]], Recording],
    dynacut: Dynacut,
    tmp_path: Path,
) -> None:
    server: Server = request.getfixturevalue(name)
    plan, learned = tmp_path / "plan.toml", tmp_path / "learned.drcov"
    dynacut.json("plan", *recorded(type(server)).logs, "--scope", scope, "-o", plan)
    planned = len(load_plan(plan).features[0].sites)
    expected = work(server)
    tree = ("live", "--tree", "--pid", server.pid)
    dynacut.json(*tree, "--plan", plan)

    def use() -> None:
        revisit(server)
        assert work(server) == expected

    found = learned_at_length(server, dynacut, use, learned)
    assert 20 < len(found) < planned
    assert read_log(learned).coverage.count == len(found)
    dynacut.json(*tree, "--undo")

    kept = dynacut.json("plan", "--plan", plan, "--keep", learned, "--on-hit", "terminate=3")
    assert kept == {"schema": 1, "plan": str(plan), "kept": len(found), "sites": planned - len(found)}
    dynacut.json(*tree, "--plan", plan)
    use()
    (feature,) = dynacut.json(*tree)["features"]
    assert (feature["state"], feature["hits"]) == ("disabled", 0)
    dynacut.json(*tree, "--undo")
    use()


def sites_of(target: Target) -> Sequence[TableSite]:
    found = find_region(target)
    assert found is not None
    assert found.table is not None
    return found.table.sites


def without(code: dict[int, bytes], sites: Sequence[TableSite]) -> dict[int, bytes]:
    """Code by its address, with zeros for the bytes of some sites."""
    left = {}
    for start, data in code.items():
        changed = bytearray(data)
        for site in sites:
            if start <= site.address < start + len(data):
                changed[site.address - start : site.address - start + len(site.old)] = bytes(len(site.old))
        left[start] = bytes(changed)
    return left


@pytest.mark.parametrize(
    ("name", "scope", "on_hit"),
    [("redis", "page", "terminate"), ("nginx", "block", "learn"), ("lighttpd", "block", "learn")],
)
def test_live_and_offline_remove_the_same(
    name: str,
    scope: str,
    on_hit: str,
    request: pytest.FixtureRequest,
    recorded: Callable[[type[Server]], Recording],
    dynacut: Dynacut,
    tmp_path: Path,
) -> None:
    """All start-up code, every byte of it and whole pages: text, holes and tables of all processes are equal.

    The timers of the web servers are not in the recording. What they bring back meanwhile, by learning, is left out.
    """
    server: Server = request.getfixturevalue(name)
    the_criu()
    image, plan, live_log, offline_log = (tmp_path / file for file in ("image", "plan", "live.drcov", "offline.drcov"))
    tree = ("live", "--tree", "--pid", server.pid)
    before = codes_of(server)
    work(server)
    dynacut.json("checkpoint", "--pid", server.pid, image, "--leave-running")
    dynacut.json("plan", *recorded(type(server)).logs, "--on-hit", on_hit, "--scope", scope, "-o", plan)
    # A block that a thread is in, or will return to, stays.
    assert dynacut.json("offline", image, "--standing", "-o", offline_log)["standing"]
    assert dynacut.json(*tree, "--standing", "-o", live_log)["standing"]
    dynacut.json("plan", "--plan", plan, "--keep", live_log, offline_log)
    dynacut.json("offline", image, "--plan", plan, "-o", tmp_path / "layer")
    (feature,) = dynacut.json(*tree, "--plan", plan)["features"]
    assert (feature.get("unmapped_pages", 0) > 0) is (scope == "page")
    with Image(tmp_path / "layer") as rewritten, ExitStack() as stack:
        assert sorted(process.pid for process in rewritten.processes) == sorted(tree_of(server))
        for offline in rewritten.processes:
            live = stack.enter_context(Process(offline.pid))
            learned = [site for site in sites_of(live) if site.order]
            assert len(learned) < 0.1 * feature["sites"]
            assert without(text_of(offline), learned) == without(text_of(live), learned)
            assert sites_of(live) == sites_of(offline)
            assert learned or table_of(offline) == table_of(live)
    dynacut.json(*tree, "--undo")
    assert {pid: b"".join(code.values()) for pid, code in codes_of(server).items()} == {
        pid: b"".join(code.values()) for pid, code in before.items()
    }
    work(server)


def test_without_learning_it_would_have_been_the_end(
    redis: Redis, recorded: Callable[[type[Server]], Recording], dynacut: Dynacut, tmp_path: Path
) -> None:
    """Removed is only what a first CONFIG SET needed: nothing that redis might do by itself meanwhile."""
    plan, before, after = (tmp_path / name for name in ("plan.toml", "before.drcov", "after.drcov"))
    recording, target = recorded(Redis), ("live", "--pid", redis.pid)
    dynacut.json("plan", *recording.logs, "-o", plan)
    dynacut.json(*target, "--plan", plan)
    dynacut.json(*target, "--learned", "-o", before)
    revisit(redis)
    dynacut.json(*target, "--learned", "-o", after)
    dynacut.json(*target, "--undo")
    later = (before, recording.serving, recording.end)
    dynacut.json("plan", "--init", after, "--serving", *later, "--on-hit", "terminate", "-o", plan)
    dynacut.json(*target, "--plan", plan)
    assert redis.command("PING") == "PONG"
    with pytest.raises(ConnectionError):
        revisit(redis)
    wait_until(lambda: not is_running(redis.pid), "the end by SIGTRAP")


def test_each_worker_learns_for_itself_and_the_tree_is_asked_as_one(
    nginx: Nginx, recorded: Callable[[type[Server]], Recording], dynacut: Dynacut, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.toml"
    dynacut.json("plan", *recorded(Nginx).logs_without_service, "-o", plan)
    dynacut.json("live", "--tree", "--pid", nginx.pid, "--plan", plan)

    def learned(pid: int, *options: str) -> set[str]:
        return {block["at"] for block in dynacut.json("live", "--pid", pid, "--learned", *options)["learned"]}

    first, second = nginx.workers
    served_by(nginx, first, second, "PUT")
    put = learned(first) - learned(second)  # the other one, stopped and continued, has learned a little as well
    assert len(put) > 20
    assert not put & learned(nginx.pid)
    served_by(nginx, second, first, "PUT")
    assert put & learned(second)
    assert learned(nginx.pid, "--tree") == learned(first) | learned(second) | learned(nginx.pid)
    revisit(nginx)  # workers that are forked later have a table of their own too
    (third, _) = nginx.workers
    assert learned(third) <= learned(nginx.pid, "--tree")
    assert len(learned(nginx.pid)) > 1000, "the master read its settings again"


def test_threads_learn_under_load_without_a_wrong_answer(
    recorded: Callable[[type[Server]], Recording], dynacut: Dynacut, load: Callable[..., Load], tmp_path: Path
) -> None:
    """Hundreds of blocks of the service itself are taken for start-up code, and come back under everybody's feet."""
    plan = tmp_path / "plan.toml"
    dynacut.json("plan", *recorded(Redis).logs_without_service, "--scope", "block", "-o", plan)
    with Redis({"io-threads": 3, "io-threads-do-reads": "yes"}) as redis:
        expected = work(redis)
        running = load(lambda: redis.command("GET", "other"), threads=1, expect=None)
        for _ in range(3):
            dynacut.json("live", "--pid", redis.pid, "--plan", plan)
            assert work(redis) == expected
            running.wait_for(100)
            assert len(dynacut.json("live", "--pid", redis.pid, "--learned")["learned"]) > 100
            dynacut.json("live", "--pid", redis.pid, "--undo")
        running.stop()
    assert (running.failures, running.wrong) == (0, 0), running.first


def test_a_checkpoint_remembers_what_was_learned_and_goes_on_learning(
    redis: Redis, recorded: Callable[[type[Server]], Recording], dynacut: Dynacut, tmp_path: Path
) -> None:
    the_criu()
    redis.disconnect()
    plan, log = tmp_path / "plan.toml", tmp_path / "learned.drcov"
    dynacut.json("plan", *recorded(Redis).logs, "-o", plan)
    image = checkpointed(redis, dynacut, tmp_path / "image")
    assert dynacut.json("offline", image, "--learned")["learned"] == []
    dynacut.json("offline", image, "--plan", plan, "-o", tmp_path / "layer")
    dynacut.json("restore", tmp_path / "layer")
    with redis.connect() as client:
        assert client.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru") == "OK"
    live = dynacut.json("live", "--pid", redis.pid, "--learned")["learned"]
    assert len(live) > 20
    again = checkpointed(redis, dynacut, tmp_path / "again")
    offline = dynacut.json("offline", again, "--learned", "-o", log)["learned"]
    assert [block for block in offline if block in live] == live
    kept = dynacut.json("plan", "--plan", plan, "--keep", log)
    assert kept["kept"] == len(offline)
    dynacut.json("restore", again)
    revisit(redis)


def test_an_init_point_instead_of_a_phase(
    recorded: Callable[[type[Server]], Recording], redis: Redis, dynacut: Dynacut, tmp_path: Path
) -> None:
    """aeMain is where redis begins to serve: what ran before it, and not later, is nearly what the phases tell."""
    by_phases, by_point = tmp_path / "phases.toml", tmp_path / "point.toml"
    dynacut.json("plan", *recorded(Redis).logs, "-o", by_phases)
    dynacut.json("plan", *recorded(Redis).logs, "--init-point", "aeMain", "-o", by_point)
    phases, point = ({site.at for site in load_plan(plan).features[0].sites} for plan in (by_phases, by_point))
    assert point < phases
    assert len(point) > 0.95 * len(phases)
    expected = work(redis)
    dynacut.json("live", "--pid", redis.pid, "--plan", by_point)
    assert work(redis) == expected


def test_what_learned_does_not_go_with(dynacut: Dynacut) -> None:
    for options in (["--undo"], ["--plan", "x"], ["--dry-run"], ["--standing"]):
        assert dynacut("live", "--pid", os.getpid(), "--learned", *options).returncode == 2
    assert dynacut("live", "--pid", os.getpid(), "-o", "x").returncode == 2
