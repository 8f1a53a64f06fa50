"""Checkpointed under load, rewritten by the plan of the live backend, restored: the same connection goes on."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from dynacut.handlers.table import SLOT_COUNT, SLOT_DONE_OFFSET, RepairKind
from dynacut.live.process import Process
from dynacut.offline.images.image import Image
from dynacut.shared.region import find_region
from dynacut.shared.target import Target

from .checkpoints import reaping
from .conftest import Dynacut
from .load import Load
from .servers import HttpServer, Lighttpd, Nginx, Redis, RedisError, Server, is_gone, wait_until
from .test_live_redis import SET_TO_ERROR, check_set_is_off, set_plan

UPLOAD_TO_403 = ("--disable", "ngx_http_read_client_request_body", "--on-hit", "return=403", "--as", "upload")
RANGE_TO_200 = ("--disable", "http_range_rfc7233", "--on-hit", "return=200", "--as", "range")


def tree_of(server: Server) -> list[int]:
    """All processes of a server."""
    return [server.pid, *(server.workers if isinstance(server, Nginx) else [])]


def end(pids: list[int]) -> None:
    """Ends processes and waits until their pids are free."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: all(is_gone(pid) for pid in pids), "the end of the processes")


def checkpointed(server: Server, dynacut: Dynacut, image: Path) -> Path:
    """Checkpoints a server, which is gone then."""
    pids = tree_of(server)
    with reaping(pids):
        report = dynacut.json("checkpoint", "--pid", server.pid, image)
    assert report["target"]["pid"] == server.pid
    wait_until(lambda: all(is_gone(pid) for pid in pids), "the end of the processes")
    return image


def test_set_is_off_after_a_restore_and_on_again_after_an_undo(redis: Redis, dynacut: Dynacut, tmp_path: Path) -> None:
    """The client stays connected through checkpoint, rewriting and restore; the original image is never touched."""
    plan = set_plan(tmp_path / "set.toml")
    assert redis.command("SET", "key", "old") == "OK"
    with redis.connect() as client:
        assert client.command("GET", "key") == "old"
        image = checkpointed(redis, dynacut, tmp_path / "image")
        before = contents(image)
        assert dynacut.json("offline", image)["features"] == []
        report = dynacut.json("offline", image, "--plan", plan, "-o", tmp_path / "layer")
        assert report["changed"] is True
        assert report["written"]["layer"] is True
        assert report["written"]["bytes"] < 300_000
        assert report["features"] == [{"name": "set", "state": "disabled", "sites": 1, "patched": 1, "hits": 0}]
        dynacut.json("restore", tmp_path / "layer")
        assert client.command("GET", "key") == "old"
        assert isinstance(client.command("SET", "key", "new"), RedisError)
        check_set_is_off(redis)
        (feature,) = dynacut.json("live", "--pid", redis.pid)["features"]
        assert (feature["name"], feature["state"], feature["hits"]) == ("set", "disabled", 2)
        assert contents(image) == before

        # Live takes it back, and off again, in the restored process.
        dynacut.json("live", "--pid", redis.pid, "--enable", "set")
        assert client.command("SET", "key", "old") == "OK"
        dynacut.json("live", "--pid", redis.pid, "--disable", "set")
        check_set_is_off(redis)
        dynacut.json("live", "--pid", redis.pid, "--undo")
        assert client.command("SET", "key", "live") == "OK"


def test_a_layer_is_dropped_or_undone(redis: Redis, dynacut: Dynacut, tmp_path: Path) -> None:
    """Without open connections, so that one image can be restored again and again."""
    redis.disconnect()
    image = checkpointed(redis, dynacut, tmp_path / "image")
    dynacut.json("offline", image, *SET_TO_ERROR, "-o", tmp_path / "layer")
    dynacut.json("offline", tmp_path / "layer", "--disable", "getCommand", "--as", "get", "-o", tmp_path / "two")
    dynacut.json("offline", tmp_path / "two", "--undo", "-o", tmp_path / "undone")
    dynacut.json("offline", tmp_path / "two", "--undo", "-o", tmp_path / "flat", "--flat")
    for directory, off in (("layer", ["set"]), ("two", ["set", "get"]), ("undone", []), ("flat", []), ("image", [])):
        dynacut.json("restore", tmp_path / directory)
        with redis.connect() as client:
            assert (client.command("SET", "key", "x") == "OK") is (not off)
            assert client.command("PING") == "PONG"
        report = dynacut.json("live", "--pid", redis.pid)
        assert [feature["name"] for feature in report["features"]] == off
        end([redis.pid])


