"""The documentation says what is there: every option, and command lines that the command takes."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from dynacut.cli.main import COMMANDS, command_parser
from dynacut.shared.errors import DynacutError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_COMMON = {"--help", "--verbose", "--quiet", "--json"}
"""Said once for all commands, under Exit status."""


def subcommands() -> dict[str, argparse.ArgumentParser]:
    for action in command_parser(list(COMMANDS))._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("no subcommands")


def chapter(command: str) -> str:
    """What the reference says of one command."""
    text = (ROOT / "docs/reference.md").read_text("utf-8")
    _, start, rest = text.partition(f"\n## dynacut {command}\n")
    assert start, f"the reference has no chapter on {command}"
    return rest.partition("\n## ")[0]


@pytest.mark.parametrize("command", subcommands())
def test_the_reference_has_every_option(command: str) -> None:
    text = chapter(command)
    for action in subcommands()[command]._actions:
        long = [name for name in action.option_strings if name.startswith("--")]
        if long and long[0] not in _COMMON and action.help != argparse.SUPPRESS:
            said = any(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) for name in action.option_strings)
            assert said, f"{command} {long[0]} is not in docs/reference.md"


@pytest.mark.parametrize("command", subcommands())
def test_the_reference_has_no_option_that_is_not_there(command: str) -> None:
    known = {name for action in subcommands()[command]._actions for name in action.option_strings}
    # In the first column of tables stand the command's own options; elsewhere also those of CRIU and others.
    for line in chapter(command).splitlines():
        cell = line.split(" | ")[0] if line.startswith("| `-") else ""
        for name in re.findall(r"`(--?[a-z][a-z-]*)", cell):
            assert name in known or re.fullmatch("-v+", name), f"{command} has no {name}"


@pytest.mark.parametrize("command", subcommands())
def test_the_synopsis_is_that_of_help(command: str) -> None:
    for way in import_module(f"dynacut.cli.{COMMANDS[command]}").USAGE:
        assert _without_indentation(way) in _without_indentation(chapter(command))


def _without_indentation(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def command_lines() -> Iterator[tuple[str, str]]:
    """Command lines of the pages and of --help that stand there complete, with their page."""
    texts = [(page.name, page.read_text("utf-8")) for page in PAGES]
    texts += [(f"{name} --help", parser.epilog or "") for name, parser in subcommands().items()]
    for name, text in texts:
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            found = re.fullmatch(r"(?:    |  |# |)(dynacut \w+ .*?)(?:\s+(?:#|ends with|in another).*)?", line)
            if found and not re.search(r"…|\||\bWHAT\b|\[-|\(-|^dynacut \w+ (?!-|/|\w*[/-])", found[1]):
                yield name, found[1]


LINES = list(command_lines())


def test_there_are_examples_in_the_pages_and_in_help() -> None:
    assert len({page for page, _ in LINES}) >= 8
    assert len(LINES) >= 30


@pytest.mark.parametrize(("page", "line"), LINES)
def test_an_example_is_a_command_line(page: str, line: str) -> None:
    parser = command_parser(list(COMMANDS))
    line = re.sub(r"\$\([^)]*\)|\bP\b", "4711", line).replace("PORT", "6379").replace("HOST", "localhost")
    try:
        parser.parse_args(shlex.split(line)[1:])
    except SystemExit as exit_:
        assert exit_.code == 0, f"{page}: {line}"
    except DynacutError as error:
        pytest.fail(f"{page}: {line}: {error.problem}")


def map_of_the_source() -> set[Path]:
    """The files and folders that CONTRIBUTING names in its map, each name in the folder that was named last."""
    found = set()
    rows = [line.rpartition(" | ")[2] for line in (ROOT / "CONTRIBUTING.md").read_text("utf-8").splitlines()]
    for row in rows:
        folder = ROOT
        for name in re.findall(r"`([\w/]+(?:/|\.(?:py|c|h)))`", row) if row.endswith(" |") else ():
            named = ROOT / name if (ROOT / name).exists() and "/" in name.rstrip("/") else folder / name
            assert named.exists(), f"the map names {name}, which is not in {folder.relative_to(ROOT)}"
            folder = named.parent if named.is_file() and "/" in name else folder
            found.add(named)
    return found


def test_the_map_of_the_source_leads_to_every_file() -> None:
    named = map_of_the_source()
    layers = ("cli", "jobs", "live", "offline", "shared", "handlers")
    files = {path for layer in layers for path in (ROOT / layer).rglob("*.py") if path.name != "__init__.py"}
    missing = {path for path in files - named if not named.intersection(path.parents)}
    assert sorted(str(path.relative_to(ROOT)) for path in missing) == []
