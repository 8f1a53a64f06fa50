"""Start-up code: from what a small program really executes, and from hand-made logs."""

from __future__ import annotations

import atexit
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_shot import run

from dynacut.cli.main import main
from dynacut.shared.code import code_of_file
from dynacut.shared.coverage.coverage import Coverage, CoveredModule
from dynacut.shared.coverage.drcov import write
from dynacut.shared.coverage.startup import StartupCode, split_at, startup_code, startup_plan
from dynacut.shared.errors import DynacutError
from dynacut.shared.on_hit import OnHit
from dynacut.shared.plan import Plan, Scope
from dynacut.shared.plan_file import dumps, load, loads

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")

SOURCE = Path(__file__).with_name("programs") / "phases.c"
LEARN = OnHit.parse("learn")


@cache
def program() -> Path:
    path = Path(mkdtemp(prefix="dynacut-test-")) / "phases"
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    subprocess.run(["gcc", "-O1", "-Wl,--build-id", SOURCE, "-o", path], check=True)
    return path


@cache
def executed(*requests: str) -> Mapping[int, int]:
    """All blocks of a run, in the order of first hits."""
    return run(program(), code_of_file(program()).blocks, requests)[1]


def coverage(blocks: Mapping[int, int], path: Path | None = None) -> Coverage:
    return Coverage((CoveredModule.of(str(path or program()), blocks),))


def init_and_serving(*requests: str) -> tuple[Coverage, Coverage]:
    """What ran before the first call of serve(), and what the service consists of: order alone does not tell what ran
    again, so that part is taken by its functions.
    """
    offset = offset_of("serve")
    order = list(executed(*requests).items())
    cut = [start for start, _ in order].index(offset)
    again = {start: size for start, size in order if in_functions(start, "serve", "both", *later_of(requests))}
    return coverage(dict(order[:cut])), coverage(again)


def later_of(requests: tuple[str, ...]) -> tuple[str, ...]:
    return ("prepare",) if any(request.startswith("-") for request in requests) else ()


@cache
def offset_of(name: str) -> int:
    return code_of_file(program()).symbols.lookup(name)[0].offset


def in_functions(offset: int, *names: str) -> bool:
    function = code_of_file(program()).function_at(offset)
    return function is not None and function.start in [offset_of(name) for name in names]


def only(parts: list[StartupCode]) -> set[int]:
    return {offset for part in parts for offset in part.only}


def functions_of(parts: list[StartupCode]) -> set[str]:
    return {name for part in parts for name, _ in part.functions}


def test_what_ran_at_start_up_and_never_again_is_start_up_code() -> None:
    parts = startup_code(*as_arguments(init_and_serving("x")))
    assert {"prepare", "ready"} <= functions_of(parts)
    assert not {"serve", "both"} & functions_of(parts)
    assert offset_of("ready") in only(parts)
    assert offset_of("both") not in only(parts)
    (part,) = parts
    assert 0 < part.share < 1
    assert part.only.keys() == part.init.keys() - part.later.keys()


def as_arguments(logs: tuple[Coverage, Coverage]) -> tuple[Coverage, list[Coverage]]:
    return logs[0], [logs[1]]


def test_what_a_later_phase_reaches_again_stays() -> None:
    parts = startup_code(*as_arguments(init_and_serving("-")))
    assert "prepare" not in functions_of(parts)
    assert not any(in_functions(offset, "prepare") for offset in only(parts))


def test_every_later_phase_counts() -> None:
    init, serving = init_and_serving("x")
    rest = only(startup_code(init, [serving, coverage({offset_of("ready"): 1})]))
    assert only(startup_code(init, [serving])) - rest == {offset_of("ready")}


def test_one_byte_of_a_block_in_a_later_phase_keeps_the_whole_block() -> None:
    """Logs of other tools cut blocks elsewhere: in the midst of ours, or over several of them."""
    init, serving = init_and_serving("x")
    blocks = code_of_file(program()).blocks
    before = only(startup_code(init, [serving]))
    offset = offset_of("prepare")
    block = blocks.block_at(offset)
    assert block is not None and block.size > 1
    inside = only(startup_code(init, [serving, coverage({block.end - 1: 1})]))
    assert before - inside == {offset}
    following = blocks.block_at(block.end)
    assert following is not None
    across = only(startup_code(init, [serving, coverage({block.end - 1: 2})]))
    assert before - across == {offset, following.start} & before


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_byte_that_ran_later_is_ever_removed(data: st.DataObject) -> None:
    start, end = offset_of("_start"), offset_of("main") + 200
    ranges = st.dictionaries(st.integers(start, end), st.integers(1, 40), min_size=1, max_size=12)
    ran = executed("x")
    chosen = data.draw(st.sets(st.sampled_from(sorted(ran)), min_size=1))
    init = coverage({offset: ran[offset] for offset in chosen})
    later = data.draw(st.lists(ranges, min_size=1, max_size=3))
    try:
        parts = startup_code(init, [coverage(blocks) for blocks in later])
    except DynacutError:
        parts = []  # nothing is left
    removed = {byte for part in parts for offset, size in part.only.items() for byte in range(offset, offset + size)}
    kept = {byte for blocks in later for offset, size in blocks.items() for byte in range(offset, offset + size)}
    assert not removed & kept
    lost = {offset for offset in chosen if not set(range(offset, offset + ran[offset])) & kept}
    assert only(parts) == lost, "and all others are"


