"""Sites by names that gdb knows and dynacut does not; verified, disabled and put back as all others."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dynacut.shared.binary.elf import ElfFile

from .conftest import Dynacut
from .gdbserver import GdbDynacut, GdbServer
from .programs import FLAGS, SOURCES, Program

GDB = ("--engine", "gdb")


def compile_shapes(folder: Path) -> Path:
    executable = folder / "shapes"
    subprocess.run(["g++", *FLAGS[1:], "-o", executable, SOURCES / "shapes.cc"], check=True)
    return executable


@pytest.fixture
def shapes(tmp_path: Path) -> Iterator[Program]:
    with Program(compile_shapes(tmp_path)) as program:
        yield program


@pytest.fixture
def stripped(tmp_path: Path) -> Iterator[Program]:
    """The same without symbols; whole/shapes has them."""
    (tmp_path / "whole").mkdir()
    whole = compile_shapes(tmp_path / "whole")
    subprocess.run(["objcopy", "--strip-all", whole, tmp_path / "shapes"], check=True)
    with Program(tmp_path / "shapes") as program:
        yield program


def answers(program: Program) -> list[str]:
    return [program.ask(f"{word} 3") for word in ("area", "scaled", "hidden")]


@pytest.mark.parametrize("way", ["gdb", "gdbserver"])
@pytest.mark.parametrize(
    ("site", "changed"),
    [
        ("geometry::Square::area() const", ["-1", "30", "1003"]),
        ("shapes!geometry::Square::area(long) const", ["9", "-1", "1003"]),
        ("shapes.cc:hidden", ["9", "30", "-1"]),
    ],
)
def test_a_name_that_gdb_knows(shapes: Program, way: str, site: str, changed: list[str]) -> None:
    what = ("live", "--pid", shapes.pid, "--disable", site, "--on-hit", "return=-1", "--as", "x")
    refused = Dynacut()(*what)
    assert refused.returncode == 1 and "no function" in refused.stderr
    if way == "gdb":
        report = GdbDynacut().json(*what)
    else:
        with GdbServer("--multi") as server:
            report = GdbDynacut(server).json(*what)
    assert report["changed"] is True
    assert answers(shapes) == changed
    Dynacut().json("live", "--pid", shapes.pid, "--undo")
    assert answers(shapes) == ["9", "30", "1003"]


@pytest.mark.parametrize(
    ("site", "says"),
    [
        ("geometry::Square::area", "ambiguous: shapes+0x"),
        ("Square::area() const", "no function 'Square::area() const'"),  # gdb is asked for whole names
        ("geometry::Square::area() const+1", "is not the first byte of an instruction"),
        ("libc!geometry::Square::area() const", "no function"),
        ("stdout@@GLIBC_2.2.5", "no function"),
        ("*hidden", "no function"),
        ("-line 3", "no function"),
        ("shapes.cc:999999", "there is no code on that line"),
        ('main"', "no function"),
    ],
)
def test_what_gdb_says_is_verified(shapes: Program, dynacut: Dynacut, site: str, says: str) -> None:
    done = dynacut("live", "--pid", shapes.pid, *GDB, "--disable", site, "--as", "x")
    assert done.returncode == 1
    assert says in done.stderr and "Traceback" not in done.stderr
    assert answers(shapes) == ["9", "30", "1003"]


@pytest.mark.parametrize("text", ['$_shell("touch {}")', "main\nshell touch {}", "main | pipe touch {}", "`touch {}`"])
def test_a_plan_cannot_make_gdb_run_anything(shapes: Program, dynacut: Dynacut, tmp_path: Path, text: str) -> None:
    made = tmp_path / "made"
    for site in (text.format(made), f"*{text.format(made)}"):
        done = dynacut("live", "--pid", shapes.pid, *GDB, "--disable", site, "--as", "x")
        assert done.returncode == 1, done.stderr
    assert not made.exists()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def debuginfod(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """debuginfod(file): the address of a server that has a file's debug information, under its build-id."""
    folder = tmp_path / "served"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)

    def serve(file: Path) -> str:
        build_id = ElfFile.open(file).build_id
        assert build_id is not None
        (folder / "buildid" / build_id).mkdir(parents=True)
        only_debug = folder / "buildid" / build_id / "debuginfo"
        subprocess.run(["objcopy", "--only-keep-debug", file, only_debug], check=True)
        thread.start()
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    if thread.is_alive():
        server.shutdown()
        thread.join()
    server.server_close()


def test_a_stripped_program_whose_debug_information_a_server_has(
    stripped: Program,
    dynacut: Dynacut,
    debuginfod: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    address = debuginfod(tmp_path / "whole" / "shapes")
    monkeypatch.setenv("DEBUGINFOD_CACHE_PATH", str(tmp_path / "cache"))
    line = 1 + (SOURCES / "shapes.cc").read_text().partition("/* the only code")[0].count("\n")
    off = ("live", "--pid", stripped.pid, *GDB, "--as", "x", "--on-hit")
    assert dynacut(*off, "return=-1", "--disable", "hidden").returncode == 1
    monkeypatch.setenv("DEBUGINFOD_URLS", address)
    dynacut.json(*off, "return=-1", "--disable", "shapes!hidden")
    assert answers(stripped) == ["9", "30", "-1"]
    dynacut.json("live", "--pid", stripped.pid, *GDB, "--undo")
    dynacut.json(*off, "terminate=3", "--disable", f"shapes.cc:{line}")
    with pytest.raises(EOFError):
        stripped.ask("hidden 3")
    assert stripped.wait() == 3
