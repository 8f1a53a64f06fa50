"""Signal masks that a checkpoint keeps: repaired in an image, in a signal frame too, and put back by any undo."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from dynacut.offline.criu import Criu
from dynacut.shared.proc import task_status, thread_ids
from dynacut.shared.target import SIGTRAP

from .checkpoints import ByFifos, reaping, the_criu
from .conftest import Dynacut
from .programs import DENIED, compile_program, feature
from .servers import Redis


@pytest.fixture
def criu() -> Criu:
    return the_criu()


@pytest.fixture(autouse=True)
def logs_of_failures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are kept for the user to read; here they go with the test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def _masks(pid: int) -> dict[int, int]:
    """The signal mask of each thread."""
    return {tid: task_status(pid, tid).blocked for tid in thread_ids(pid)}


def _traps_blocked(masks: dict[int, int]) -> list[int]:
    return [tid for tid, mask in masks.items() if mask >> (SIGTRAP - 1) & 1]


@pytest.mark.usefixtures("criu")
@pytest.mark.parametrize("undone", ["in the handler", "after its return"])
@pytest.mark.parametrize("where", ["in the process", "in the image"])
def test_a_mask_in_the_frame_of_a_handler_is_repaired_in_an_image_and_put_back(
    dynacut: Dynacut, tmp_path: Path, undone: str, where: str
) -> None:
    """A thread waits in a handler, and blocks SIGTRAP again when it returns; in the end it does, else it must not."""
    target = ByFifos(tmp_path)
    with target.started(compile_program("lingering", tmp_path)) as pid:
        _through_an_image(pid, dynacut, tmp_path / "1", "--disable", "feature", "--on-hit", "redirect=denied")
        if undone == "after its return":
            assert target.ask("return") == "returned"
            assert target.ask("blocks") == "0"
            assert target.ask("feature 3") == str(DENIED)
        if where == "in the process":
            dynacut.json("live", "--pid", pid, "--undo")
        else:
            _through_an_image(pid, dynacut, tmp_path / "2", "--undo")
        if undone == "in the handler":
            assert target.ask("return") == "returned"
        assert target.ask("blocks") == "1"
        assert target.ask("feature 3") == str(feature(3))


def _through_an_image(pid: int, dynacut: Dynacut, folder: Path, *what: str) -> None:
    folder.mkdir()
    with reaping([pid]):
        dynacut.json("checkpoint", "--pid", pid, folder / "image")
    dynacut.json("offline", folder / "image", *what, "-o", folder / "changed")
    dynacut.json("restore", folder / "changed")


@pytest.mark.usefixtures("criu")
@pytest.mark.parametrize("where", ["in the process", "in the image"])
def test_a_live_undo_after_a_restore_puts_the_masks_back(
    redis: Redis, dynacut: Dynacut, tmp_path: Path, where: str
) -> None:
    """A thread of redis's allocator blocks all signals."""
    what = ("--disable", "setCommand", "--on-hit", "redirect=readonlyCommand", "--as", "set")
    image, changed = tmp_path / "image", tmp_path / "changed"
    before = _masks(redis.pid)
    assert _traps_blocked(before)
    if where == "in the process":
        dynacut.json("live", "--pid", redis.pid, *what)
    with reaping([redis.pid]):
        dynacut.json("checkpoint", "--pid", redis.pid, image)
    if where == "in the image":
        dynacut.json("offline", image, *what, "-o", changed)
    dynacut.json("restore", changed if where == "in the image" else image)
    assert not _traps_blocked(_masks(redis.pid))
    assert redis.command("SET", "key", "value") != "OK"
    dynacut.json("live", "--pid", redis.pid, "--undo")
    assert _masks(redis.pid) == before
    assert redis.command("SET", "key", "value") == "OK"
