"""The cache of block maps: what it returns, and what it does not believe."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynacut.shared.binary import block_cache
from dynacut.shared.binary.block_cache import cached_block_map, load, store
from dynacut.shared.binary.blocks import BlockMap
from dynacut.shared.binary.cache_folder import cache_folder
from dynacut.shared.binary.elf import ElfFile

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")
CODE = "int f(int x) { return x ? x * 3 : 7; }\nint main(int c, char **v) { return f(c); }\n"


@pytest.fixture
def elf(tmp_path: Path) -> ElfFile:
    return program(tmp_path, "program")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "dynacut"


def program(tmp_path: Path, name: str, *options: str, code: str = CODE) -> ElfFile:
    (tmp_path / "p.c").write_text(code)
    subprocess.run(["gcc", *options, tmp_path / "p.c", "-o", tmp_path / name], check=True)
    return ElfFile.open(tmp_path / name)


def cached_file(elf: ElfFile, folder: Path) -> Path:
    return folder / f"{elf.build_id}.blocks"


def test_round_trip(elf: ElfFile, folder: Path) -> None:
    assert load(elf, folder) is None
    fresh = cached_block_map(elf, folder)
    cached = load(elf, folder)
    assert cached is not None
    assert cached.block_starts == fresh.block_starts and cached.block_sizes == fresh.block_sizes
    assert cached.boundary_bits == fresh.boundary_bits and cached.base == fresh.base
    assert cached.instruction_at(cached.block_starts[0]) == fresh.instruction_at(fresh.block_starts[0])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in folder.iterdir()] == [cached_file(elf, folder).name]


def test_every_damaged_byte_is_noticed(elf: ElfFile, folder: Path) -> None:
    cached_block_map(elf, folder)
    path = cached_file(elf, folder)
    good = path.read_bytes()
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x40]) + good[position + 1 :])
        assert load(elf, folder) is None, position
    for size in range(0, len(good), 7):
        path.write_bytes(good[:size])
        assert load(elf, folder) is None
    path.write_bytes(good + b"\0")
    assert load(elf, folder) is None
    assert len(cached_block_map(elf, folder)) > 0  # and it is replaced
    assert path.read_bytes() == good


def test_other_versions_are_ignored(elf: ElfFile, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_block_map(elf, folder)
    monkeypatch.setattr(block_cache, "VERSION", block_cache.VERSION + 1)
    assert load(elf, folder) is None


def test_a_forged_build_id_gets_no_other_programs_blocks(tmp_path: Path, elf: ElfFile, folder: Path) -> None:
    cached_block_map(elf, folder)
    forged = program(tmp_path, "forged", f"-Wl,--build-id=0x{elf.build_id}", "-O2", code=CODE + "int z = 3;")
    assert forged.build_id == elf.build_id
    assert load(forged, folder) is None
    assert cached_block_map(forged, folder).block_starts == BlockMap.of(forged).block_starts


def test_files_of_others_are_ignored(elf: ElfFile, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_block_map(elf, folder)
    path = cached_file(elf, folder)
    for bad, mode, good in ((path, 0o622, 0o600), (path, 0o660, 0o600), (folder, 0o777, 0o700)):
        bad.chmod(mode)
        assert load(elf, folder) is None
        bad.chmod(good)
        assert load(elf, folder) is not None
    folder.chmod(0o777)
    assert not store(elf, BlockMap.of(elf), folder)
    folder.chmod(0o700)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert load(elf, folder) is None
    assert not store(elf, BlockMap.of(elf), folder)
    assert len(cached_block_map(elf, folder)) > 0


def test_links_and_fifos_are_not_followed(elf: ElfFile, folder: Path, tmp_path: Path) -> None:
    cached_block_map(elf, folder)
    path = cached_file(elf, folder)
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    assert load(elf, folder) is None
    path.unlink()
    os.mkfifo(path)
    assert load(elf, folder) is None
    (tmp_path / "link").symlink_to(folder)
    assert load(elf, tmp_path / "link") is None
    assert not store(elf, BlockMap.of(elf), tmp_path / "link")


def test_a_folder_that_cannot_be_made_is_no_error(elf: ElfFile, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not store(elf, BlockMap.of(elf), tmp_path / "file" / "dynacut")
    assert len(cached_block_map(elf, tmp_path / "file" / "dynacut")) > 0


def test_without_build_id_nothing_is_cached(tmp_path: Path, folder: Path) -> None:
    anonymous = program(tmp_path, "anonymous", "-Wl,--build-id=none")
    assert len(cached_block_map(anonymous, folder)) > 0
    assert not folder.exists()


def test_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    assert cache_folder() == Path("/somewhere/cache/dynacut")
    for value in ("", "relative"):  # the XDG specification: ignore paths that are not absolute
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder().parts[-2:] == (".cache", "dynacut")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody-else")
    assert "somebody-else" not in str(cache_folder())


def test_a_warm_cache_needs_no_capstone(elf: ElfFile, folder: Path) -> None:
    cached_block_map(elf, folder)
    code = (
        "import sys; from pathlib import Path; from dynacut.shared.binary.elf import ElfFile;"
        "from dynacut.shared.binary.block_cache import load;"
        f"blocks = load(ElfFile.open(Path({str(elf.path)!r})), Path({str(folder)!r}));"
        "start = blocks.block_starts[0]; assert blocks.is_boundary(start) and blocks.instruction_size(start);"
        "assert blocks.block_at(start).size and 'capstone' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_loading_is_fast(folder: Path) -> None:
    redis = Path("/usr/bin/redis-server")
    if not redis.exists():
        pytest.skip(f"{redis} is not installed")
    elf = ElfFile.open(redis)
    cached_block_map(elf, folder)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        assert load(elf, folder) is not None
        times.append(time.perf_counter() - began)
    assert min(times) < 0.05  # 3 ms where this was written
