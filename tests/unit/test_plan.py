"""Plans: read, written, and refused with every problem named."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynacut.handlers.table import Action
from dynacut.shared import plan_file
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.on_hit import DIE_BY_SIGTRAP, OnHit
from dynacut.shared.plan import (
    EDITS,
    PROTECTIONS,
    Plan,
    PlannedEdit,
    PlannedFeature,
    PlannedMemory,
    PlannedModule,
    PlannedRemoval,
    PlannedSite,
    Scope,
    name_problem,
)
from dynacut.shared.plan_file import dumps, load, loads
from dynacut.shared.target import PAGE_SIZE

EXAMPLE = """
    format = 1
    name = "redis without SET"

    [module.redis-server]
    path = "/usr/bin/redis-check-rdb"
    build_id = "0123456789abcdef0123456789abcdef01234567"

    [[feature]]
    name = "set"
    on_hit = "redirect=redis-server+0xab1f0"
    scope = "entry"
    sites = [{ at = "redis-server+0xab060", size = 14, old = "41" }]

    [[edit]]                     # plain byte edits, mappings to add or remove: same model, both backends
    at = "redis-server+0xb02dc"
    old = "0f 84"
    new = "90 e9"
"""
FEATURE = '[[feature]]\nname = "set"\nsites = [{ at = "x+0x10" }]\n'


def problems(text: str) -> list[str]:
    """What a plan is refused for: one line each, and nothing that a terminal would obey."""
    with pytest.raises(DynacutError) as caught:
        loads(text)
    error = caught.value
    assert error.status is ExitStatus.REFUSED
    for line in (error.problem, error.advice, *error.details):
        assert line.isprintable(), f"not one printable line: {line!r}"
    return list(error.details) or [error.problem]


def test_the_example_of_the_design_is_read() -> None:
    assert loads(EXAMPLE) == Plan(
        "redis without SET",
        (
            PlannedFeature(
                "set",
                OnHit(Action.REDIRECT, 0, "redis-server+0xab1f0"),
                Scope.ENTRY,
                (PlannedSite("redis-server+0xab060", 14, b"\x41"),),
            ),
        ),
        (PlannedEdit("redis-server+0xb02dc", b"\x0f\x84", b"\x90\xe9", EDITS),),
        {"redis-server": PlannedModule("/usr/bin/redis-check-rdb", "0123456789abcdef0123456789abcdef01234567")},
    )


def test_what_is_left_out_has_its_default() -> None:
    plan = loads("format = 1\n" + FEATURE)
    (feature,) = plan.features
    assert (plan.name, plan.modules, plan.edits) == ("plan", {}, ())
    assert (feature.on_hit, feature.scope) == (OnHit(Action.TERMINATE, DIE_BY_SIGTRAP), Scope.ENTRY)
    assert feature.sites == (PlannedSite("x+0x10", None, b""),)


names = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=15)
sites = st.builds(PlannedSite, names, st.one_of(st.none(), st.integers(8, 1 << 16)), st.binary(max_size=8))
on_hits = st.sampled_from(["terminate", "terminate=7", "redirect=a!b", "return=-1", "skip=2", "learn", "handler"])


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    features = [
        PlannedFeature(
            name,
            OnHit.parse(draw(on_hits)),
            draw(st.sampled_from(Scope)),
            tuple(draw(st.lists(sites, min_size=1, max_size=4))),
        )
        for name in draw(st.lists(names, unique=True, min_size=1, max_size=3))
    ]
    edits = [
        PlannedEdit(draw(names), old, bytes(byte ^ 1 for byte in old), draw(names))
        for old in draw(st.lists(st.binary(min_size=1, max_size=8), max_size=3))
    ]
    modules = st.builds(PlannedModule, st.one_of(st.just(""), names), st.sampled_from([None, "ab12"]))
    pages = st.integers(1, 16).map(lambda count: count * PAGE_SIZE)
    contents = st.binary(max_size=20)
    added = st.builds(PlannedMemory, names, pages, st.sampled_from(PROTECTIONS), contents, names)
    removed = st.builds(PlannedRemoval, names, pages, names)
    return Plan(
        draw(names),
        tuple(features),
        tuple(edits),
        draw(st.dictionaries(names, modules, max_size=2)),
        tuple(draw(st.lists(added, max_size=2))),
        tuple(draw(st.lists(removed, max_size=2))),
    )


@settings(max_examples=40, deadline=None)
@given(plans())
def test_what_is_written_is_read_back(plan: Plan) -> None:
    assert loads(dumps(plan)) == plan


def test_only_some_features_can_be_chosen() -> None:
    plan = loads("format = 1\n" + FEATURE + FEATURE.replace("set", "get") + "[[edit]]\nat='a'\nold='00'\nnew='01'\n")
    assert plan.feature_names == ("set", "get", EDITS)
    assert plan.only(["get"]).feature_names == ("get",)
    assert plan.only([EDITS, "set"]).feature_names == ("set", EDITS)
    with pytest.raises(DynacutError, match="no feature 'del'") as caught:
        plan.only(["set", "del"])
    assert "set, get, edits" in caught.value.advice


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "format is None; this program reads format 1"),
        (FEATURE, "format is None"),
        ("format = 2\n" + FEATURE, "format is 2"),
        ("format = 1", "neither a [[feature]] nor an [[edit]]"),
        ("format = 1\nfeatures = 1\n" + FEATURE, "the plan: unknown key 'features'"),
        ("format = 1\nname = 5\n" + FEATURE, "the plan: name is not a text"),
        ("format = 1\nmodule = 5\n" + FEATURE, "module is not a table"),
        ("format = 1\n[module]\nx = 5\n" + FEATURE, "module.x is not a table"),
        ("format = 1\n[module.x]\nbuildid = '00'\n" + FEATURE, "module.x: unknown key 'buildid'"),
        ("format = 1\n[module.x]\nbuild_id = 'AB'\n" + FEATURE, "module.x: build_id is not lower-case hexadecimal"),
        ("format = 1\n[module.x]\nbuild_id = 5\n" + FEATURE, "module.x: build_id is not a text"),
        ("format = 1\n[module.x]\npath = 5\n" + FEATURE, "module.x: path is not a text"),
        ("format = 1\nfeature = 5", "the plan: feature is not a list of tables"),
        ("format = 1\nfeature = [5]", "the plan: feature is not a list of tables"),
        ("format = 1\n[feature]\nname = 'x'", "the plan: feature is not a list of tables"),
        ("format = 1\n[[feature]]\nsites = [{ at = 'a' }]", "a feature: name is missing"),
        ("format = 1\n[[feature]]\nname = ''\nsites = [{ at = 'a' }]", "a feature: name is not a text"),
        ("format = 1\n[[feature]]\nname = 'set'", "feature 'set' has no sites"),
        ("format = 1\n[[feature]]\nname = 'set'\nsites = []", "feature 'set' has no sites"),
        ("format = 1\n[[feature]]\nname = 'set'\nsites = ['a']", "feature 'set': sites is not a list of tables"),
        ("format = 1\n" + FEATURE + "on-hit = 'learn'", "feature 'set': unknown key 'on-hit'"),
        ("format = 1\n" + FEATURE + "on_hit = 'die'", "feature 'set': 'die' is no action for a hit"),
        ("format = 1\n" + FEATURE + "on_hit = 5", "feature 'set': on_hit is not a text"),
        ("format = 1\n" + FEATURE + "scope = 'all'", "feature 'set': scope is one of entry, block, page"),
        ("format = 1\n" + FEATURE.replace("at =", "at = 'b', to ="), "feature 'set': a site: unknown key 'to'"),
        ("format = 1\n" + FEATURE.replace("at =", "size = 1, old ="), "feature 'set': at is missing"),
        ("format = 1\n" + FEATURE.replace("at =", "size = 0, at ="), "size 0 is not a number from 1 to 65536"),
        ("format = 1\n" + FEATURE.replace("at =", "size = 65537, at ="), "size 65537 is not a number"),
        ("format = 1\n" + FEATURE.replace("at =", "size = true, at ="), "size True is not a number"),
        ("format = 1\n" + FEATURE.replace("at =", "size = 1.0, at ="), "size 1.0 is not a number"),
        ("format = 1\n" + FEATURE.replace("at =", "old = '5', at ="), "feature 'set': old is not bytes in hexadecimal"),
        (
            "format = 1\n" + FEATURE.replace("at =", "size = 1, old = '5566', at ="),
            "a site of 1 bytes with 2 old bytes",
        ),
        ("format = 1\n" + FEATURE + FEATURE, "feature 'set' occurs twice"),
        ("format = 1\n[[edit]]\nold = '00'\nnew = '01'", "an edit: at is missing"),
        ("format = 1\n[[edit]]\nat = 'a'\nnew = '01'", "edit at a: old is missing"),
        ("format = 1\n[[edit]]\nat = 'a'\nold = '00'", "edit at a: new is missing"),
        ("format = 1\n[[edit]]\nat = 'a'\nold = '00'\nnew = '0102'", "edit at a: old and new must be equally long"),
        ("format = 1\n[[edit]]\nat = 'a'\nold = '00'\nnew = '00'", "edit at a: old and new must be"),
        ("format = 1\n[[edit]]\nat = 'a'\nold = 'x'\nnew = '01'", "edit at a: old is not bytes in hexadecimal"),
        ("format = 1\n[[edit]]\nat = 'a'\nold = '00'\nnew = '01'\nkind = 1", "an edit: unknown key 'kind'"),
        ("format = 1\n[[edit]]\nat = 'a'\nold = '00'\nnew = '01'\nfeature = ''", "edit at a: feature is not a text"),
        ("format = 1\n[[edit]]\nat = 'a'\nmap = 100", "edit at a: map is a number of bytes in whole pages of 4096"),
        ("format = 1\n[[edit]]\nat = 'a'\nmap = '4096'", "edit at a: map is a number of bytes"),
        ("format = 1\n[[edit]]\nat = 'a'\nmap = 4096\nprotection = 'rwx'", "edit at a: protection is one of r--"),
        ("format = 1\n[[edit]]\nat = 'a'\nmap = 4096\ncontents = '0'", "edit at a: contents is not bytes"),
        (f"format = 1\n[[edit]]\nat = 'a'\nmap = 4096\ncontents = '{'00' * 4097}'", "4097 bytes of contents in 4096"),
        ("format = 1\n[[edit]]\nat = 'a'\nmap = 4096\nold = '00'", "an edit: unknown key 'old'"),
        ("format = 1\n[[edit]]\nat = 'a'\nmap = 4096\nunmap = 4096", "an edit: unknown key 'unmap'"),
        ("format = 1\n[[edit]]\nat = 'a'\nunmap = 0", "edit at a: unmap is a number of bytes in whole pages"),
        ("format = 1\n[[edit]]\nat = 'a'\nunmap = true", "edit at a: unmap is a number of bytes in whole pages"),
        ("format = ", "not TOML"),
        ("\0", "not TOML"),
        ("format = 1\nformat = 1", "not TOML"),
    ],
)
def test_each_problem_is_named_with_its_place(text: str, problem: str) -> None:
    assert any(problem in line for line in problems(text))


def test_all_problems_are_named_at_once() -> None:
    text = """
        format = 3
        [module.x]
        build_id = "XY"
        [[feature]]
        name = "set"
        scope = "all"
        on_hit = "die"
        sites = [{ at = "a", size = 0 }, { old = "5" }]
        [[edit]]
        at = "b"
    """
    found = problems(text)
    expected = ("format is 3", "build_id", "scope is", "no action", "size 0", "at is missing", "old is not", "new is")
    assert all(any(part in line for line in found) for part in expected)


@pytest.mark.parametrize("name", ["", "x" * 64, "é" * 32, "a\nb", "a\0b", "a\x1b[2J", "\udcff"])
def test_a_name_that_the_table_cannot_hold_is_refused(name: str) -> None:
    assert name_problem(name) is not None
    assert "\n" not in str(name_problem(name))


@pytest.mark.parametrize("name", ["x" * 63, "é" * 31, "with spaces", "=", "ß"])
def test_a_name_that_the_table_can_hold_is_taken(name: str) -> None:
    assert name_problem(name) is None


@pytest.mark.parametrize(
    "text",
    [
        'format = 1\n[module."a\\nb"]\nx = 1\n' + FEATURE,
        'format = 1\n[module."\\u001b[2J"]\nbuild_id = "X"\n' + FEATURE,
        'format = 1\n[[edit]]\nat = "a\\nb"\nold = "00"\nnew = "00"',
        'format = 1\n"a\\nb" = 1\n' + FEATURE,
        'format = 1\n[[feature]]\nname = "a\\nb"\nsites = []',
    ],
)
def test_line_breaks_in_a_plan_do_not_break_the_lines_about_it(text: str) -> None:
    assert problems(text)


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 100_000,
        "x = " + "[" * 300 + "]" * 300,
        "x = " + "{a = " * 10_000,
        "format = " + "[" * 200 + "]" * 200 + "\n" + FEATURE,
        "format." + "a." * 3000 + "a = 1\n" + FEATURE,
        "[" + "a." * 3000 + "a]\nx = 1",
    ],
    ids=["lists", "closed lists", "tables", "format of lists", "format of dotted keys", "dotted table"],
)
def test_deep_nesting_is_refused(text: str) -> None:
    assert all(len(line) < 2000 for line in problems(text))


@pytest.mark.parametrize(
    "text",
    [
        "format = " + "1" * 5000,
        "format = 0x" + "f" * 5000,
        "format = 1\n" + FEATURE.replace("at =", "size = 0x" + "f" * 5000 + ", at ="),
        "format = 1\n" + FEATURE.replace("at =", "size = 1e400, at ="),
        "format = 1\n" + FEATURE.replace("at =", "size = " + "1" * 5000 + ", at ="),
        "format = 2024-01-01\n" + FEATURE,
    ],
    ids=["decimal format", "hexadecimal format", "hexadecimal size", "float size", "decimal size", "date"],
)
def test_enormous_numbers_are_refused(text: str) -> None:
    assert problems(text)


def test_a_long_text_is_not_repeated_in_full() -> None:
    for text in (
        "format = '" + "x" * 100_000 + "'\n" + FEATURE,
        "format = 1\n" + FEATURE.replace("set", "x" * 100_000),
        "format = 1\n" + FEATURE + "on_hit = '" + "x" * 100_000 + "'",
    ):
        assert all(len(line) < 2000 for line in problems(text))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_plan_with_any_damage_is_read_or_refused(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(EXAMPLE)))
    end = data.draw(st.integers(start, min(len(EXAMPLE), start + 10)))
    replacement = data.draw(
        st.one_of(st.text(max_size=3), st.sampled_from(['"', "[", "]", "=", "1", "\n", "{}", "[]"]))
    )
    with suppress(DynacutError):
        loads(EXAMPLE[:start] + replacement + EXAMPLE[end:])


def test_a_file_is_read_and_its_problems_name_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(EXAMPLE)
    assert load(path) == loads(EXAMPLE)
    path.write_text("format = 1")
    with pytest.raises(DynacutError, match=re.escape(f"{path}: not a plan")) as caught:
        load(path)
    assert len(caught.value.details) == 1


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DynacutError, match="cannot be read: No such file"):
        load(tmp_path / "none.toml")
    with pytest.raises(DynacutError, match="cannot be read: Is a directory"):
        load(tmp_path)
    (tmp_path / "latin").write_bytes(b"name = '\xe9'")
    with pytest.raises(DynacutError, match="not UTF-8"):
        load(tmp_path / "latin")


def test_a_file_that_is_too_large_is_refused_without_being_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "large.toml"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DynacutError, match="larger than 64 MiB"):
        load(path)
    assert plan_file.MAX_PLAN_SIZE == 64 << 20
