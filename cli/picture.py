"""dynacut trace --show: the picture of the code as strips on a terminal, as one HTML page, as JSON."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dynacut.cli.console import SCHEMA, print_json, print_table, warn
from dynacut.cli.pages import FILES, environment, write_text
from dynacut.cli.quantities import counted
from dynacut.cli.steps import Steps
from dynacut.shared.errors import ExitStatus, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dynacut.shared.coverage.painter import Phase
    from dynacut.shared.coverage.picture import DrawnModule, Picture, Share

_SUFFIX = ".drcov"
_WIDTH = 100  # of strips that go to a file or a pipe
# In the order of the phases, then for several and never; names, so that the terminal's own palette applies.
_PHASE_COLOURS = ("yellow", "blue", "red", "magenta", "green", "cyan")
_OTHER_COLOURS = ("default", "bright_black")
_LISTED_FUNCTIONS = 100  # of a phase, on the page
_LEVELS = (0.05, 0.20, 0.40, 0.70)
_MARKS, _ASCII_MARKS = " ·░▒▓█", " .:+*#"


class _Row(NamedTuple):
    """A line of the table: what of a module's text, and how much of that ran in no other phase."""

    label: str
    kind: int
    share: Share
    only: Share | None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    group = parser.add_argument_group("a picture of the code, by phase")
    group.add_argument(
        "--show",
        nargs="+",
        metavar="[NAME=]F",
        help="draw these logs, each a phase (default name: `wanted` for redis.wanted.drcov)",
    )
    group.add_argument("--html", type=Path, metavar="FILE", help="write the picture as one page for a browser")


def run(arguments: argparse.Namespace) -> ExitStatus:
    """Draws the logs of --show.

    Raises:
        DynacutError: a log cannot be read or drawn, or the page cannot be written.
    """
    from dynacut.shared.coverage.painter import picture_of

    with Steps(shown=not arguments.quiet) as steps:
        steps.tell("finding blocks")
        picture = picture_of([_phase(text) for text in arguments.show], arguments.module)
    for line in picture.warnings:
        warn(line)
    if arguments.html:
        write_text(arguments.html, page_of(picture))
    if arguments.json:
        print_json(_document(picture, arguments.html))
    elif not arguments.quiet:
        _print_strips(picture)
        _print_numbers(picture)
        if arguments.html:
            print(f"→ {printable(str(arguments.html))}")
    return ExitStatus.DONE


def phase_and_path(text: str) -> tuple[str, Path]:
    """Split what --show is given: the phase's name, said or taken from the file's name, and the file."""
    name, equals, path = text.partition("=")
    if equals and name and "/" not in name:
        return name, Path(path)
    stem = Path(text).name
    if stem.endswith(_SUFFIX):
        stem = stem.removesuffix(_SUFFIX).rpartition(".")[2]
    return stem or text, Path(text)


def _phase(text: str) -> Phase:
    from dynacut.shared.coverage.drcov import read_log
    from dynacut.shared.coverage.painter import Phase

    name, path = phase_and_path(text)
    log = read_log(path)
    for line in log.warnings:
        warn(f"{path}: {line}")
    return Phase(printable(name), log.coverage)


def _rows(picture: Picture, module: DrawnModule) -> list[_Row]:
    rows = [
        _Row(name, index, module.executed_in(index), picture.share(module, index))
        for index, name in enumerate(picture.phases)
    ]
    kinds = (picture.several, picture.never) if len(picture.phases) > 1 else (picture.never,)
    for kind in kinds:
        share = picture.share(module, kind)
        if kind == picture.never:
            share = share._replace(pages=picture.idle_pages(module))
        rows.append(_Row(picture.kinds[kind], kind, share, None))
    return rows


# On the terminal.


def _print_strips(picture: Picture) -> None:
    is_terminal = sys.stdout.isatty()
    label = min(24, max(map(len, picture.kinds)))
    width = shutil.get_terminal_size().columns if is_terminal else _WIDTH
    width = max(10, width - label - 5)
    marks = _marks()
    for module in picture.modules:
        cells = module.cells(width)
        print(f"{printable(module.path)}: {_extent(picture, module)}")
        for kind in sorted({picture.kind_of(run.mask) for run in module.runs} - {picture.no_code}):
            # One line for each kind: what few blocks do is what one looks for, and must not be lost in a majority.
            strip = "".join(
                marks[_level(sum(size for mask, size in cell.items() if picture.kind_of(mask) == kind), cell.total())]
                for cell in cells
            )
            name = picture.kinds[kind]
            name = name if len(name) <= label else name[: label - 1] + "…"
            _print_line(f"  {name:{label}} ", f"|{strip}|" if not is_terminal else strip, _colour(picture, kind))
        print()
    shares = ", ".join(f"{mark} <{level:.0%}" for mark, level in zip(marks[1:], _LEVELS, strict=False))
    print("Each column is a page or some; its mark says how much of its bytes are of that kind:")
    print(f"{shares}, {marks[-1]} more")


def _print_line(label: str, strip: str, colour: str) -> None:
    if not sys.stdout.isatty():
        print(label + strip)
        return
    from rich.console import Console
    from rich.text import Text

    Console().print(Text(label) + Text(strip, style=colour), no_wrap=True, crop=False, highlight=False)


def _colour(picture: Picture, kind: int) -> str:
    return _PHASE_COLOURS[kind] if kind < len(picture.phases) else _OTHER_COLOURS[kind - len(picture.phases)]