def test_under_load_no_reply_is_lost_and_the_undo_is_flat(redis: Redis, dynacut: Dynacut, tmp_path: Path) -> None:
    """Twice through a checkpoint with requests in flight: off by a layer, on again by a flat copy."""
    plan = set_plan(tmp_path / "set.toml")
    connections = iter([redis.connect() for _ in range(3)])

    def increments() -> Callable[[], object]:
        connection = next(connections)
        return lambda: connection.command("INCR", "counter")

    def through(number: int, *what: str | Path) -> None:
        image, changed = tmp_path / f"image-{number}", tmp_path / f"changed-{number}"
        load.wait_for(200)
        checkpointed(redis, dynacut, image)
        dynacut.json("offline", image, *what, "-o", changed)
        dynacut.json("restore", changed)
        load.wait_for(200)

    with redis.connect() as client, Load.each(increments, threads=3) as load:
        assert client.command("SET", "key", "old") == "OK"
        through(1, "--plan", plan)
        assert isinstance(client.command("SET", "key", "new"), RedisError)
        assert client.command("GET", "key") == "old"
        through(2, "--undo", "--flat")
        assert not (tmp_path / "changed-2" / "parent").exists()
        assert client.command("SET", "key", "new") == "OK"
        load.stop()
        assert (load.failures, load.first) == (0, "")
        assert client.command("GET", "counter") == str(load.count)


