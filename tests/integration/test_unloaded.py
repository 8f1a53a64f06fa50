"""Features in modules that come and go: what is unloaded is in nobody's way; what is there twice is not guessed at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dynacut.live.process import Process
from dynacut.shared.code import CodeOf

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


def test_a_module_whose_file_is_mapped_to_be_read_is_found_where_it_was_loaded(
    program: Start, dynacut: Dynacut, tmp_path: Path
) -> None:
    plugin = compile_program("loadable", tmp_path, "-shared", "-fPIC")
    target = program("loader", str(plugin), flags=("-ldl",))
    assert [target.ask(word) for word in ("map", "open", "map")] == ["ok", "ok", "ok"]
    dynacut.json("live", "--pid", target.pid, "--disable", "loadable!plug", "--as", "plug", "--on-hit", "return=-1")
    assert target.ask("plug 3") == str(DENIED)


def test_a_module_that_is_loaded_twice_is_patched_where_it_is_said(
    program: Start, dynacut: Dynacut, tmp_path: Path
) -> None:
    """A name fits both, and one of them would go on working."""
    plugin = compile_program("loadable", tmp_path, "-shared", "-fPIC", "-Wl,--build-id")
    target = program("loader", str(plugin), flags=("-ldl",))
    live = ("live", "--pid", target.pid)
    assert [target.ask(word) for word in ("open", "twice")] == ["ok", "ok"]
    whole = target.ask("plug 3")
    assert target.ask("twin 3") == whole
    with Process(target.pid) as process:
        codes = CodeOf(process).named("loadable")
        twins = sorted(code.module.base + code.symbols.lookup("plug")[0].offset for code in codes)
    assert len(twins) == 2
    plan = tmp_path / "plan.toml"
    plan.write_text(
        f'format = 1\n[module.loadable]\npath = "{plugin}"\nbuild_id = "{codes[0].elf.build_id}"\n'
        '[[feature]]\nname = "plug"\non_hit = "return=-1"\nsites = [{ at = "loadable!plug" }]\n'
    )
    for what in (("--disable", "plug"), ("--disable", "loadable!plug"), ("--plan", plan)):
        refused = dynacut(*live, *what)
        assert refused.returncode == 1
        assert "loaded more than once" in refused.stderr or "ambiguous" in refused.stderr
        assert all(f"{place:#x}" in refused.stderr for place in (twins if what[1] == "plug" else ()))
    for place in twins:
        dynacut.json(*live, "--disable", f"{place:#x}", "--as", f"{place:x}", "--on-hit", "return=-1")
    assert target.ask("plug 3") == target.ask("twin 3") == str(DENIED)
    dynacut.json(*live, "--enable", f"{twins[0]:x}")
    assert sorted([target.ask("plug 3"), target.ask("twin 3")]) == sorted([whole, str(DENIED)])
    dynacut.json(*live, "--undo")
    assert target.ask("plug 3") == target.ask("twin 3") == whole
