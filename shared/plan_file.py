"""Plan files: TOML, read with every problem named, and written as a whole or not at all."""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynacut.shared.errors import DynacutError, printable, shortened
from dynacut.shared.on_hit import OnHit
from dynacut.shared.plan import (
    EDITS,
    MAX_ADDED_CODE,
    MAX_ADDED_SIZE,
    MAX_REMOVED_SIZE,
    MAX_SITE_SIZE,
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
    quoted,
)
from dynacut.shared.target import PAGE_SIZE
from dynacut.shared.whole_file import write_whole

FORMAT = 1
MAX_PLAN_SIZE = 64 << 20


def load(path: Path) -> Plan:
    """Reads a plan file.

    Raises:
        DynacutError: it cannot be read, is no TOML, or no plan; every problem is named.
    """
    try:
        # O_NONBLOCK: opening a FIFO that nobody writes to would wait for ever.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            is_regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            data = file.read(MAX_PLAN_SIZE + 1) if is_regular else b""
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DynacutError(f"the plan {path} cannot be read: {reason}", "check the file's name") from None
    if not is_regular:
        raise DynacutError(f"the plan {path} is not a regular file", "write it to a file first")
    if len(data) > MAX_PLAN_SIZE:
        raise DynacutError(f"the plan {path} is larger than {MAX_PLAN_SIZE >> 20} MiB", "split it into several")
    try:
        return loads(data.decode())
    except UnicodeDecodeError:
        raise DynacutError(
            f"the plan {path} is not UTF-8 text", "plans are TOML files, see docs/reference.md"
        ) from None
    except DynacutError as error:
        raise DynacutError(
            f"{path}: {error.problem}", error.advice, status=error.status, details=error.details
        ) from None


