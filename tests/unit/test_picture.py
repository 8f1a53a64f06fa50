"""The picture of the code: every byte of the text in its colour, and the page says nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_page import Page

from dynacut.cli.main import main
from dynacut.cli.picture import page_of, phase_and_path
from dynacut.shared.code import code_of_file
from dynacut.shared.coverage import painter as painter_module
from dynacut.shared.coverage.coverage import UNKNOWN_PATH, Coverage, CoveredModule
from dynacut.shared.coverage.drcov import write
from dynacut.shared.coverage.painter import PHASE_LIMIT, Phase, picture_of
from dynacut.shared.coverage.picture import CODE, DrawnModule, Picture, phase_bit
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.target import PAGE_SIZE

Capture = pytest.CaptureFixture[str]
HOSTILE = "/no/<script>alert(1)</script>&\"'\x1b[31m\u202e.so"
SOURCE = """
#include <stdio.h>
int wanted(int n) { int sum = 0; for (int i = 0; i < n; i++) sum += i % 3 ? i : 2 * i; return sum; }
int unwanted(int n) { switch (n) { case 1: return puts("1"); case 2: return puts("2"); default: return -1; } }
int main(int argc, char **argv) { (void)argv; return argc > 1 ? unwanted(argc) : wanted(argc); }
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    (tmp_path / "program.c").write_text(SOURCE)
    subprocess.run(["gcc", "-O1", tmp_path / "program.c", "-o", tmp_path / "program"], check=True)
    return tmp_path / "program"


def phase(name: str, path: Path | str, blocks: Mapping[int, int]) -> Phase:
    return Phase(name, Coverage((CoveredModule.of(str(path), blocks),)))


def blocks_of(program: Path, function: str) -> dict[int, int]:
    code = code_of_file(program)
    (symbol,) = code.symbols.lookup(function)
    return {block.start: block.size for block in code.blocks.blocks_in(symbol.offset, symbol.offset + symbol.size)}


def two_phases(program: Path) -> Picture:
    main_blocks = blocks_of(program, "main")
    return picture_of(
        [
            phase("wanted", program, main_blocks | blocks_of(program, "wanted")),
            phase("unwanted", program, main_blocks | blocks_of(program, "unwanted")),
        ]
    )


def check_sound(picture: Picture, module: DrawnModule) -> None:
    """The runs are the whole text without overlap, and every sum is the same from runs, pages, cells and kinds."""
    assert all(one.end <= other.start for one, other in pairwise(module.runs))
    assert all(one.end < other.start or one.mask != other.mask for one, other in pairwise(module.runs))
    text = sum(run.end - run.start for run in module.runs)
    assert text == PAGE_SIZE * len(module.pages)
    assert all(sum(page.bytes_by_mask.values()) == PAGE_SIZE for page in module.pages)
    for number in (1, 7, 10_000):
        cells = module.cells(number)
        assert len(cells) == min(number, len(module.pages))
        assert sum(cell.total() for cell in cells) == text
    shares = [picture.share(module, kind) for kind in range(len(picture.kinds))]
    assert sum(share.size_bytes for share in shares) == text
    assert sum(share.blocks for share in shares) == len(module.blocks)


def test_each_function_of_a_program_has_the_colour_of_its_phase(program: Path) -> None:
    picture = two_phases(program)
    assert picture.phases == ("wanted", "unwanted")
    assert picture.warnings == ()
    (module,) = picture.modules
    check_sound(picture, module)
    names = {function.name: function for function in module.functions}
    kinds = {"wanted": 0, "unwanted": 1, "main": picture.several, "_start": picture.never}
    for name, kind in kinds.items():
        function = names[name]
        inside = [run for run in module.runs if run.start < function.end and run.end > function.start]
        assert {picture.kind_of(run.mask) for run in inside} == {kind}, name
    for index, name in enumerate(("wanted", "unwanted")):
        blocks = blocks_of(program, name)
        assert picture.share(module, index)[:2] == (len(blocks), sum(blocks.values()))
        ((function, size),) = picture.functions_only_in(module, index)
        assert (function.name, size) == (name, sum(blocks.values()))
        everything = blocks | blocks_of(program, "main")
        assert module.executed_in(index)[:2] == (len(everything), sum(everything.values()))
    code = code_of_file(program)
    assert set(module.blocks) == set(code.blocks.block_starts)
    assert sum(run.end - run.start for run in module.runs if run.mask & CODE) == sum(code.blocks.block_sizes)
    assert 0 <= picture.idle_pages(module) < len(module.pages)


