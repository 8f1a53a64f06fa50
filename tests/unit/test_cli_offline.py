"""`dynacut offline` on the command line: usage, messages, tables and JSON, on images built in code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from image_builder import CHILD_PID, HEAP, ROOT_PID, build_image, snapshot
from test_cli import Capture, ends, errors
from test_sites import BASE, built

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return build_image().write(tmp_path / "image")


def document(capsys: Capture, *arguments: object) -> dict[str, Any]:
    """What --json prints."""
    assert ends("offline", *map(str, arguments), "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    return found


# Usage.


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--disable", "alpha"], "a changed image needs a place"),
        (["--undo"], "a changed image needs a place"),
        (["-o", "out"], "-o and --flat without a change to write"),
        (["--flat"], "-o and --flat without a change to write"),
        (["--disable", "alpha", "-o", "out", "--disassemble", "alpha"], "--disassemble only shows"),
        (["--disable", "alpha", "--undo", "-o", "out"], "--disable and --undo exclude each other"),
        (["--dry-run"], "--dry-run without a change to try"),
        (["--on-hit", "return=1"], "--on-hit and --as belong to --disable"),
        (["--scope", "block", "--undo", "-o", "out"], "--scope belongs to --disable or --plan"),
        (["--feature", "set"], "--feature chooses among the features of a plan"),
    ],
)
def test_options_that_do_not_go_together(image: Path, capsys: Capture, arguments: list[str], problem: str) -> None:
    before = snapshot(image.parent)
    assert ends("offline", str(image), *arguments) == 2
    first, second = errors(capsys)
    assert first.startswith(f"dynacut: {problem}") and second.startswith("dynacut: ")
    assert snapshot(image.parent) == before


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["image", "--pid", "x"], ["image", "--timeout", "0"]])
def test_a_usage_that_argparse_refuses(capsys: Capture, arguments: list[str]) -> None:
    assert ends("offline", *arguments) == 2
    assert errors(capsys)[1] == "dynacut: see dynacut offline --help"


def test_help_says_that_the_image_is_never_modified(capsys: Capture) -> None:
    assert ends("offline", "--help") == 0
    text = capsys.readouterr().out
    assert "never modified" in text
    for option in ("--output", "--flat", "--pid", "--root", "--disassemble", "--plan", "--undo", "--dry-run", "--json"):
        assert option in text


# Refusals: two lines, exit status 1, nothing written.


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--disable", "no_such_function", "-o", "OUT"], "no_such_function"),
        (["--disable", "alpha+2", "-o", "OUT"], "not the first byte of an instruction"),
        (["--disable", "0x10", "-o", "OUT"], "lies in no module"),
        (["--disable", "alpha", "-o", "OUT", "--pid", "99"], "the image has no process 99"),
        (["--enable", "set", "-o", "OUT"], "has no feature"),
        (["--disassemble", "alpha", "--pid", "99"], "the image has no process 99"),
        (["--disassemble", "no_such_function"], "no_such_function"),
        (["--plan", "/nowhere.toml", "-o", "OUT"], "/nowhere.toml"),
        (["--disable", "alpha", "-o", "IMAGE"], "exists already"),
        (["--disable", "alpha", "-o", "IMAGE/pstree.img"], "exists already"),
        (["--disable", "alpha", "-o", "IMAGE/pstree.img/x"], "lies within the image"),
        (["--disable", "alpha", "-o", "IMAGE/new"], "lies within the image"),
        (["--disable", "alpha", "-o", "/proc/x"], "cannot be written"),
        (["--root", "/nowhere", "--disassemble", "alpha"], "nowhere"),
    ],
)
def test_what_is_refused_changes_nothing(image: Path, capsys: Capture, arguments: list[str], problem: str) -> None:
    before = snapshot(image.parent)
    given = [part.replace("OUT", str(image.parent / "new")).replace("IMAGE", str(image)) for part in arguments]
    assert ends("offline", str(image), *given) == 1
    lines = errors(capsys)
    assert problem in lines[0] and all(line.startswith("dynacut: ") for line in lines)
    assert snapshot(image.parent) == before
    assert list(image.parent.iterdir()) == [image]


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_what_is_no_image(tmp_path: Path, capsys: Capture, kind: str) -> None:
    path = tmp_path / "image"
    if kind == "file":
        path.write_text("x")
    elif kind == "empty":
        path.mkdir()
    assert ends("offline", str(path)) == 1
    problem, advice = errors(capsys)
    assert str(path) in problem
    assert "dynacut checkpoint" in advice


def test_an_image_cut_off_is_said_to_be(image: Path, capsys: Capture) -> None:
    path = image / f"mm-{ROOT_PID}.img"
    path.write_bytes(path.read_bytes()[:-1])
    assert ends("offline", str(image)) == 1
    problem, _ = errors(capsys)
    assert path.name in problem and "does not end in the file" in problem


# What is shown.


def test_an_image_is_shown(image: Path, capsys: Capture) -> None:
    assert ends("offline", str(image)) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0] == f"image {image}"
    assert f"{ROOT_PID}\tserver\t3\t14\t18\t{built()[0]}" in text
    assert f"server\t{BASE:#x}" not in text and "2 modules (-v lists them)" in text
    assert "no features" in text
    assert "[heap]" not in text
    assert ends("offline", str(image), "-v") == 0
    text = capsys.readouterr().out
    assert f"server\t{BASE:#x}" in text
    assert f"{HEAP:#x}\t{HEAP + 0x4000:#x}\trw-p\t4\t2\t[heap]" in text
    assert f"{ROOT_PID + 1}\t{BASE:#x}" in text and "0xffffffffffffffff" in text
    assert "SIGTERM\t0x555555555100\t0x4000000\t0xffff" in text
    assert ends("offline", str(image), "-q") == 0
    assert capsys.readouterr().out == ""


def test_json_has_threads_vmas_and_actions(image: Path, capsys: Capture) -> None:
    shown = document(capsys, image)
    assert shown["target"] == {"image": str(image), "exe": str(built()[0])}
    assert (shown["features"], shown["changed"]) == ([], False)
    root, child = shown["processes"]
    assert (root["pid"], child["pid"], root["name"]) == (ROOT_PID, CHILD_PID, "server")
    assert root["arguments"] == ["server", "--port", "0"]
    assert [thread["tid"] for thread in root["threads"]] == [ROOT_PID, ROOT_PID + 1, ROOT_PID + 2]
    (heap,) = [vma for vma in root["vmas"] if vma["path"] == "[heap]"]
    assert heap == {
        "start": f"{HEAP:#x}",
        "end": f"{HEAP + 0x4000:#x}",
        "protection": "rw-p",
        "pages": 4,
        "dumped": 2,
        "path": "[heap]",
    }
    assert [action["signal"] for action in root["actions"]] == ["SIGTERM"]


def test_instructions_are_shown_as_they_are_in_memory(image: Path, capsys: Capture) -> None:
    assert ends("offline", str(image), "--disassemble", "alpha") == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("server+0x") and f"process {ROOT_PID} (server)" in first
    assert lines[0].split()[1:] == ["55", "push", "rbp"]
    assert lines[-1].split()[-1] == "ret"
    new = image.parent / "new"
    assert ends("offline", str(image), "--disable", "alpha", "-o", str(new), "-q") == 0
    found = document(capsys, new, "--disassemble", "alpha", "--pid", CHILD_PID)
    assert found["target"] == {"image": str(new), "pid": CHILD_PID}
    assert found["instructions"][0]["text"] == "int3"


def test_a_change_says_what_was_written(image: Path, capsys: Capture) -> None:
    new = image.parent / "new"
    tried = document(capsys, image, "--disable", "alpha", "--dry-run")
    assert (tried["changed"], tried["edits"]) == (False, 2)
    assert "written" not in tried and not new.exists()
    report = document(capsys, image, "--disable", "alpha", "--as", "feature", "-o", new)
    assert report["changed"] is True
    assert report["features"] == [{"name": "feature", "state": "disabled", "sites": 1, "patched": 1, "hits": 0}]
    assert (report["written"]["image"], report["written"]["layer"]) == (str(new), True)
    assert f"mm-{ROOT_PID}.img" in report["written"]["files"]
    assert ends("offline", str(new), "--undo", "-o", str(image.parent / "undone"), "--flat") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("2 processes, 2 places changed: flat copy ")
    assert captured.err == ""


def test_a_warning_for_threads_that_block_the_signal(image: Path, capsys: Capture) -> None:
    """As after the program itself has blocked it again."""
    from dynacut.offline.images.image import Image
    from dynacut.offline.layer import write_image

    new, blocked = image.parent / "new", image.parent / "blocked"
    assert ends("offline", str(image), "--disable", "alpha", "-o", str(new), "-q") == 0
    with Image(new) as opened:
        opened.processes[0].threads[2].blocked |= 1 << 4
        write_image(opened, blocked, flat=False, extra={})
    assert ends("offline", str(blocked)) == 0
    assert f"thread {ROOT_PID + 2} blocks SIGTRAP" in capsys.readouterr().err


# Names from the image do nothing to a terminal.


def test_escape_sequences_are_shown_not_sent(tmp_path: Path, capsys: Capture) -> None:
    name = b"\x1b[2J\x07\xff\ninjected"
    strange = tmp_path / "ser\x1b[2Jver\n"
    shutil.copy(built()[0], strange)
    image = build_image()
    image.mapped[1] = strange
    for process in image.processes:
        process.name = name
    path = str(image.write(tmp_path / "image"))
    new = str(tmp_path / "new")
    commands = [
        [path],
        [path, "-v"],
        [path, "-v", "--json"],
        [path, "--disassemble", "alpha"],
        [path, "--disassemble", "alpha", "--json"],
        [path, "--disable", "alpha", "-o", new],
        [new, "-v"],
        [new, "--enable", "x", "--dry-run"],
        [path, "--disable", "nothing", "--dry-run"],
        [path, "--disable", "alpha+1", "--dry-run"],
    ]
    for command in commands:
        ends("offline", *command)
        captured = capsys.readouterr()
        assert captured.out or captured.err
        for text in (captured.out, captured.err):
            assert text.replace("\n", "").replace("\t", "").isprintable(), command
            assert "injected" not in text.split()
