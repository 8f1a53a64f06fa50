"""Gadgets, counted by ROPgadget, as far as one can count them by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dynacut.shared.binary import gadgets
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.gadgets import count_gadgets, gadgets_of_file
from dynacut.shared.errors import DynacutError

RET, INT3 = b"\xc3", b"\xcc"


@pytest.mark.parametrize(
    ("code", "count"),
    [
        (b"\x00", 0),
        (RET, 1),
        (RET + INT3 + RET, 1),  # the same text counts once
        (b"\x5f" + RET, 2),  # pop rdi; ret, and ret
        (b"\x41\x5f" + RET, 3),  # pop r15; ret holds pop rdi; ret
        (b"\xff\xe0", 1),  # jmp rax
        (b"\xe8\x00\x00\x00\x00", 0),  # a direct call
        (INT3 * 64, 0),
    ],
)
def test_gadgets_of_short_code(code: bytes, count: int) -> None:
    assert count_gadgets(code) == count


def test_int3_bytes_take_gadgets_away() -> None:
    code = b"".join(bytes([0x58 + register]) + RET for register in range(8))  # pop rax; ret … pop rdi; ret
    assert count_gadgets(INT3 * 8 + code[8:]) == count_gadgets(code) - 4


def test_a_file_is_counted_once_for_each_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    elf = ElfFile.open(Path("/bin/true"))
    assert elf.build_id is not None
    count = gadgets_of_file(elf, tmp_path)
    assert count > 0
    with monkeypatch.context() as patched:
        patched.setattr(gadgets, "_COMMAND", (sys.executable, "-c", "print('Unique gadgets found: 7')"))
        assert gadgets_of_file(elf, tmp_path) == count
        patched.setattr("importlib.metadata.version", lambda _: "other")
        assert gadgets_of_file(elf, tmp_path) == 7
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    assert gadgets_of_file(elf, tmp_path) == count


def test_without_ropgadget_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gadgets, "_COMMAND", (sys.executable, "-c", "import no_such_module"))
    with pytest.raises(DynacutError, match="ROPgadget does not count") as caught:
        count_gadgets(RET)
    assert "no_such_module" in caught.value.details[-1]
    assert subprocess.run([*gadgets._COMMAND], capture_output=True, check=False).returncode == 1
