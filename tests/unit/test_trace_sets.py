"""dynacut trace --merge, --intersect, --subtract: logs of different tools, with and without our blocks."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from dynacut.cli.main import main
from dynacut.shared.binary.blocks import BlockMap
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.coverage.coverage import Coverage, CoveredModule
from dynacut.shared.coverage.drcov import read_log, write

SOURCE = """
int wanted(int n) { int sum = 0; for (int i = 0; i < n; i++) sum += i % 3 ? i : 2 * i; return sum; }
int main(int argc, char **argv) { (void)argv; return argc > 1 ? wanted(argc) : 7; }
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    (tmp_path / "program.c").write_text(SOURCE)
    subprocess.run(["gcc", "-O1", tmp_path / "program.c", "-o", tmp_path / "program"], check=True)
    return tmp_path / "program"


def log(path: Path, module: Path, blocks: dict[int, int]) -> Path:
    write(path, Coverage((CoveredModule.of(str(module), blocks),)))
    return path


def combined(tmp_path: Path, *arguments: str | Path) -> dict[int, int]:
    output = tmp_path / "result.drcov"
    assert main(["trace", *map(str, arguments), "-o", str(output), "-q"]) == 0
    return dict(read_log(output).coverage.modules[0].blocks)


def test_blocks_of_different_tools_are_the_same_when_normalised(program: Path, tmp_path: Path) -> None:
    """One tool splits blocks where another does not; ours are neither's. A byte of a block is the block."""
    blocks = BlockMap.of(ElfFile.open(program))
    (index, *_) = (index for index, size in enumerate(blocks.block_sizes) if size > 4)
    start, size = blocks.block_starts[index], blocks.block_sizes[index]
    whole = log(tmp_path / "whole", program, {start: size})
    head = log(tmp_path / "head", program, {start: 2})
    tail = log(tmp_path / "tail", program, {start + 2: size - 2})
    assert combined(tmp_path, "--subtract", whole, head) == {start + 2: size - 2}
    assert combined(tmp_path, "--subtract", whole, head, "--normalise") == {}
    assert combined(tmp_path, "--intersect", head, tail) == {}
    assert combined(tmp_path, "--intersect", head, tail, "--normalise") == {start: size}
    assert combined(tmp_path, "--merge", head, tail) == {start: 2, start + 2: size - 2}
    assert combined(tmp_path, "--merge", head, tail, "--normalise") == {start: size}


def test_what_cannot_be_normalised_is_said(program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = log(tmp_path / "missing", tmp_path / "nowhere.so", {16: 4})
    assert combined(tmp_path, "--merge", missing, "--normalise") == {16: 4}
    assert "stay as they are" in capsys.readouterr().err
    outside = log(tmp_path / "outside", program, {0: 4})  # the ELF header
    assert combined(tmp_path, "--merge", outside, "--normalise") == {}
    assert "4 bytes of" in capsys.readouterr().err