def _marks() -> str:
    try:
        _MARKS.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return _ASCII_MARKS
    return _MARKS


def _level(size: int, total: int) -> int:
    """Return the index of a mark: 0 for nothing, 1 for less than the first level, and so on."""
    return 1 + sum(size >= level * total for level in _LEVELS) if size else 0


def _extent(picture: Picture, module: DrawnModule) -> str:
    known = "drawn from the log alone" if module.from_log_alone else f"{len(module.blocks):,} blocks"
    pages = counted(len(module.pages), "page")
    return f"{pages} of text, {picture.idle_pages(module):,} without any executed block; {known}"


def _print_numbers(picture: Picture) -> None:
    columns = ["module", "phase", "blocks", "bytes", "pages", "only here: blocks", "bytes"]
    rows = [
        [module.name, row.label, *_numbers(row.share), *(_numbers(row.only)[:2] if row.only else ("", ""))]
        for module in picture.modules
        for row in _rows(picture, module)
    ]
    print_table("code by phase", columns, rows, right=frozenset(range(2, 7)))


def _numbers(share: Share) -> list[str]:
    return [f"{number:,}" if sys.stdout.isatty() else str(number) for number in share]


# As JSON.


def _document(picture: Picture, html: Path | None) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "html": None if html is None else str(html),
        "phases": list(picture.phases),
        "modules": [_module_document(picture, module) for module in picture.modules],
        "warnings": list(picture.warnings),
    }


def _module_document(picture: Picture, module: DrawnModule) -> dict[str, Any]:
    phases = []
    for index, name in enumerate(picture.phases):
        share, only = module.executed_in(index), picture.share(module, index)
        phases.append({"phase": name, **_of(share), "only_here": _of(only)})
    return {
        "name": module.name,
        "path": module.path,
        "build_id": module.build_id,
        "from_log_alone": module.from_log_alone,
        "blocks": len(module.blocks),
        "pages": len(module.pages),
        "idle_pages": picture.idle_pages(module),
        "phases": phases,
        "several_phases": _of(picture.share(module, picture.several)),
        "never_executed": _of(picture.share(module, picture.never)),
    }


def _of(share: Share) -> dict[str, int]:
    return {"blocks": share.blocks, "bytes": share.size_bytes, "pages": share.pages}


# As a page for a browser.


def page_of(
    picture: Picture,
    tables: Sequence[Mapping[str, Any]] = (),
    *,
    title: str = "Code by phase",
    summary: Sequence[str] = (),
) -> str:
    """Return the page: one document that loads nothing and runs no script but its own.

    tables: columns and rows of those to stand above the pictures. title: what the page is headed. summary: paragraphs
    below that; what is between two backticks is code.
    """
    import base64
    import hashlib

    from markupsafe import Markup

    templates = environment()
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    script = (FILES / "picture.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    colours = [*(f"phase-{index}" for index in range(len(picture.phases))), "several", "never", "no-code"]
    return templates.get_template("picture.html.j2").render(
        title=printable(title),
        summary=[printable(line) for line in summary],
        script=Markup(script),
        digest=digest,
        style=Markup((FILES / "picture.css").read_text("utf-8")),
        legend=[
            (kind, name, colours[kind])
            for kind, name in enumerate(picture.kinds)
            if kind != picture.several or len(picture.phases) > 1
        ],
        modules=[
            {
                "name": printable(module.name),
                "path": printable(module.path),
                "build_id": module.build_id,
                "extent": _extent(picture, module),
                "rows": [(row, colours[row.kind]) for row in _rows(picture, module)],
                "functions": list(_functions(picture, module, colours)),
            }
            for module in picture.modules
        ],
        tables=[(table["columns"], [[printable(cell) for cell in row] for row in table["rows"]]) for table in tables],
        warnings=[printable(line) for line in picture.warnings],
        data=_data(picture, colours),
    )


def _functions(
    picture: Picture, module: DrawnModule, colours: list[str]
) -> Iterator[tuple[str, str, int, list[tuple[str, int, int]]]]:
    """For each phase with code of its own: name, colour, how many functions that is in, and the first of them."""
    if len(picture.phases) < 2:
        return
    for index, phase in enumerate(picture.phases):
        found = picture.functions_only_in(module, index)
        if found:
            shown = [(printable(one.name), size, one.end - one.start) for one, size in found[:_LISTED_FUNCTIONS]]
            yield printable(phase), colours[index], len(found), shown


def _data(picture: Picture, colours: list[str]) -> dict[str, Any]:
    """What the script draws: numbers run after run, because the text of a module has many.

    texts: for each stretch of pages its start, then size and index of the state of one run after the other.
    functions: distance from the end of the one before, size, and name.
    """
    masks = sorted({run.mask for module in picture.modules for run in module.runs})
    index = {mask: number for number, mask in enumerate(masks)}
    modules = []
    for module in picture.modules:
        texts: list[list[int]] = []
        end = -1
        for run in module.runs:
            if run.start != end:
                texts.append([run.start])
            texts[-1] += (run.end - run.start, index[run.mask])
            end = run.end
        functions: list[int | str] = []
        end = 0
        for start, stop, name in module.functions:
            functions += (start - end, stop - start, printable(name))
            end = stop
        modules.append({"name": printable(module.name), "texts": texts, "functions": functions})
    states = [[picture.kind_of(mask), *picture.phases_of(mask)] for mask in masks]
    return {
        "phases": picture.phases,
        "kinds": picture.kinds,
        "colours": colours,
        "states": states,
        "modules": modules,
    }
