"""Blocks that were learned: read from a table in the order of their hits, written as a log, taken out of a plan."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_sites import LIBRARY_BASE, MemoryTarget, new_target
from test_table import Memory

from dynacut.cli.block_lists import LEARNED, STANDING, show_blocks
from dynacut.cli.main import main
from dynacut.handlers.table import Action, TableSite
from dynacut.shared.coverage.coverage import Coverage, CoveredModule, union_of_all
from dynacut.shared.coverage.drcov import read_log, write
from dynacut.shared.coverage.keep import learned_blocks, planned_code, without
from dynacut.shared.errors import DynacutError
from dynacut.shared.on_hit import OnHit
from dynacut.shared.plan import Plan, PlannedEdit, PlannedFeature, PlannedModule, PlannedSite, Scope
from dynacut.shared.plan_file import dumps, load

needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")
PATH, OTHER = "/usr/bin/server", "/usr/lib/libother.so.1"


def learning(address: int, feature: str = "startup", size: int = 4, action: Action = Action.LEARN) -> TableSite:
    return TableSite(address, feature, action, 0, size, b"\x55", b"\xcc")


def table_of(target: MemoryTarget) -> Memory:
    """alpha learns by two blocks, beta by one of another feature, the library by one; main() ends the process."""
    memory = Memory()
    alpha = target.address("alpha")
    sites = [
        learning(alpha),
        learning(alpha + 4, size=9),
        learning(target.address("beta"), "other", 6),
        learning(target.address("extra"), size=3),
        learning(target.address("main"), "end", action=Action.TERMINATE),
    ]
    memory.update(["startup", "other", "end"], sites)
    return memory


@needs_gcc
def test_only_what_learns_and_was_hit_is_learned_in_the_order_of_hits() -> None:
    target = new_target()
    memory = table_of(target)
    assert learned_blocks(target, memory.table()).modules == ()
    for order, name in enumerate(["extra", "beta", "main"], 1):
        memory.hit(target.address(name), order)
    memory.hit(target.address("alpha") + 4, 4)
    learned = learned_blocks(target, memory.table())
    assert [(module.name, list(module.blocks.items())) for module in learned.modules] == [
        ("libextra.so.1", [(target.address("extra") - LIBRARY_BASE, 3)]),
        ("server", [(target.offset("beta"), 6), (target.offset("alpha") + 4, 9)]),
    ]
    assert [module.path for module in learned.modules] == [str(each.file) for each in reversed(target.modules)]
    assert all(module.build_id for module in learned.modules)


@needs_gcc
def test_without_a_table_nothing_is_learned() -> None:
    assert learned_blocks(new_target(), None) == Coverage(())


@needs_gcc
def test_what_lies_in_no_module_any_more_is_left_out() -> None:
    target = new_target()
    memory = table_of(target)
    memory.hit(target.address("extra"), 1)
    memory.hit(target.address("alpha"), 2)
    target.modules = target.modules[:1]
    (module,) = learned_blocks(target, memory.table()).modules
    assert module.blocks == {target.offset("alpha"): 4}


@needs_gcc
def test_the_blocks_of_several_processes_are_united() -> None:
    target = new_target()
    one, other = table_of(target), table_of(target)
    one.hit(target.address("alpha"), 1)
    other.hit(target.address("alpha"), 2)
    other.hit(target.address("beta"), 1)
    both = union_of_all(learned_blocks(target, each.table()) for each in (one, other))
    assert list(both.module("server").blocks) == [target.offset("alpha"), target.offset("beta")]
    assert union_of_all([]) == Coverage(())


@needs_gcc
def test_learned_blocks_written_and_taken_out_leave_the_others(tmp_path: Path) -> None:
    """The whole way: table, log, plan."""
    target = new_target()
    memory = table_of(target)
    memory.hit(target.address("alpha") + 4, 1)
    write(tmp_path / "learned.drcov", learned_blocks(target, memory.table()))
    alpha = target.offset("alpha")
    plan = a_plan({alpha: 4, alpha + 4: 9}, path=str(target.modules[0].file))
    left, count = without(plan, read_log(tmp_path / "learned.drcov").coverage)
    assert (offsets(left), count) == ([alpha], 1)


def a_plan(*features: dict[int, int], path: str = PATH, edits: tuple[PlannedEdit, ...] = ()) -> Plan:
    return Plan(
        "plan",
        tuple(
            PlannedFeature(f"feature {index}", OnHit.parse("learn"), Scope.BLOCK, sites(blocks))
            for index, blocks in enumerate(features)
        ),
        edits,
        {"server": PlannedModule(path, None), "other": PlannedModule(OTHER, None)},
    )


def sites(blocks: dict[int, int], module: str = "server") -> tuple[PlannedSite, ...]:
    return tuple(PlannedSite(f"{module}+{offset:#x}", size or None) for offset, size in blocks.items())


def offsets(plan: Plan) -> list[int]:
    return [int(site.at.partition("+")[2], 16) for feature in plan.features for site in feature.sites]


def kept(blocks: dict[int, int], path: str = PATH) -> Coverage:
    return Coverage((CoveredModule.of(path, blocks),))


@pytest.mark.parametrize(
    ("blocks", "left"),
    [
        ({0x100: 8}, [0x120, 0x140]),
        ({0x107: 1}, [0x120, 0x140]),
        ({0x108: 0x18}, [0x100, 0x120, 0x140]),
        ({0x108: 0x19}, [0x100, 0x140]),
        ({0x13F: 2}, [0x100, 0x120]),
        ({0x140: 1}, [0x100, 0x120]),
        ({0x141: 9}, [0x100, 0x120, 0x140]),
        ({0xF0: 0x11, 0x127: 1}, [0x140]),
    ],
)
def test_a_site_stays_out_as_soon_as_one_byte_of_it_is_kept(blocks: dict[int, int], left: list[int]) -> None:
    """The last site has no size: it is its first byte."""
    plan, count = without(a_plan({0x100: 8, 0x120: 8, 0x140: 0}), kept(blocks))
    assert offsets(plan) == left
    assert count == 3 - len(left)


@st.composite
def separate_blocks(draw: st.DrawFn) -> dict[int, int]:
    """Blocks that do not overlap, as no plan that can be applied has any that do."""
    blocks, end = {}, 0
    for gap, size in draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12)), min_size=1, max_size=12)):
        blocks[end + gap] = size
        end += gap + size
    return blocks


@given(separate_blocks(), st.dictionaries(st.integers(0, 200), st.integers(1, 12), max_size=12))
def test_just_the_sites_with_a_kept_byte_go(planned: dict[int, int], blocks: dict[int, int]) -> None:
    stay = {byte for offset, size in blocks.items() for byte in range(offset, offset + size)}
    expected = [offset for offset, size in planned.items() if not stay & set(range(offset, offset + size))]
    if expected:
        plan, count = without(a_plan(planned), kept(blocks))
        assert (offsets(plan), count) == (expected, len(planned) - len(expected))
    else:
        with pytest.raises(DynacutError, match="nothing is left"):
            without(a_plan(planned), kept(blocks))


def test_all_else_in_the_plan_is_as_before() -> None:
    edit = PlannedEdit("server+0x100", b"\x74", b"\xeb")
    before = a_plan({0x100: 4, 0x200: 4}, {0x300: 4}, edits=(edit,))
    plan, count = without(before, kept({0x100: 4, 0x300: 1}))
    assert count == 2
    assert [(feature.name, str(feature.on_hit), feature.scope) for feature in plan.features] == [
        ("feature 0", "learn", Scope.BLOCK)
    ], "a feature of which nothing is left goes"
    assert (plan.edits, plan.modules, plan.name) == (before.edits, before.modules, before.name)
    only_edits, _ = without(before, kept({0: 0x1000}))
    assert (only_edits.features, only_edits.edits) == ((), (edit,))


def test_other_modules_and_sites_by_symbol_are_not_touched() -> None:
    plan = Plan(
        "plan",
        (
            PlannedFeature(
                "one",
                OnHit.parse("learn"),
                Scope.ENTRY,
                (*sites({0x100: 4}), *sites({0x100: 4}, "other"), PlannedSite("main"), PlannedSite("main+0x100")),
            ),
        ),
        (),
        a_plan({0: 1}).modules,
    )
    left, count = without(plan, kept({0x100: 4}, OTHER))
    assert [site.at for site in left.features[0].sites] == ["server+0x100", "main", "main+0x100"]
    assert count == 1


def test_the_command_takes_learned_blocks_out_in_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, log = tmp_path / "plan.toml", tmp_path / "learned.drcov"
    plan.write_text(dumps(a_plan({0x100: 4, 0x200: 4}, {0x300: 4})))
    write(log, kept({0x100: 4}))
    command = ["plan", "--plan", str(plan), "--keep", str(log)]
    final = tmp_path / "final.toml"
    assert main([*command, "-o", str(final), "--on-hit", "terminate", "--scope", "entry", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {"schema": 1, "plan": str(final), "kept": 1, "sites": 2}
    assert [(str(part.on_hit), part.scope) for part in load(final).features] == [("terminate", Scope.ENTRY)] * 2
    assert len(offsets(load(plan))) == 3, "not in place yet"
    assert main(command) == 0
    assert "1 blocks stay, 2 go" in capsys.readouterr().out
    assert offsets(load(plan)) == [0x200, 0x300]
    assert [(str(part.on_hit), part.scope) for part in load(plan).features] == [("learn", Scope.BLOCK)] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final.toml", "learned.drcov", "plan.toml"]


def test_a_plan_is_as_before_if_nothing_would_be_left_or_a_log_is_broken(tmp_path: Path) -> None:
    plan, log = tmp_path / "plan.toml", tmp_path / "learned.drcov"
    text = dumps(a_plan({0x100: 4}))
    plan.write_text(text)
    write(log, kept({0x100: 4}))
    broken = tmp_path / "broken"
    broken.write_bytes(log.read_bytes()[:-3])
    for given_log in (log, broken, tmp_path / "none"):
        assert main(["plan", "--plan", str(plan), "--keep", str(given_log)]) == 1
        assert plan.read_text() == text


def test_planned_code_is_what_a_plan_names_by_module_and_offset() -> None:
    sites = (
        PlannedSite("server+0x10", 8),
        PlannedSite("server+0x40"),
        PlannedSite("main", 4),
        PlannedSite("odd+0x1", 2),
    )
    feature = PlannedFeature("f", OnHit.parse("terminate"), Scope.ENTRY, sites)
    (module,) = planned_code(Plan("p", (feature,), (), {"server": PlannedModule(PATH, "ab")})).modules
    assert (module.path, module.build_id, module.blocks) == (PATH, "ab", {0x10: 8, 0x40: 1})


def test_learned_blocks_are_shown_as_sites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learned = kept({0x200: 4, 0x100: 9})
    log = tmp_path / "learned.drcov"
    show_blocks(learned, LEARNED, {"pid": 1}, log, as_json=True, verbose=False, quiet=False)
    assert json.loads(capsys.readouterr().out) == {
        "schema": 1,
        "target": {"pid": 1},
        "learned": [{"at": "server+0x200", "size": 4}, {"at": "server+0x100", "size": 9}],
        "log": str(log),
    }
    assert list(read_log(log).coverage.module(PATH).blocks.items()) == [(0x200, 4), (0x100, 9)]
    show_blocks(learned, LEARNED, {}, None, as_json=False, verbose=False, quiet=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["1\tserver+0x200\t4", "2\tserver+0x100\t9", "2 blocks learned"]
    show_blocks(Coverage(()), LEARNED, {}, None, as_json=False, verbose=False, quiet=False)
    assert capsys.readouterr().out == "nothing was learned\n"
    show_blocks(learned, STANDING, {}, None, as_json=True, verbose=False, quiet=False)
    assert [place["at"] for place in json.loads(capsys.readouterr().out)["standing"]] == [
        "server+0x200",
        "server+0x100",
    ]


def test_of_many_learned_blocks_the_first_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    learned = kept({8 * index: 8 for index in range(100)})
    show_blocks(learned, LEARNED, {}, None, as_json=False, verbose=False, quiet=False)
    few = capsys.readouterr().out
    assert "… and 60 more" in few and "server+0x140\n" not in few
    show_blocks(learned, LEARNED, {}, None, as_json=False, verbose=True, quiet=False)
    assert "server+0x318" in capsys.readouterr().out
