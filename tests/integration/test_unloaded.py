"""Features in a module that the program has unloaded: shown as such, in nobody's way, and gone with an undo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .conftest import Dynacut
from .programs import DENIED, Program, compile_program, feature

Start = Callable[..., Program]


def _states(dynacut: Dynacut, target: Program) -> dict[str, str]:
    document = dynacut.json("live", "--pid", target.pid)
    return {each["name"]: each["state"] for each in document["features"]}


def test_an_unloaded_module_is_in_nobodys_way(program: Start, dynacut: Dynacut, tmp_path: Path) -> None:
    plugin = compile_program("loadable", tmp_path, "-shared", "-fPIC")
    target = program("loader", str(plugin), flags=("-ldl",))
    live = ("live", "--pid", target.pid)
    assert target.ask("open") == "ok"
    whole = int(target.ask("plug 3"))
    for site, name in (("loadable!plug", "plug"), ("feature", "own")):
        dynacut.json(*live, "--disable", site, "--as", name, "--on-hit", "return=-1")
    assert target.ask("plug 3") == target.ask("feature 3") == str(DENIED)
    assert target.ask("close") == "ok"

    assert _states(dynacut, target) == {"plug": "unloaded", "own": "disabled"}
    dynacut.json(*live, "--enable", "own")
    assert target.ask("feature 3") == str(feature(3))
    assert not dynacut.json(*live, "--enable", "plug")["changed"]
    again = dynacut(*live, "--disable", "plug")
    assert (again.returncode, "not loaded any more" in again.stderr) == (1, True)
    dynacut.json(*live, "--disable", "own")
    dynacut.json(*live, "--disable", "denied", "--as", "other", "--on-hit", "return=5")
    assert _states(dynacut, target) == {"plug": "unloaded", "own": "disabled", "other": "disabled"}
    dynacut.json(*live, "--undo")
    assert _states(dynacut, target) == {}
    assert target.ask("feature 3") == str(feature(3))

    assert target.ask("open") == "ok"  # fresh from its file, and to be disabled anew
    assert int(target.ask("plug 3")) == whole
    dynacut.json(*live, "--disable", "loadable!plug", "--as", "plug", "--on-hit", "return=-1")
    assert target.ask("plug 3") == str(DENIED)
    dynacut.json(*live, "--undo")
    assert int(target.ask("plug 3")) == whole
