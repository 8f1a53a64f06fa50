"""Reads the page of `dynacut trace --show --html` as a browser would: its elements, its table, its runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any, NamedTuple


class Run(NamedTuple):
    """Bytes of one kind, as module offsets, with the names of the phases that executed them."""

    start: int
    end: int
    kind: str
    phases: frozenset[str]


@dataclass
class Module:
    """One module of the page."""

    name: str
    runs: list[Run]
    functions: dict[str, tuple[int, int]]
    rows: dict[str, list[int]] = field(default_factory=dict)
    """The table: the numbers behind each label."""

    def run_at(self, offset: int) -> Run:
        (run,) = (run for run in self.runs if run.start <= offset < run.end)
        return run

    def covered(self, phase: str) -> int:
        return sum(run.end - run.start for run in self.runs if phase in run.phases)


class Page(HTMLParser):
    """The whole page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.modules = [_module(found, self.data) for found in self.data["modules"]]
        number = -1
        label = ""
        for tag, content in self.texts:
            if tag == "h2":
                number += 1
            elif tag == "th" and number >= 0:
                label = content
            elif tag == "td":
                self.modules[number].rows.setdefault(label, []).append(int(content.replace(",", "")))

    @property
    def data(self) -> dict[str, Any]:
        """What the script draws."""
        (text,) = (text for tag, text in self.texts if tag == "script#data")
        found = json.loads(text)
        assert isinstance(found, dict)
        return found

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self._open.append("script#data" if ("id", "data") in attrs else tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().partition("#")[0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self._open[-1], data.strip()))


def _module(found: dict[str, Any], data: dict[str, Any]) -> Module:
    runs = []
    for start, *numbers in found["texts"]:
        assert start % 4096 == 0, "the script counts pages from here"
        offset = start
        for size, state in zip(numbers[::2], numbers[1::2], strict=True):
            kind, *phases = data["states"][state]
            names = frozenset(data["phases"][phase] for phase in phases)
            runs.append(Run(offset, offset + size, data["kinds"][kind], names))
            offset += size
    functions = {}
    end = 0
    flat = found["functions"]
    for gap, size, name in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
        functions[name] = (end + gap, end + gap + size)
        end += gap + size
    return Module(found["name"], runs, functions)
