"""Files that are written as a whole: links that were planted beside them, and links in their place."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from dynacut.shared.plan_file import loads, write
from dynacut.shared.whole_file import write_whole

PLAN = 'format=1\nname="x"\n[[feature]]\nname="w"\non_hit="terminate"\nsites=[{at="work"}]\n'


def test_a_plan_is_not_written_through_a_planted_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".plan.toml.new").symlink_to(victim)
    write(tmp_path / "plan.toml", loads(PLAN), [])
    assert victim.read_text() == "precious"
    assert not (tmp_path / "plan.toml").is_symlink()
    assert "work" in (tmp_path / "plan.toml").read_text()


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("before")
    (tmp_path / "link").symlink_to("real")
    write_whole(tmp_path / "link", b"after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"after"


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", b"data")
    assert os.read(reader, 100) == b"data"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "folder", b"data")
    assert os.listdir(tmp_path) == ["folder"]  # noqa: PTH208
