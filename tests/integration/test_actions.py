"""What a hit does, plans with plain edits, and what dynacut says of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Dynacut, Rounds
from .programs import DENIED, Program, compile_program, feature
from .servers import wait_until
from .test_kill import bytes_at, run_json, symbol
from .untouched import Snapshot

Start = Callable[..., Program]


def _offset_of(executable: Path, function: str, instruction: str) -> int:
    """The offset of the one instruction of a function that matches a pattern, as objdump prints it."""
    command = ["objdump", "-d", "--no-show-raw-insn", f"--disassemble={function}", str(executable)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    (found,) = [line for line in lines if re.search(r":\t.*" + instruction, line)]
    return int(found.partition(":")[0], 16)


def _executable(program: Program) -> Path:
    return Path(f"/proc/{program.pid}/exe").readlink()


def _build_id(executable: Path) -> str:
    notes = subprocess.run(["readelf", "-n", str(executable)], check=True, capture_output=True, text=True).stdout
    found = re.search(r"Build ID: ([0-9a-f]+)", notes)
    assert found is not None
    return found[1]


def test_terminate_ends_the_process_by_sigtrap(program: Start, dynacut: Dynacut) -> None:
    target = program("counter")
    dynacut.json("live", "--pid", target.pid, "--disable", "feature")
    assert target.ask("other 3") == "17"
    with pytest.raises(EOFError):
        target.ask("feature 3")
    assert target.wait() == -signal.SIGTRAP


def test_terminate_with_a_code_ends_the_process_with_that_status(program: Start, dynacut: Dynacut) -> None:
    target = program("counter", 2)
    dynacut.json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "terminate=42")
    with pytest.raises(EOFError):
        target.ask("feature 3")
    assert target.wait() == 42


def test_a_target_that_ends_at_once_is_not_reported_as_untouched(
    program: Start, dynacut: Dynacut, rounds: Rounds
) -> None:
    """The threads hit the site before dynacut has looked at it again: that is no refusal (exit status 1)."""
    for _ in rounds(3):
        target = program("counter", 2)
        done = dynacut("live", "--pid", target.pid, "--disable", "work")
        assert target.wait() == -signal.SIGTRAP
        assert done.returncode != 1, done.stderr
        assert "Traceback" not in done.stderr


def test_redirect_to_another_function(program: Start, dynacut: Dynacut) -> None:
    target = program("counter")
    dynacut.json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "redirect=denied", "--as", "f")
    assert [target.ask(f"feature {n}") for n in (3, -3)] == [str(DENIED)] * 2
    (entry,) = dynacut.json("live", "--pid", target.pid)["features"]
    assert entry == {"name": "f", "state": "disabled", "sites": 1, "patched": 1, "hits": 2}


def test_redirect_within_a_function_uses_its_own_error_path(program: Start, dynacut: Dynacut) -> None:
    """From the entry of feature() to the block that returns -2 for negative numbers."""
    target = program("counter")
    failure = _offset_of(_executable(target), "feature", r"mov +\$0xfffffffffffffffe,")
    dynacut.json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", f"redirect=counter+{failure:#x}")
    assert target.ask("feature 3") == "-2"
    dynacut.json("live", "--pid", target.pid, "--undo")
    assert target.ask("feature 3") == str(feature(3))


@pytest.mark.parametrize(
    ("given", "returned"),
    [("7", 7), ("-1", -1), ("0x10", 16), (str(-(1 << 63)), -(1 << 63)), (str((1 << 64) - 5), -5)],
)
def test_return_gives_the_caller_a_value(program: Start, dynacut: Dynacut, given: str, returned: int) -> None:
    target = program("counter")
    dynacut.json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", f"return={given}")
    assert target.ask("feature 3") == str(returned)
    assert target.ask("other 3") == "17"


def test_skip_leaves_out_one_instruction(program: Start, dynacut: Dynacut) -> None:
    target = program("steps")
    assert target.ask("steps 3") == "114"
    dynacut.json("live", "--pid", target.pid, "--disable", "steps!steps+4", "--on-hit", "skip=4", "--as", "ten")
    assert target.ask("steps 3") == "104"
    dynacut.json("live", "--pid", target.pid, "--enable", "ten")
    dynacut.json("live", "--pid", target.pid, "--disable", "steps!steps+4", "--on-hit", "skip=8", "--as", "ten")
    assert target.ask("steps 3") == "4"


@pytest.mark.parametrize("scope", ["entry", "block"])
def test_learn_puts_the_bytes_back_and_tells_what_was_hit(program: Start, dynacut: Dynacut, scope: str) -> None:
    target = program("counter")
    address = symbol(target, "feature")
    original = bytes_at(target, address, 64)
    sites = ("feature", "work")
    dynacut.json(
        "live", "--pid", target.pid, "--disable", *sites, "--on-hit", "learn", "--scope", scope, "--as", "learned"
    )
    assert bytes_at(target, address, 64) != original
    assert [target.ask("feature 3") for _ in range(3)] == [str(feature(3))] * 3
    assert bytes_at(target, address, 64) == original
    (entry,) = dynacut.json("live", "--pid", target.pid, "-v")["features"]
    hits = {site["address"]: (site["hits"], site["patched"]) for site in entry["site_list"]}
    assert hits == {f"{address:#x}": (1, False), f"{symbol(target, 'work'):#x}": (0, True)}
    dynacut.json("live", "--pid", target.pid, "--undo")
    assert target.ask("feature 3") == str(feature(3))


def test_learning_under_load_gives_no_wrong_result(program: Start) -> None:
    """Many threads run into blocks that one of them is putting back."""
    target = program("callers", 4)
    address = symbol(target, "feature")
    assert target.ask("start") == "ok"
    for cycle in range(10):
        scope = ("entry", "block")[cycle % 2]
        run_json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "learn", "--scope", scope)
        wait_until(lambda: bytes_at(target, address, 1) != b"\xcc", "the block is put back")
        (entry,) = run_json("live", "--pid", target.pid)["features"]
        assert entry["hits"] >= 1
        run_json("live", "--pid", target.pid, "--undo")
    counters = target.counters("stop")
    assert (counters["denied"], counters["wrong"]) == (0, 0)


@pytest.mark.parametrize("threads", [1, 16])
def test_every_hit_is_counted(program: Start, dynacut: Dynacut, threads: int) -> None:
    target = program("callers", threads)
    dynacut.json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "redirect=denied")
    calls = 8000 // threads
    assert target.counters(f"each {calls}") == {"right": 0, "denied": 8000, "wrong": 0}
    (entry,) = dynacut.json("live", "--pid", target.pid)["features"]
    assert entry["hits"] == 8000
    dynacut.json("live", "--pid", target.pid, "--enable", "feature")
    assert target.counters("each 10") == {"right": 10 * threads, "denied": 0, "wrong": 0}
    dynacut.json("live", "--pid", target.pid, "--disable", "feature")
    assert target.counters("each 10") == {"right": 0, "denied": 10 * threads, "wrong": 0}
    (entry,) = dynacut.json("live", "--pid", target.pid)["features"]
    assert entry["hits"] == 8000 + 10 * threads


def test_several_features_are_switched_each_by_its_name(program: Start, dynacut: Dynacut) -> None:
    target = program("counter")
    before = Snapshot.of(target.pid)
    dynacut.json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "return=-5", "--as", "one")
    dynacut.json("live", "--pid", target.pid, "--disable", "other", "--on-hit", "return=-6", "--as", "two")
    assert [target.ask("feature 3"), target.ask("other 3")] == ["-5", "-6"]
    report = dynacut.json("live", "--pid", target.pid, "--enable", "one")
    assert {entry["name"]: entry["state"] for entry in report["features"]} == {"one": "enabled", "two": "disabled"}
    assert [target.ask("feature 3"), target.ask("other 3")] == [str(feature(3)), "-6"]
    dynacut.json("live", "--pid", target.pid, "--disable", "one")
    dynacut.json("live", "--pid", target.pid, "--enable", "two")
    assert [target.ask("feature 3"), target.ask("other 3")] == ["-5", "17"]
    report = dynacut.json("live", "--pid", target.pid)
    assert {entry["name"]: entry["hits"] for entry in report["features"]} == {"one": 2, "two": 2}
    dynacut.json("live", "--pid", target.pid, "--enable", "one", "two")
    assert dynacut.json("live", "--pid", target.pid, "--undo")["features"] == []
    assert Snapshot.of(target.pid) == before


def test_a_plain_edit_flips_a_jump_and_back(program: Start, dynacut: Dynacut, tmp_path: Path) -> None:
    target = program("steps")
    before = Snapshot.of(target.pid)
    plan = tmp_path / "plan.toml"
    plan.write_text(
        """
        format = 1
        name = "the other way"
        [[edit]]
        at = "choose+3"
        old = "74 06"
        new = "75 06"
        [[edit]]
        at = "steps!steps+0x4"
        old = "48 83 c0 0a"
        new = "48 83 c0 14"
        feature = "twenty"
        """
    )
    assert [target.ask("choose 0"), target.ask("choose 3"), target.ask("steps 3")] == ["2", "1", "114"]
    dynacut.json("live", "--pid", target.pid, "--plan", plan)
    assert [target.ask("choose 0"), target.ask("choose 3"), target.ask("steps 3")] == ["1", "2", "124"]
    report = dynacut.json("live", "--pid", target.pid, "--enable", "edits")
    states = {entry["name"]: entry["state"] for entry in report["features"]}
    assert states == {"edits": "enabled", "twenty": "disabled"}
    assert [target.ask("choose 0"), target.ask("steps 3")] == ["2", "124"]
    dynacut.json("live", "--pid", target.pid, "--undo")
    assert [target.ask("choose 0"), target.ask("choose 3"), target.ask("steps 3")] == ["2", "1", "114"]
    assert Snapshot.of(target.pid) == before


def test_a_plan_with_build_id_and_old_bytes_fits_the_program_it_was_made_for(
    program: Start, dynacut: Dynacut, tmp_path: Path
) -> None:
    target = program("counter")
    executable = _executable(target)
    nm = subprocess.run(["nm", str(executable)], check=True, capture_output=True, text=True).stdout
    offsets = {line.split()[2]: int(line.split()[0], 16) for line in nm.splitlines() if len(line.split()) == 3}
    old = {name: bytes_at(target, symbol(target, name), 4).hex(" ") for name in ("feature", "other")}
    plan = tmp_path / "plan.toml"
    plan.write_text(
        f"""
        format = 1
        name = "neither"
        [module.anything]
        path = "{executable}"
        build_id = "{_build_id(executable)}"
        [[feature]]
        name = "one"
        on_hit = "redirect=anything+{offsets["denied"]:#x}"
        sites = [{{ at = "anything+{offsets["feature"]:#x}", old = "{old["feature"]}" }}]
        [[feature]]
        name = "two"
        on_hit = "return=-6"
        sites = [{{ at = "anything+{offsets["other"]:#x}", old = "{old["other"]}" }}]
        """
    )
    dynacut.json("live", "--pid", target.pid, "--plan", plan, "--feature", "two")
    assert [target.ask("feature 3"), target.ask("other 3")] == [str(feature(3)), "-6"]
    dynacut.json("live", "--pid", target.pid, "--plan", plan)
    assert [target.ask("feature 3"), target.ask("other 3")] == [str(DENIED), "-6"]
    done = dynacut("live", "--pid", target.pid, "--plan", plan, "--feature", "three")
    assert done.returncode == 1
    assert "'three'" in done.stderr
    assert "one, two" in done.stderr
    again = dynacut.json("live", "--pid", target.pid, "--plan", plan)
    assert again["changed"] is False, "all of it is in force already"
    dynacut.json("live", "--pid", target.pid, "--undo")
    assert [target.ask("feature 3"), target.ask("other 3")] == [str(feature(3)), "17"]


def test_a_dry_run_changes_nothing(program: Start, dynacut: Dynacut) -> None:
    target = program("counter")
    before, maps = Snapshot.of(target.pid), Path(f"/proc/{target.pid}/maps").read_text()
    report = dynacut.json("live", "--pid", target.pid, "--disable", "feature", "other", "--as", "both", "--dry-run")
    assert (report["changed"], report["edits"], report["features"]) == (False, 2, [])
    assert Path(f"/proc/{target.pid}/maps").read_text() == maps
    assert Snapshot.of(target.pid) == before
    assert target.ask("feature 3") == str(feature(3))
    dynacut.json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "return=1")
    report = dynacut.json("live", "--pid", target.pid, "--undo", "--dry-run")
    assert (report["changed"], report["edits"]) == (False, 1)
    assert target.ask("feature 3") == "1"


def test_another_process_of_the_same_program_stays_as_it_is(dynacut: Dynacut, tmp_path: Path) -> None:
    executable = compile_program("counter", tmp_path)
    file_before = executable.read_bytes()
    with Program(executable) as target, Program(executable) as bystander:
        before = Snapshot.of(bystander.pid)
        dynacut.json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "return=-1")
        assert [target.ask("feature 3"), bystander.ask("feature 3")] == ["-1", str(feature(3))]
        assert Snapshot.of(bystander.pid) == before
    assert executable.read_bytes() == file_before


def test_a_process_is_found_by_its_name(dynacut: Dynacut, tmp_path: Path) -> None:
    compiled = compile_program("counter", tmp_path)
    executable = compiled.rename(tmp_path / f"named-{os.getpid()}")
    with Program(executable) as target:
        report = dynacut.json("live", "--name", executable.name, "--disable", "feature", "--on-hit", "return=-1")
        assert report["target"] == {"pid": target.pid, "exe": str(executable)}
        assert target.ask("feature 3") == "-1"


def test_the_json_is_as_designed(program: Start, dynacut: Dynacut) -> None:
    target = program("counter")
    empty = dynacut.json("live", "--pid", target.pid)
    assert empty["target"] == {"pid": target.pid, "exe": str(_executable(target))}
    assert (empty["features"], empty["changed"], empty["stopped_us"]) == ([], False, 0)
    assert empty["modules"][0]["name"] == "counter"
    changed = dynacut.json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "return=-1")
    assert changed["changed"] is True
    assert changed["stopped_us"] > 0
    assert changed["wall_ms"] > 0
    (entry,) = changed["features"]
    assert (entry["name"], entry["state"], entry["sites"], entry["hits"]) == ("feature", "disabled", 1, 0)
    unchanged = dynacut.json("live", "--pid", target.pid, "--disable", "feature", "--on-hit", "return=-1")
    assert unchanged["changed"] is False


def test_what_another_tool_has_patched_is_shown(program: Start, dynacut: Dynacut) -> None:
    target = program("counter")
    address = symbol(target, "other")
    with Path(f"/proc/{target.pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(address)
        original = memory.read(1)
        memory.seek(address)
        memory.write(b"\x90")
        (foreign,) = dynacut.json("live", "--pid", target.pid)["foreign"]
        memory.seek(address)
        memory.write(original)
    assert (foreign["size"], foreign["found"], foreign["original"]) == (1, "90", original.hex())
    assert dynacut.json("live", "--pid", target.pid)["foreign"] == []
