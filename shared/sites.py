"""SITE: a place in the code of a target, in all the forms it can be written."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from collections.abc import Mapping as Dictionary
from dataclasses import dataclass
from pathlib import Path

from dynacut.shared.code import Code, CodeOf
from dynacut.shared.errors import DynacutError
from dynacut.shared.plan import PlannedModule
from dynacut.shared.target import Module

SYNTAX = "module+0xOFFSET, symbol, symbol+0xOFF, module!symbol, file.c:LINE or 0xADDRESS"

ABSOLUTE = re.compile(r"0x[0-9a-fA-F]+")
_LINE = re.compile(r"(?P<file>[^!]+):(?P<line>[0-9]{1,9})")
_PLACE = re.compile(r"(?:(?P<module>[^!]+)!)?(?P<name>[^!]+?)(?:\+(?P<offset>0x[0-9a-fA-F]{1,16}|0|[1-9][0-9]{0,18}))?")
_MAX_LENGTH = 4096


_TWINS = "give the site by its address in the one that is meant: 0xADDRESS"

Ask = Callable[[str, Sequence[Module]], Sequence[int]]
"""Who knows more names: from that of a function, or FILE:LINE, and the modules to look in, to absolute addresses."""


@dataclass(frozen=True)
class Place:
    """A place found: an offset in a module."""

    code: Code
    offset: int

    @property
    def address(self) -> int:
        """The absolute address."""
        return self.code.module.base + self.offset

    def __str__(self) -> str:
        return f"{self.code.module.name}+{self.offset:#x}"


class Locator:
    """Finds SITEs in a target. modules: the plan's; a module named there is recognised by its build-id.

    ask: asked for what the files known here do not name.
    """

    def __init__(
        self, codes: CodeOf, modules: Dictionary[str, PlannedModule] | None = None, ask: Ask | None = None
    ) -> None:
        self._codes = codes
        self._modules = modules or {}
        self._ask = ask
        self._by_name: dict[str, Code] = {}

    def locate(self, site: str) -> Place:
        """Finds a SITE.

        Raises:
            DynacutError: it is not well-formed, not found (near matches are named), or ambiguous (the candidates are).
        """
        site = site.strip()
        if len(site) > _MAX_LENGTH:
            raise DynacutError(f"{site[:60]!r}… is not a site: {len(site)} characters", f"a site is {SYNTAX}")
        if ABSOLUTE.fullmatch(site):
            return self._absolute(site)
        if line := _LINE.fullmatch(site):
            return self._line(site, line["file"], int(line["line"]))
        place = _PLACE.fullmatch(site)
        if place is None:
            raise DynacutError(f"{site!r} is not a site", f"a site is {SYNTAX}")
        offset = int(place["offset"] or "0", 0)
        if place["module"] is not None:
            return self._symbol(site, place["name"], offset, self._module(site, place["module"]))
        if place["offset"] is not None and (place["name"] in self._modules or self._codes.named(place["name"])):
            return Place(self._module(site, place["name"]), offset)
        return self._symbol(site, place["name"], offset, None)

    def _absolute(self, site: str) -> Place:
        address = int(site, 16)
        code = self._codes.containing(address)
        if code is None:
            raise DynacutError(
                f"{site} lies in no module of {self._codes.target.label}",
                "-v without a change shows the modules",
            )
        return Place(code, address - code.module.base)

    def _module(self, site: str, name: str) -> Code:
        if name not in self._by_name:
            planned = self._modules.get(name)
            if planned is not None and planned.build_id:
                self._by_name[name] = self._by_build_id(name, planned)
            else:
                self._by_name[name] = self._by_file_name(site, name)
        return self._by_name[name]

    def _by_file_name(self, site: str, name: str) -> Code:
        codes = self._codes.named(name)
        if len(codes) == 1:
            return codes[0]
        if not codes:
            known = ", ".join(module.name for module in self._codes.target.modules)
            raise DynacutError(f"{site}: {self._codes.target.label} has no module {name!r}", f"it has {known}")
        paths = ", ".join(f"{code.module.path} at {code.module.base:#x}" for code in codes)
        if len({code.module.path for code in codes}) < len(codes):
            raise DynacutError(f"{site}: {name!r} is loaded more than once: {paths}", _TWINS)
        raise DynacutError(f"{site}: several modules are called {name!r}: {paths}", "use the whole file name")

    def _by_build_id(self, name: str, planned: PlannedModule) -> Code:
        # The module of that name or path first: it is nearly always the one, and each look opens a file.
        codes = sorted(self._codes, key=lambda code: name not in code.module.names and code.module.path != planned.path)
        likely = None
        for code in codes:
            try:
                build_id = code.elf.build_id
            except DynacutError:
                continue
            if build_id == planned.build_id:
                twins = [one for one in codes if one.module.path == code.module.path and one.elf.build_id == build_id]
                if len(twins) > 1:
                    places = ", ".join(f"{one.module.base:#x}" for one in twins)
                    raise DynacutError(f"module {name}: {code.module.path} is loaded more than once: {places}", _TWINS)
                return code
            if likely is None and (name in code.module.names or code.module.path == planned.path):
                likely = f"{code.module.path} there has {build_id or 'none'}"
        raise DynacutError(
            f"module {name}: build-id {planned.build_id} is not in {self._codes.target.label}"
            + (f"; {likely}" if likely else ""),
            "give the process that the plan is for, or make it anew for this version of the program",
        )

    def _symbol(self, site: str, name: str, offset: int, within: Code | None) -> Place:
        found: list[Place] = []
        for code in [within] if within else list(self._codes):
            try:
                symbols = code.symbols.lookup(name)
            except DynacutError:
                if within:
                    raise
                continue
            found += [Place(code, symbol.offset + offset) for symbol in symbols if _is_code(code, symbol.offset)]
        found = found or self._asked(name, offset, within)
        if len(found) == 1:
            return found[0]
        if found:
            raise DynacutError(f"{site}: ambiguous: {_listed(found)}", "use one of these, or module!symbol")
        near: list[str] = []
        for code in [within] if within else list(self._codes)[:1]:
            near += code.symbols.near(name)
        advice = f"near matches: {', '.join(near)}" if near else f"a site is {SYNTAX}"
        where = within.module.name if within else self._codes.target.label
        raise DynacutError(f"{site}: no function {name!r} in {where}", advice)

    def _line(self, site: str, file: str, line: int) -> Place:
        from dynacut.shared.binary.lines import file_with_lines, line_offsets, nearest_lines

        found: list[Place] = []
        near: list[int] = []
        with_lines = 0
        for code in self._codes:
            module = code.module
            try:
                elf = file_with_lines(code.elf, Path(module.path), module.root)
            except DynacutError:
                continue
            if elf is None:
                continue
            with_lines += 1
            found += [Place(code, offset) for offset in line_offsets(elf, file, line)]
            if not found:
                near += nearest_lines(elf, file, line)
        found = found or self._asked(f"{file}:{line}", 0, None)
        if len(found) == 1:
            return found[0]
        if found:
            raise DynacutError(f"{site}: ambiguous: {_listed(found)}", "use one of these")
        if not with_lines:
            raise DynacutError(
                f"{site}: no module of {self._codes.target.label} has line information",
                "install its debug symbols package, or give the site as symbol or module+0xOFFSET",
            )
        advice = f"lines with code: {', '.join(map(str, near))}" if near else "check the file's name"
        raise DynacutError(f"{site}: there is no code on that line", advice)

    def _asked(self, name: str, offset: int, within: Code | None) -> list[Place]:
        """The places that somebody else knows for a name; offset: from each of them."""
        if self._ask is None:
            return []
        modules = [within.module] if within else list(self._codes.target.modules)
        found = []
        for address in self._ask(name, modules):
            code = self._codes.containing(address)
            if code is not None and _is_code(code, address - code.module.base):
                found.append(Place(code, address - code.module.base + offset))
        return found


def _listed(places: Sequence[Place]) -> str:
    """Places to choose from, by their addresses where a module that is loaded more than once makes them look alike."""
    names = [str(place) for place in places]
    return ", ".join(names if len(set(names)) == len(names) else [f"{place.address:#x}" for place in places])


def _is_code(code: Code, offset: int) -> bool:
    segment = code.elf.segment_at(offset)
    return segment is not None and segment.executable
