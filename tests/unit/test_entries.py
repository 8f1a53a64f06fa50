"""Where functions begin: what the first row of each FDE says, beside what assembly was written to say."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.entries import Entries
from dynacut.shared.binary.symbols import symbols

_ENTRIES = {
    "plain": "",
    "later": "nop\n.cfi_def_cfa_offset 32\n.cfi_offset rbx, -16",
    "annulled": ".cfi_remember_state\n.cfi_def_cfa_offset 48\n.cfi_def_cfa_offset 8",
    "saved_no_more": ".cfi_offset rbx, -16\n.cfi_restore rbx",
    "with_arguments": ".cfi_escape 0x2e, 0x10",
    "with_handler": ".cfi_personality 0x1b, plain\n.cfi_lsda 0x1b, plain",
}
_OTHERS = {
    "frame": ".cfi_def_cfa_offset 32",
    "frame_by_factor": ".cfi_escape 0x13, 0x7c",
    "based": ".cfi_def_cfa rbp, 8",
    "by_register": ".cfi_def_cfa_register rbp",
    "by_expression": ".cfi_escape 0x0f, 0x02, 0x77, 0x08",
    "saved": ".cfi_offset rbx, -16",
    "outermost": ".cfi_undefined rip",
    "elsewhere": ".cfi_register rip, rax",
    "not_understood": ".cfi_escape 0x3f",
    "cut_short": ".cfi_escape 0x0c",
}


@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")
def test_only_what_begins_as_after_a_call_is_an_entry(tmp_path: Path) -> None:
    functions = "".join(
        f"{name}:\n.cfi_startproc\n{rows}\nnop\nret\n.cfi_endproc\n" for name, rows in {**_ENTRIES, **_OTHERS}.items()
    )
    (tmp_path / "rows.s").write_text(f".text\n{functions}")
    subprocess.run(
        ["gcc", "-shared", "-nostdlib", tmp_path / "rows.s", "-o", tmp_path / "rows.so"], check=True, cwd=tmp_path
    )
    elf = ElfFile.open(tmp_path / "rows.so")
    entries = Entries(elf)
    offsets = {symbol.name: symbol.offset for symbol in symbols(elf, ".symtab")}
    assert {name for name in (*_ENTRIES, *_OTHERS) if offsets[name] in entries} == set(_ENTRIES)
    assert offsets["plain"] + 1 not in entries
