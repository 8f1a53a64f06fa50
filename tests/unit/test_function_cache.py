"""The cache of function ranges: what it returns, and what it does not believe."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from dynacut.shared.binary import function_cache
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.function_cache import cached_function_ranges, load, store
from dynacut.shared.binary.functions import function_ranges
from dynacut.shared.code import Code
from dynacut.shared.target import Module

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")
CODE = (
    "".join(f"int f{number}(int x) {{ return x * {number}; }}\n" for number in range(300)) + "int main() { return 0; }"
)


@pytest.fixture
def elf(tmp_path: Path) -> ElfFile:
    return program(tmp_path, "program")


def program(tmp_path: Path, name: str, *options: str) -> ElfFile:
    (tmp_path / "p.c").write_text(CODE)
    subprocess.run(["gcc", *options, tmp_path / "p.c", "-o", tmp_path / name], check=True)
    return ElfFile.open(tmp_path / name)


def test_round_trip(elf: ElfFile, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    assert load(elf, folder) is None
    assert cached_function_ranges(elf, folder) == function_ranges(elf) == load(elf, folder)
    assert [path.name for path in folder.iterdir()] == [f"{elf.build_id}.functions"]


def test_damage_and_other_versions_are_noticed(elf: ElfFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store(elf, function_ranges(elf), tmp_path)
    path = tmp_path / f"{elf.build_id}.functions"
    good = path.read_bytes()
    for position in (*range(64), *range(64, len(good), 61)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x40]) + good[position + 1 :])
        assert load(elf, tmp_path) is None, position
    for size in range(0, len(good), 61):
        path.write_bytes(good[:size])
        assert load(elf, tmp_path) is None
    assert cached_function_ranges(elf, tmp_path) == function_ranges(elf)  # and it is replaced
    assert path.read_bytes() == good
    monkeypatch.setattr(function_cache, "VERSION", function_cache.VERSION + 1)
    assert load(elf, tmp_path) is None


def test_a_forged_build_id_gets_no_other_programs_functions(elf: ElfFile, tmp_path: Path) -> None:
    assert store(elf, function_ranges(elf), tmp_path)
    forged = program(tmp_path, "forged", f"-Wl,--build-id=0x{elf.build_id}", "-O2")
    assert forged.build_id == elf.build_id
    assert load(forged, tmp_path) is None
    assert cached_function_ranges(forged, tmp_path) == function_ranges(forged) != function_ranges(elf)


def test_the_code_of_a_module_has_them_from_there(
    elf: ElfFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module = Module("p", frozenset({"p"}), str(elf.path), elf.path, Path("/"), 0, 1 << 20, True, ())
    assert Code(module).functions == function_ranges(elf) == load(elf, tmp_path / "cache" / "dynacut")