def test_a_log_of_another_program_is_not_taken_for_a_later_phase(tmp_path: Path) -> None:
    """Else everything that ran would be start-up code."""
    init, _ = init_and_serving("x")
    with pytest.raises(DynacutError, match="the later phases have no module"):
        startup_code(init, [coverage({0x1000: 5}, tmp_path / "other")])
    with pytest.raises(DynacutError, match="the later phases have no module"):
        startup_code(init, [])


def test_a_later_log_from_another_machine_is_known_by_the_name() -> None:
    init, serving = init_and_serving("x")
    moved = coverage(serving.modules[0].blocks, Path("/elsewhere/phases"))
    assert only(startup_code(init, [moved])) == only(startup_code(init, [serving]))


def test_of_several_modules_of_that_name_any_may_be_it() -> None:
    init, serving = init_and_serving("x")
    ready = CoveredModule.of("/one/phases", {offset_of("ready"): 1})
    rest = CoveredModule.of("/two/phases", serving.modules[0].blocks)
    assert offset_of("ready") not in only(startup_code(init, [Coverage((ready, rest))]))


def test_coverage_of_another_build_is_refused() -> None:
    init, serving = init_and_serving("x")
    other = Coverage((replace(serving.modules[0], build_id="0" * 40),))
    with pytest.raises(DynacutError, match="build-id"):
        startup_code(init, [other])


def test_nothing_left_is_an_error() -> None:
    init, _ = init_and_serving("x")
    with pytest.raises(DynacutError, match="ran later as well"):
        startup_code(init, [init])


def test_only_the_executable_is_taken_unless_others_are_named(tmp_path: Path) -> None:
    (library, linker, libstdcxx) = (tmp_path / name for name in ("libown.so.1", "ld-linux-x86-64.so.2", "libx.so"))
    for path in (library, linker, libstdcxx):
        shutil.copyfile(program(), path)
    init, serving = init_and_serving("x")
    paths = (program(), library, linker, Path("/gone/libgone.so"))

    def everywhere(one: Coverage) -> Coverage:
        return Coverage(tuple(coverage(one.modules[0].blocks, path).modules[0] for path in paths))

    init, later = everywhere(init), [everywhere(serving)]

    def names(*modules: str, all_modules: bool = False) -> list[str]:
        return [part.code.module.name for part in startup_code(init, later, modules, all_modules=all_modules)]

    assert names() == ["phases"]
    assert names(all_modules=True) == ["phases", "libown.so.1"], "neither the dynamic linker nor what is not here"
    assert names("libown.so.1") == ["libown.so.1"]
    assert names("libown.so.1", str(library), "phases") == ["libown.so.1", "libown.so.1", "phases"]
    with pytest.raises(DynacutError, match="no module 'nonsense'"):
        names("nonsense")


def planned(parts: list[StartupCode], on_hit: OnHit = LEARN, scope: Scope = Scope.ENTRY) -> Plan:
    return loads(dumps(startup_plan(parts, on_hit, scope)))


def test_the_plan_is_one_feature_with_sizes_and_old_bytes() -> None:
    parts = startup_code(*as_arguments(init_and_serving("x")))
    plan = planned(parts, OnHit.parse("terminate=3"), Scope.BLOCK)
    elf = code_of_file(program()).elf
    (feature,) = plan.features
    assert (feature.name, str(feature.on_hit), feature.scope) == ("startup", "terminate=3", Scope.BLOCK)
    assert plan.modules["phases"].build_id == elf.build_id
    assert plan.modules["phases"].path == str(program())
    assert {site.at for site in feature.sites} == {f"phases+{offset:#x}" for offset in only(parts)}
    for site in feature.sites:
        offset = int(site.at.partition("+")[2], 16)
        assert site.size == parts[0].only[offset]
        assert site.old == elf.read(offset, min(8, site.size))


def test_modules_of_one_name_are_told_apart_in_the_plan(tmp_path: Path) -> None:
    twin = tmp_path / "phases"
    shutil.copyfile(program(), twin)
    init, serving = init_and_serving("x")
    both = [Coverage((*one.modules, *coverage(one.modules[0].blocks, twin).modules)) for one in (init, serving)]
    parts = startup_code(both[0], both[1:], (str(program()), str(twin)))
    plan = planned(parts)
    assert {module.path for module in plan.modules.values()} == {str(program()), str(twin)}
    assert len(plan.features[0].sites) == 2 * len(parts[0].only)


@pytest.mark.parametrize("point", ["ready", "phases!ready", "offset"])
def test_an_init_point_cuts_an_ordered_log(point: str) -> None:
    site = f"phases+{offset_of('ready'):#x}" if point == "offset" else point
    order = list(executed("x"))
    before, after = split_at(coverage(executed("x")), site)
    cut = order.index(offset_of("ready"))
    assert (list(before.modules[0].blocks), list(after.modules[0].blocks)) == (order[:cut], order[cut:])
    parts = startup_code(before, [after, init_and_serving("x")[1]])
    assert offset_of("prepare") in only(parts)
    assert not {offset_of("ready"), offset_of("serve"), offset_of("both")} & only(parts)


