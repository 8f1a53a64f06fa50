"""The layers of the design: imports point down, backends do not know each other, private names stay private."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
LAYERS = {"cli": 4, "jobs": 3, "live": 2, "offline": 2, "shared": 1, "handlers": 0}
SOURCES = sorted(path for layer in LAYERS for path in (PROJECT / layer).glob("**/*.py"))
COMMAND = "dynacut.cli.main"
"""What any layer may run, as a user does."""
MODULE = re.compile(rf"dynacut\.({'|'.join(LAYERS)})(\.\w+)+")
BACKEND_WORDS = ("ptrace", "criu", "crit", "pycriu", "protobuf", "google.protobuf", "psutil")


@dataclass(frozen=True)
class Import:
    source: Path
    line: int
    module: str
    name: str | None
    """What is taken from the module; None for the module itself."""

    def __str__(self) -> str:
        what = f"{self.name} from {self.module}" if self.name else self.module
        return f"{self.source.relative_to(PROJECT)}:{self.line} imports {what}"

    @property
    def layer(self) -> str | None:
        parts = self.module.split(".")
        if parts[0] != "dynacut":
            return None
        if len(parts) > 1:
            return parts[1]
        return self.name


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), path)


def imports(path: Path) -> Iterator[Import]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, None)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                yield Import(path, node.lineno, node.module or "", alias.name)
        elif isinstance(node, ast.Constant) and MODULE.fullmatch(str(node.value)) and node.value != COMMAND:
            yield Import(path, node.lineno, str(node.value), None)  # for `python -m`, import_module() or find_spec()


@cache
def all_imports() -> tuple[Import, ...]:
    return tuple(found for path in SOURCES for found in imports(path))


def layer_of(path: Path) -> str:
    return path.relative_to(PROJECT).parts[0]


def test_the_sources_are_found() -> None:
    assert {"cli", "live", "shared", "handlers"} <= {layer_of(path) for path in SOURCES}
    assert any(found.layer == "handlers" and layer_of(found.source) == "shared" for found in all_imports())


def test_imports_point_down_or_stay_in_their_folder() -> None:
    wrong = [
        str(found)
        for found in all_imports()
        if found.layer is not None
        and found.layer != layer_of(found.source)
        and LAYERS.get(found.layer, 99) >= LAYERS[layer_of(found.source)]
    ]
    assert wrong == []


def test_the_backends_do_not_know_each_other() -> None:
    pairs = {("live", "offline"), ("offline", "live")}
    assert [str(found) for found in all_imports() if (layer_of(found.source), found.layer) in pairs] == []


def test_packages_are_imported_by_their_full_names() -> None:
    assert [str(found) for found in all_imports() if found.module.split(".")[0] in LAYERS] == []


@pytest.mark.parametrize("layer", ["shared", "handlers"])
def test_what_is_shared_imports_nothing_of_a_backend(layer: str) -> None:
    wrong = [
        str(found)
        for found in all_imports()
        if layer_of(found.source) == layer
        and (found.module.split(".")[0] in BACKEND_WORDS or found.module.startswith("google.protobuf"))
    ]
    assert wrong == []


@pytest.mark.parametrize("layer", ["shared", "handlers"])
def test_what_is_shared_names_nothing_of_a_backend_in_its_code(layer: str) -> None:
    """Comments and docstrings may; identifiers and attributes may not."""
    wrong = []
    for path in SOURCES:
        if layer_of(path) != layer:
            continue
        for node in ast.walk(tree(path)):
            name = {ast.Name: "id", ast.Attribute: "attr", ast.FunctionDef: "name", ast.ClassDef: "name"}.get(
                type(node)
            )
            word = str(getattr(node, name)).lower() if name else ""
            if any(part in word for part in ("ptrace", "criu", "tracee")):
                wrong.append(f"{path.relative_to(PROJECT)}:{getattr(node, 'lineno', 0)}: {word}")
    assert wrong == []


def test_no_module_takes_a_private_name_of_another() -> None:
    wrong = [
        str(found)
        for found in all_imports()
        if found.layer is not None
        and (
            (found.name or "").startswith("_")
            or any(part.startswith("_") and not part.startswith("__") for part in found.module.split("."))
        )
    ]
    assert wrong == []


def test_no_module_reaches_for_a_private_attribute_of_another() -> None:
    """``module._name``, where module was imported."""
    wrong = []
    for path in SOURCES:
        mine = {
            found.name or found.module for found in all_imports() if found.source == path and found.layer is not None
        }
        wrong += [
            f"{path.relative_to(PROJECT)}:{node.lineno}: {node.value.id}.{node.attr}"
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in mine
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
        ]
    assert wrong == []


def test_the_command_imports_its_backends_only_when_it_runs() -> None:
    """A whole command has 300 ms: what is heavy is imported inside the function that needs it."""
    heavy = ("capstone", "elftools", "ptrace", "rich", "psutil", "tomli_w", "dynacut.live", "dynacut.offline")
    wrong = []
    for path in SOURCES:
        if layer_of(path) != "cli":
            continue
        for node in tree(path).body:
            modules = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            wrong += [f"{path.name}: {module}" for module in modules if module.startswith(heavy)]
    assert wrong == []


def test_no_file_is_a_room_for_everything() -> None:
    assert [
        path.name for path in SOURCES if path.stem in ("utils", "util", "helpers", "manager", "common", "misc")
    ] == []