def test_blocks_of_other_tools_are_drawn_as_ours(program: Path) -> None:
    """A log may begin a block amid one of ours, or cover several by one."""
    blocks = blocks_of(program, "wanted")
    start, end = min(blocks), max(offset + size for offset, size in blocks.items())
    (module,) = picture_of([phase("wanted", program, {start: end - start})]).modules
    assert module.executed_in(0)[:2] == (len(blocks), sum(blocks.values()))


layers = st.dictionaries(st.integers(0, 5 * PAGE_SIZE), st.integers(1, 300), max_size=15)


@settings(deadline=None)
@given(st.lists(layers, min_size=1, max_size=4).filter(any))
def test_a_log_alone_is_drawn_byte_by_byte(logs: list[dict[int, int]]) -> None:
    picture = picture_of([phase(str(index), "/no/such/file", blocks) for index, blocks in enumerate(logs)])
    (module,) = picture.modules
    assert module.from_log_alone
    check_sound(picture, module)
    expected = [{byte for start, size in blocks.items() for byte in range(start, start + size)} for blocks in logs]
    for index, covered in enumerate(expected):
        runs = [run for run in module.runs if run.mask & phase_bit(index)]
        assert {byte for run in runs for byte in range(run.start, run.end)} == covered
        share = module.executed_in(index)
        assert share.size_bytes == len(covered)
        assert share.pages == len({byte // PAGE_SIZE for byte in covered})
    pages = {byte // PAGE_SIZE * PAGE_SIZE for covered in expected for byte in covered}
    assert {page.start for page in module.pages} == pages
    assert picture.idle_pages(module) == 0


def test_what_a_kind_is() -> None:
    picture = Picture(("start", "serving", "error"), (), ())
    kinds = ["no known code", "never executed", "only start", "only serving", "several phases", "only error"]
    assert [picture.kinds[picture.kind_of(mask)] for mask in (0, 1, 3, 5, 7, 9)] == kinds
    assert picture.phases_of(1 | phase_bit(0) | phase_bit(2)) == (0, 2)
    assert Picture(("start",), (), ()).kinds[0] == "start"


def test_logs_of_one_phase_are_one_phase(program: Path) -> None:
    parts = [phase("all", program, {start: size}) for start, size in blocks_of(program, "wanted").items()]
    picture = picture_of(parts)
    assert picture.phases == ("all",)
    assert picture.modules[0].executed_in(0).blocks == len(parts) > 1


def test_a_file_that_is_missing_is_said_and_the_log_is_drawn() -> None:
    picture = picture_of([phase("x", "/no/such/file", {0x1000: 5}), phase("y", "[vdso]", {0x600: 7})])
    assert [module.from_log_alone for module in picture.modules] == [True, True]
    first, second = picture.warnings
    assert first.startswith("/no/such/file cannot be read") and first.endswith("drawn from the log alone")
    assert second == "[vdso] has no file; it is drawn from the log alone"


def test_another_build_of_the_file_is_not_taken_for_the_one_that_ran(program: Path) -> None:
    blocks = {start + 1: size for start, size in blocks_of(program, "unwanted").items()}
    picture = picture_of([phase("x", program, blocks)])
    assert picture.modules[0].from_log_alone
    assert "seems not to be the file that ran" in picture.warnings[0]


def test_a_file_that_is_no_program_is_said(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    picture = picture_of([phase("x", tmp_path / "text", {0: 1})])
    assert picture.modules[0].from_log_alone
    assert "is not an ELF file" in picture.warnings[0]


def test_code_outside_of_blocks_is_counted(program: Path) -> None:
    stub = next(section for section in code_of_file(program).elf.sections if section.name == ".plt")
    picture = picture_of([phase("x", program, {stub.address: 16} | blocks_of(program, "main"))])
    assert not picture.modules[0].from_log_alone
    assert "16 executed bytes lie in no known block" in picture.warnings[0]


def test_unnamed_memory_is_left_out_and_said(program: Path) -> None:
    unnamed = CoveredModule.of(UNKNOWN_PATH, {0: 10})
    known = CoveredModule.of(str(program), blocks_of(program, "main"))
    picture = picture_of([Phase("x", Coverage((unnamed, known)))])
    assert [module.path for module in picture.modules] == [str(program)]
    assert picture.warnings == ("10 bytes of code in unnamed memory are left out",)


def test_modules_are_chosen_by_name() -> None:
    coverage = Coverage((CoveredModule.of("/no/a", {0: 1}), CoveredModule.of("/no/b", {0: 1})))
    assert [module.name for module in picture_of([Phase("x", coverage)], ["b"]).modules] == ["b"]
    with pytest.raises(DynacutError, match="no module 'c'"):
        picture_of([Phase("x", coverage)], ["c"])


def test_more_phases_than_colours_are_refused() -> None:
    phases = [phase(str(index), "/no/a", {0: 1}) for index in range(PHASE_LIMIT + 1)]
    with pytest.raises(DynacutError) as caught:
        picture_of(phases)
    assert caught.value.status is ExitStatus.USAGE
    assert len(picture_of(phases[1:]).phases) == PHASE_LIMIT


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(DynacutError, match="no code to draw"):
        picture_of([phase("x", "/no/a", {})])


@pytest.mark.parametrize("blocks", [{0: 5 * PAGE_SIZE}, {index * PAGE_SIZE: 1 for index in range(5)}])
def test_too_many_pages_are_refused(blocks: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(painter_module, "PAGE_LIMIT", 4)
    with pytest.raises(DynacutError, match="more than 4 pages"):
        picture_of([phase("x", "/no/a", blocks)])


# The page.


def test_the_page_says_what_the_picture_says(program: Path) -> None:
    picture = two_phases(program)
    (module,) = picture.modules
    page = Page(page_of(picture))
    (drawn,) = page.modules
    assert [(run.start, run.end) for run in drawn.runs] == [(run.start, run.end) for run in module.runs]
    assert [run.kind for run in drawn.runs] == [picture.kinds[picture.kind_of(run.mask)] for run in module.runs]
    assert drawn.functions == {name: (start, end) for start, end, name in module.functions}
    for index, name in enumerate(picture.phases):
        assert drawn.rows[name] == [*module.executed_in(index), *picture.share(module, index)[:2]]
        assert drawn.covered(name) == module.executed_in(index).size_bytes
    never = picture.share(module, picture.never)
    assert drawn.rows["never executed"] == [never.blocks, never.size_bytes, picture.idle_pages(module)]
    legend = [text for tag, text in page.texts if tag == "button"]
    assert legend == list(picture.kinds)
    assert [text for tag, text in page.texts if tag == "summary"] == [
        "1 function with code that only wanted executed",
        "1 function with code that only unwanted executed",
    ]


def test_a_summary_stands_above_the_pictures_with_its_commands_as_code(program: Path) -> None:
    page = Page(page_of(two_phases(program), summary=["All is well.", "Ask `dynacut live <b>` for it."]))
    assert {"class": "summary"} in [attributes for tag, attributes in page.elements if tag == "p"]
    assert ("code", "dynacut live <b>") in page.texts
    assert not [tag for tag, _ in page.elements if tag == "b"]


def test_names_from_a_log_can_do_nothing_on_the_page() -> None:
    text = page_of(picture_of([phase("<b>&x", HOSTILE, {0x1000: 5})]))
    page = Page(text)
    assert "\x1b" not in text and "\u202e" not in text
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    assert not [tag for tag, _ in page.elements if tag in ("b", "img", "iframe", "object", "link", "base")]
    assert page.modules[0].name == "script>&\"'\\x1b[31m\\u202e.so"
    (heading,) = (content for tag, content in page.texts if tag == "h2")
    assert heading == page.modules[0].name
    assert page.data["phases"] == ["<b>&x"]


def test_the_page_loads_nothing_and_runs_its_own_script_only(program: Path) -> None:
    text = page_of(two_phases(program))
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    names = {name for _, attributes in page.elements for name in attributes}
    assert not names & {"src", "href", "srcset", "action"} and not {name for name in names if name.startswith("on")}
    (policy,) = (
        attributes["content"]
        for tag, attributes in page.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    )
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None and policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}';" in policy


# The command.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis.wanted.drcov", ("wanted", "redis.wanted.drcov")),
        ("/var/log/a.b/wanted.drcov", ("wanted", "/var/log/a.b/wanted.drcov")),
        ("drcov.redis.00001.0000.proc.log", ("drcov.redis.00001.0000.proc.log",) * 2),
        ("init=x/y.drcov", ("init", "x/y.drcov")),
        ("init=a=b.drcov", ("init", "a=b.drcov")),
        ("./init=x.drcov", ("init=x", "./init=x.drcov")),
        ("=x.drcov", ("=x", "=x.drcov")),
    ],
)
def test_the_name_of_a_phase(text: str, expected: tuple[str, str]) -> None:
    assert phase_and_path(text) == (expected[0], Path(expected[1]))


def test_strips_are_plain_where_nobody_looks(program: Path, tmp_path: Path, capsys: Capture) -> None:
    logs = []
    for found, name in zip(("wanted", "unwanted"), ("a", "b"), strict=True):
        log = tmp_path / f"program.{name}.drcov"
        write(log, phase(name, program, blocks_of(program, found)).coverage)
        logs.append(str(log))
    html = tmp_path / "page.html"
    assert main(["trace", "--show", *logs, "--html", str(html)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "\x1b" not in printed.out
    strips = dict(re.findall(r"^  (.+?) +\|(.*)\|$", printed.out, re.MULTILINE))
    assert list(strips) == ["only a", "only b", "never executed"]
    assert all(strip.strip() for strip in strips.values())
    picture = picture_of([phase("a", program, blocks_of(program, "wanted"))])
    assert {len(strip) for strip in strips.values()} == {len(picture.modules[0].pages)}
    blocks = blocks_of(program, "wanted")
    row = next(line.split("\t") for line in printed.out.splitlines() if line.startswith("program\ta\t"))
    assert row[2:] == [*map(str, (len(blocks), sum(blocks.values()), 1, len(blocks), sum(blocks.values())))]
    assert main(["trace", "--show", *logs, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["phases"] == ["a", "b"] and document["html"] is None
    (module,) = document["modules"]
    assert module["phases"][0]["only_here"] == {"blocks": len(blocks), "bytes": sum(blocks.values()), "pages": 1}
    assert Page(html.read_text()).modules[0].rows["a"] == [int(number) for number in row[2:]]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--html", "x.html"], 2, "give one of"),
        (["--html", "x.html", "--merge", "a", "-o", "b"], 2, "--html needs --show"),
        (["--show", "a", "-o", "b"], 2, "--show writes no log"),
        (["--show", "a", "--pid", "1"], 2, "give one of"),
        (["--show", "/no/such/log"], 1, "/no/such/log cannot be read"),
        (["--show", "/dev/null"], 1, "is not a regular file"),
    ],
)
def test_what_show_refuses(arguments: list[str], status: int, words: str, capsys: Capture) -> None:
    assert main(["trace", *arguments]) == status
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_a_page_that_cannot_be_written_is_said(tmp_path: Path, capsys: Capture) -> None:
    write(tmp_path / "x.drcov", phase("x", "/no/a", {0: 1}).coverage)
    assert main(["trace", "--show", str(tmp_path / "x.drcov"), "--html", "/no/such/folder/x.html"]) == 1
    assert "/no/such/folder/x.html cannot be written: No such file or directory" in capsys.readouterr().err