def test_an_init_point_may_lie_amid_a_block_of_the_log() -> None:
    module = coverage({0x10: 4, 0x40: 8, 0x20: 4})
    before, after = split_at(module, "phases+0x43")
    assert (before.modules[0].blocks, after.modules[0].blocks) == ({0x10: 4}, {0x40: 8, 0x20: 4})


@pytest.mark.parametrize(
    ("site", "problem"),
    [
        ("phases+0x1", "did not run"),
        ("nonsense", "in no module"),
        ("nonsense!ready", "no module 'nonsense'"),
        ("a!b!c", "no init point"),
        ("", "no init point"),
    ],
)
def test_an_init_point_that_is_none_is_refused(site: str, problem: str) -> None:
    with pytest.raises(DynacutError, match=problem):
        split_at(coverage(executed("x")), site)


def logs(folder: Path) -> list[str]:
    init, serving = init_and_serving("x")
    write(folder / "init.drcov", init)
    write(folder / "serving.drcov", serving)
    return ["plan", "--init", str(folder / "init.drcov"), "--serving", str(folder / "serving.drcov")]


def test_the_command_writes_the_plan_and_tells_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = logs(tmp_path)
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "prepare" in shown and "nothing is written" in shown
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".drcov"] == []
    assert main([*command, "-q", "-o", str(tmp_path / "plan.toml")]) == 0
    assert capsys.readouterr().out == ""
    (feature,) = load(tmp_path / "plan.toml").features
    assert (str(feature.on_hit), feature.scope) == ("learn", Scope.ENTRY)
    assert len(feature.sites) == len(only(startup_code(*as_arguments(init_and_serving("x")))))


def test_a_plan_that_may_end_the_process_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, plan = logs(tmp_path), str(tmp_path / "plan.toml")
    warning = "the process ends when it needs one of these blocks after all"
    assert main([*command, "-o", plan, "-q"]) == 0
    assert warning not in capsys.readouterr().err
    assert main([*command, "-o", plan, "-q", "--on-hit", "terminate"]) == 0
    assert warning in capsys.readouterr().err
    nothing = tmp_path / "nothing.drcov"
    write(nothing, Coverage(()))
    assert main(["plan", "--plan", plan, "--keep", str(nothing), "-q", "--on-hit", "terminate=1"]) == 0
    assert warning in capsys.readouterr().err


def test_an_init_point_in_a_log_of_dynacut_research_with_timestamps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sorted by address, as its DynamoRIO client writes it: the timestamps tell the order."""
    rows = [
        f"[ 0] 0x{offset:016x}: {size:5} timestamp_first: {time:10} timestamp_last: {time:10}\n"
        for time, (offset, size) in enumerate(executed("x").items(), 1)
    ]
    log, plan = tmp_path / "timed.log", tmp_path / "plan.toml"
    log.write_text(
        "Module Table: version 4, count 1\nColumns: id, containing_id, start, end, entry, offset, path\n"
        f"  0,   0, 0x00400000, 0x00500000, 0x00000000, 00000000, {program()}\n\n"
        f"BB Table: Module ID, BB addess, size, execution count, timestamp \n{''.join(sorted(rows))}"
    )
    assert main(["plan", "--init", str(log), "--init-point", "ready", "-o", str(plan), "-q"]) == 0
    assert "give --serving too" in capsys.readouterr().err
    order = list(executed("x"))
    expected = {f"phases+{offset:#x}" for offset in order[: order.index(offset_of("ready"))]}
    assert {site.at for site in load(plan).features[0].sites} == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["--init", "x"],
        ["--init", "x", "--serving", "y", "--plan", "z"],
        ["--init", "x", "--serving", "y", "--try"],
        ["--init", "x", "--serving", "y", "--wanted", "z"],
        ["--init", "x", "--serving", "y", "--module", "m", "--all-modules"],
        ["--wanted", "x", "--unwanted", "y", "-o", "z", "--scope", "block"],
        ["--wanted", "x", "--unwanted", "y", "-o", "z", "--init-point", "main"],
        ["--keep", "x"],
        ["--plan", "x"],
        ["--plan", "x", "--keep", "y", "--serving", "z"],
    ],
)
def test_options_that_do_not_belong_together_are_wrong_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    assert "see dynacut plan --help" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--on-hit", "--scope"])
def test_wrong_actions_and_scopes_are_wrong_usage(option: str, tmp_path: Path) -> None:
    try:
        status = main([*logs(tmp_path), option, "nonsense"])
    except SystemExit as ending:  # argparse's own
        status = ending.code  # type: ignore[assignment]
    assert status == 2


def test_a_plan_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*logs(tmp_path), "-o", str(tmp_path / "no" / "plan.toml")]) == 1
    assert "cannot be written" in capsys.readouterr().err
