"""Files below another root, with the kernel's help and without it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dynacut.shared.binary.inside_root import _found, _found_without_links, open_inside


@pytest.mark.parametrize("found", [_found, _found_without_links])
def test_a_file_is_found_below_the_root_and_not_above_it(tmp_path: Path, found: Callable[[int, bytes], int]) -> None:
    (tmp_path / "root" / "deep").mkdir(parents=True)
    (tmp_path / "root" / "deep" / "file").write_text("inside")
    (tmp_path / "secret").write_text("outside")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "secret")
    root = os.open(tmp_path / "root", os.O_PATH)
    descriptor = found(root, b"/deep/file")
    assert Path(f"/proc/self/fd/{descriptor}").read_text() == "inside"
    os.close(descriptor)
    for path in (b"../secret", b"/../secret", b"missing", b"deep/file/x"):
        with pytest.raises(OSError):
            found(root, path)
    os.close(root)


def test_links_and_what_is_no_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").write_text("outside")
    (tmp_path / "root" / "absolute").symlink_to(tmp_path / "secret")
    (tmp_path / "root" / "magic").symlink_to("/proc/self/root")
    os.mkfifo(tmp_path / "root" / "pipe")
    for name in ("absolute", "magic", "pipe", "."):
        with pytest.raises(OSError):
            open_inside(tmp_path / "root", Path(name))