def loads(text: str) -> Plan:
    """Reads a plan from TOML text; raises like load()."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise DynacutError(f"not TOML: {shortened(str(error))}", "plans are described in docs/reference.md") from None
    reader = _Reader()
    plan = reader.plan(document)
    if reader.problems:
        raise DynacutError("not a plan", "plans are described in docs/reference.md", details=reader.problems)
    return plan


def dumps(plan: Plan) -> str:
    """The plan as TOML text that loads() reads back."""
    import tomli_w

    document: dict[str, Any] = {"format": FORMAT, "name": plan.name}
    if plan.modules:
        document["module"] = {
            name: {"path": module.path} | ({"build_id": module.build_id} if module.build_id else {})
            for name, module in plan.modules.items()
        }
    if plan.features:
        document["feature"] = [
            {
                "name": part.name,
                "on_hit": str(part.on_hit),
                "scope": str(part.scope),
                "sites": [_site_table(site) for site in part.sites],
            }
            for part in plan.features
        ]
    edits = [
        *({"at": edit.at, "old": edit.old.hex(" "), "new": edit.new.hex(" ")} for edit in plan.edits),
        *(_memory_table(part) for part in plan.added),
        *({"at": part.at, "unmap": part.size} for part in plan.removed),
    ]
    if edits:
        names = plan.features_of_edits
        document["edit"] = [table | {"feature": name} for table, name in zip(edits, names, strict=True)]
    return tomli_w.dumps(document)


def write(path: Path, plan: Plan, comments: Sequence[str]) -> None:
    """Writes a plan file, the comments before it, as a whole or not at all.

    Raises:
        DynacutError: it cannot be written.
    """
    text = "".join(f"# {printable(comment)}\n" for comment in comments) + dumps(plan)
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise DynacutError(f"{path} cannot be written: {error.strerror}", "check the folder and its space") from None


def _site_table(site: PlannedSite) -> dict[str, Any]:
    table: dict[str, Any] = {"at": site.at}
    if site.size is not None:
        table["size"] = site.size
    if site.old:
        table["old"] = site.old.hex(" ")
    return table


def _memory_table(part: PlannedMemory) -> dict[str, Any]:
    table = {"at": part.at, "map": part.size, "protection": part.protection}
    return table | ({"contents": part.contents.hex(" ")} if part.contents else {})


class _Reader:
    """Reads a document piece by piece and gathers everything that is wrong with it."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def plan(self, document: dict[str, Any]) -> Plan:
        self._known("the plan", document, {"format", "name", "module", "feature", "edit"})
        if document.get("format") != FORMAT or document["format"] is True:
            self.problems.append(f"format is {quoted(document.get('format'))}; this program reads format {FORMAT}")
        modules = {}
        for name, table in self._table("module", document).items():
            if isinstance(table, dict):
                where = f"module.{shortened(name)}"
                self._known(where, table, {"path", "build_id"})
                build_id = self._text(where, table, "build_id", "")
                if build_id.strip("0123456789abcdef"):
                    self.problems.append(f"{where}: build_id is not lower-case hexadecimal")
                modules[name] = PlannedModule(self._text(where, table, "path", ""), build_id or None)
            else:
                self.problems.append(f"module.{shortened(name)} is not a table")
        features = [self._feature(table) for table in self._tables("feature", document)]
        edits, added, removed = self._edits(self._tables("edit", document))
        names = [part.name for part in features]
        for name in sorted({name for name in names if names.count(name) > 1}):
            self.problems.append(f"feature {quoted(name)} occurs twice")
        if not features and not edits and not added and not removed:
            self.problems.append("it has neither a [[feature]] nor an [[edit]]")
        name = self._text("the plan", document, "name", "plan")
        return Plan(name, tuple(features), tuple(edits), modules, tuple(added), tuple(removed))

    def _feature(self, table: dict[str, Any]) -> PlannedFeature:
        name = self._name("a feature", table, "name", None)
        where = f"feature {quoted(name)}"
        self._known(where, table, {"name", "on_hit", "scope", "sites"})
        on_hit = OnHit.parse("terminate")
        try:
            on_hit = OnHit.parse(self._text(where, table, "on_hit", "terminate"))
        except DynacutError as error:
            self.problems.append(f"{where}: {error.problem}; {error.advice}")
        scope = Scope.ENTRY
        try:
            scope = Scope(self._text(where, table, "scope", Scope.ENTRY))
        except ValueError:
            self.problems.append(f"{where}: scope is one of {', '.join(Scope)}")
        sites = []
        for entry in self._tables("sites", table, where):
            self._known(f"{where}: a site", entry, {"at", "size", "old"})
            size = entry.get("size")
            if size is not None and (type(size) is not int or not 0 < size <= MAX_SITE_SIZE):
                self.problems.append(f"{where}: size {quoted(size)} is not a number from 1 to {MAX_SITE_SIZE}")
                size = None
            old = self._bytes(where, entry, "old", "")
            if size is not None and len(old) > size:
                self.problems.append(f"{where}: a site of {size} bytes with {len(old)} old bytes")
            sites.append(PlannedSite(self._text(where, entry, "at", None), size, old))
        if not sites:
            self.problems.append(f"{where} has no sites")
        return PlannedFeature(name, on_hit, scope, tuple(sites))

    def _edits(
        self, tables: list[dict[str, Any]]
    ) -> tuple[list[PlannedEdit], list[PlannedMemory], list[PlannedRemoval]]:
        """An edit replaces bytes, or has `map` or `unmap`."""
        mapping = [table for table in tables if "map" in table]
        unmapping = [table for table in tables if "unmap" in table and "map" not in table]
        plain = [table for table in tables if "map" not in table and "unmap" not in table]
        added = [self._memory(table) for table in mapping]
        return [self._edit(table) for table in plain], added, [self._removal(table) for table in unmapping]

    def _memory(self, table: dict[str, Any]) -> PlannedMemory:
        self._known("an edit", table, {"at", "map", "protection", "contents", "feature"})
        at = self._text("an edit", table, "at", None)
        where = f"edit at {shortened(at)}"
        size = self._pages(where, table, "map", MAX_ADDED_SIZE)
        protection = self._text(where, table, "protection", "rw-")
        if protection not in PROTECTIONS:
            self.problems.append(f"{where}: protection is one of {', '.join(PROTECTIONS)}")
        if protection == "r-x" and size > MAX_ADDED_CODE:
            self.problems.append(f"{where}: code to add has at most {MAX_ADDED_CODE} bytes")
        contents = self._bytes(where, table, "contents", "")
        if len(contents) > size:
            self.problems.append(f"{where}: {len(contents)} bytes of contents in {size} bytes of memory")
        return PlannedMemory(at, size, protection, contents, self._name(where, table, "feature", EDITS))

    def _removal(self, table: dict[str, Any]) -> PlannedRemoval:
        self._known("an edit", table, {"at", "unmap", "feature"})
        at = self._text("an edit", table, "at", None)
        where = f"edit at {shortened(at)}"
        size = self._pages(where, table, "unmap", MAX_REMOVED_SIZE)
        return PlannedRemoval(at, size, self._name(where, table, "feature", EDITS))

    def _pages(self, where: str, table: dict[str, Any], key: str, limit: int) -> int:
        size = table[key]
        if type(size) is int and 0 < size <= limit and size % PAGE_SIZE == 0:
            return size
        self.problems.append(f"{where}: {key} is a number of bytes in whole pages of {PAGE_SIZE}, at most {limit}")
        return PAGE_SIZE

    def _edit(self, table: dict[str, Any]) -> PlannedEdit:
        self._known("an edit", table, {"at", "old", "new", "feature"})
        at = self._text("an edit", table, "at", None)
        where = f"edit at {shortened(at)}"
        old, new = self._bytes(where, table, "old", None), self._bytes(where, table, "new", None)
        if len(old) != len(new) or not old or old == new:
            self.problems.append(f"{where}: old and new must be equally long, and differ")
        return PlannedEdit(at, old, new, self._name(where, table, "feature", EDITS))

    def _known(self, where: str, table: dict[str, Any], keys: set[str]) -> None:
        for key in sorted(table.keys() - keys):
            self.problems.append(f"{where}: unknown key {quoted(key)}")

    def _text(self, where: str, table: dict[str, Any], key: str, default: str | None) -> str:
        text = table.get(key, default)
        if isinstance(text, str) and (text or default == ""):
            return text
        self.problems.append(f"{where}: {key} is missing" if text is None else f"{where}: {key} is not a text")
        return default or "?"

    def _name(self, where: str, table: dict[str, Any], key: str, default: str | None) -> str:
        name = self._text(where, table, key, default)
        problem = name_problem(name)
        if problem:
            self.problems.append(f"{where}: {problem}")
        return name

    def _bytes(self, where: str, table: dict[str, Any], key: str, default: str | None) -> bytes:
        text = self._text(where, table, key, default)
        try:
            return bytes.fromhex(text)
        except ValueError:
            self.problems.append(f"{where}: {key} is not bytes in hexadecimal")
            return b""

    def _table(self, key: str, table: dict[str, Any]) -> dict[str, Any]:
        inner = table.get(key, {})
        if isinstance(inner, dict):
            return inner
        self.problems.append(f"{key} is not a table")
        return {}

    def _tables(self, key: str, table: dict[str, Any], where: str = "the plan") -> list[dict[str, Any]]:
        tables = table.get(key, [])
        if isinstance(tables, list) and all(isinstance(entry, dict) for entry in tables):
            return tables
        self.problems.append(f"{where}: {key} is not a list of tables")
        return []