def contents(directory: Path) -> dict[str, bytes]:
    """Every image file of a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix == ".img"}


def test_a_live_patch_is_understood_in_the_image(redis: Redis, dynacut: Dynacut, tmp_path: Path) -> None:
    redis.command("SET", "key", "old")
    dynacut.json("live", "--pid", redis.pid, *SET_TO_ERROR)
    check_set_is_off(redis)
    image = checkpointed(redis, dynacut, tmp_path / "image")
    (feature,) = dynacut.json("offline", image)["features"]
    assert (feature["name"], feature["state"], feature["hits"]) == ("set", "disabled", 1)
    dynacut.json("offline", image, "--enable", "set", "-o", tmp_path / "enabled")
    dynacut.json("offline", tmp_path / "enabled", "--disable", "set", "-o", tmp_path / "disabled")
    dynacut.json("restore", tmp_path / "enabled")
    assert redis.command("SET", "key", "old") == "OK"
    end([redis.pid])
    dynacut.json("restore", tmp_path / "disabled")
    with redis.connect() as new:  # the old connection has seen the end of the process
        assert isinstance(new.command("SET", "key", "new"), RedisError)
        assert new.command("GET", "key") == "old"
        report = dynacut.json("live", "--pid", redis.pid, "--undo")
        assert report["features"] == []
        assert new.command("SET", "key", "new") == "OK"


@pytest.mark.parametrize(("name", "what"), [("nginx", UPLOAD_TO_403), ("lighttpd", RANGE_TO_200)])
def test_http_servers_go_on_without_the_feature(
    name: str, what: tuple[str, ...], request: pytest.FixtureRequest, dynacut: Dynacut, tmp_path: Path
) -> None:
    """A keep-alive connection survives; master and workers are patched."""
    server: HttpServer = request.getfixturevalue(name)
    pids = tree_of(server)

    def is_off() -> bool:
        if isinstance(server, Nginx):
            return server.request("PUT", "/b.txt", "two")[0] == 403
        return first_byte(server) == (200, b"hello\n")

    assert not is_off()
    with server.connect() as client:
        assert client.request("GET", "/")[0] == 200
        image = checkpointed(server, dynacut, tmp_path / "image")
        report = dynacut.json("offline", image, *what, "-o", tmp_path / "layer")
        assert sorted(process["pid"] for process in report["processes"]) == sorted(pids)
        dynacut.json("restore", tmp_path / "layer")
        assert client.request("GET", "/")[::2] == (200, b"hello\n")
        for _ in range(6):
            assert is_off()
        tree = ("live", "--pid", server.pid, "--tree")
        (feature,) = dynacut.json(*tree)["features"]
        assert feature["hits"] >= 6
        dynacut.json(*tree, "--undo")
        assert not is_off()
        assert client.request("GET", "/")[::2] == (200, b"hello\n")


def first_byte(server: HttpServer) -> tuple[int, bytes]:
    """What a request for the first byte gives."""
    assert isinstance(server, Lighttpd)
    with server.connect() as connection:
        connection._client.request("GET", "/", headers={"Range": "bytes=0-0"})
        response = connection._client.getresponse()
        return response.status, response.read()


@pytest.mark.parametrize(
    ("name", "what"), [("redis", SET_TO_ERROR), ("nginx", UPLOAD_TO_403), ("lighttpd", RANGE_TO_200)]
)
@pytest.mark.parametrize("scope", ["entry", "block"])
def test_live_and_offline_leave_the_same_bytes(
    name: str, what: tuple[str, ...], scope: str, request: pytest.FixtureRequest, dynacut: Dynacut, tmp_path: Path
) -> None:
    """Text and table of every process, compared byte by byte; the image is of the process before the live patch."""
    server: Server = request.getfixturevalue(name)
    image = tmp_path / "image"
    dynacut.json("checkpoint", "--pid", server.pid, image, "--leave-running")
    dynacut.json("offline", image, *what, "--scope", scope, "-o", tmp_path / "layer")
    dynacut.json("live", "--pid", server.pid, "--tree", *what, "--scope", scope)
    with Image(tmp_path / "layer") as rewritten, ExitStack() as stack:
        for offline in rewritten.processes:
            live = stack.enter_context(Process(offline.pid))
            assert text_of(offline) == text_of(live)
            assert table_of(offline) == table_of(live)
            assert table_of(live)[1].count(b"dynacut") == 1


def text_of(target: Target) -> dict[int, bytes]:
    """All code of files, by address."""
    return {
        mapping.start: target.read(mapping.start, mapping.size)
        for module in target.modules
        for mapping in module.executable_mappings
    }


def table_of(target: Target) -> tuple[int, bytes, object]:
    """Address, bytes and repairs of the table: but for what only live has, the marks of stubs that have run and the
    start times of threads, which an image does not keep."""
    found = find_region(target)
    assert found is not None
    assert found.table is not None
    layout = found.table.layout
    data = bytearray(target.read(found.region.table, layout.total_size))
    data[SLOT_DONE_OFFSET : SLOT_DONE_OFFSET + SLOT_COUNT] = bytes(SLOT_COUNT)
    data[layout.repairs : layout.counters] = bytes(layout.counters - layout.repairs)
    repairs = [
        repair._replace(start_time=0) if repair.kind is RepairKind.THREAD_MASK else repair
        for repair in found.table.repairs
    ]
    return found.region.table, bytes(data), repairs


def test_a_plan_that_does_not_fit_writes_nothing(redis: Redis, dynacut: Dynacut, tmp_path: Path) -> None:
    image = tmp_path / "image"
    dynacut.json("checkpoint", "--pid", redis.pid, image, "--leave-running")
    plan = set_plan(tmp_path / "set.toml")
    plan.write_text(re.sub('old = "..', 'old = "00', plan.read_text()))
    done = dynacut("offline", image, "--plan", plan, "-o", tmp_path / "layer")
    assert done.returncode == 1
    assert "the plan says" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["image"]
    report = dynacut.json("offline", image, *SET_TO_ERROR, "--dry-run")
    assert (report["changed"], report["edits"]) == (False, 1)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["image"]
