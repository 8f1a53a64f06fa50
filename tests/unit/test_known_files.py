"""What is known of a file serves the next target that maps it, and no other file."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from test_sites import BASE, PROGRAMS, MemoryTarget, built

from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.code import Code, KnownFiles
from dynacut.shared.errors import DynacutError
from dynacut.shared.on_hit import OnHit
from dynacut.shared.plan import Plan, PlannedFeature, PlannedSite, Scope
from dynacut.shared.resolve import disable
from dynacut.shared.target import Module

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")


@pytest.fixture
def server(tmp_path: Path) -> Path:
    return Path(shutil.copy(built()[0], tmp_path / "server"))


def module(path: Path, base: int = BASE) -> Module:
    return MemoryTarget((path, base)).modules[0]


def test_the_same_file_is_read_once(server: Path, tmp_path: Path) -> None:
    known = KnownFiles()
    first = Code(module(server), known)
    other_name = tmp_path / "link"
    other_name.hardlink_to(server)
    other_name.chmod(0o755)  # a change of the inode, before it is read
    again = [Code(module(path, BASE + 0x10000), known) for path in (server, other_name)]
    assert all(code.file is first.file for code in again)
    assert all(code.module.elf is first.elf for code in again)


def test_a_file_in_the_place_of_another_is_read(server: Path, tmp_path: Path) -> None:
    known = KnownFiles()
    first = Code(module(server), known)
    symbols = first.symbols.lookup("twice")
    new = tmp_path / "new"
    subprocess.run(["gcc", "-O0", "-Wl,--build-id", PROGRAMS / "server.c", "-o", new], check=True)
    new.replace(server)
    second = Code(module(server), known)
    assert second.elf.build_id != first.elf.build_id
    assert symbols
    assert first.symbols.lookup("twice") == symbols


def test_a_file_that_was_written_to_is_read_anew(server: Path) -> None:
    known = KnownFiles()
    first = Code(module(server), known)
    entry = first.symbols.lookup("main")[0].offset
    segment = first.elf.segment_at(entry)
    assert segment is not None
    status = server.stat()
    with server.open("r+b") as file:
        file.seek(segment.file_offset + entry - segment.offset)
        file.write(b"\x90")
    os.utime(server, ns=(status.st_atime_ns, status.st_mtime_ns))  # only the inode's time of change tells it
    second = Code(module(server), known)
    assert second.elf.read(entry, 1) == b"\x90"
    assert first.elf.read(entry, 1) != b"\x90"


def test_a_file_that_is_gone_is_not_taken_for_a_known_one(server: Path) -> None:
    known = KnownFiles()
    assert Code(module(server), known).functions
    later = module(server)
    server.unlink()
    with pytest.raises(DynacutError, match="cannot be read"):
        _ = Code(later, known).elf


def test_a_second_target_needs_no_file(server: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor a cache: what was decoded for the first is known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    known, targets = KnownFiles(), [MemoryTarget((server, base)) for base in (BASE, BASE + 0x100000)]
    plan = Plan("plan", (PlannedFeature("f", OnHit.parse("terminate"), Scope.ENTRY, (PlannedSite("main"),)),))
    (first,) = disable(plan, targets[0], None, known=known).edits

    def not_again(*_: object, **__: object) -> None:
        raise AssertionError("read or decoded again")

    monkeypatch.setattr(ElfFile, "open", not_again)
    monkeypatch.setattr("dynacut.shared.binary.blocks.is_instruction_boundary", not_again)
    monkeypatch.setattr("dynacut.shared.binary.function_cache.cached_function_ranges", not_again)
    (second,) = disable(plan, targets[1], None, known=known).edits
    assert (second.address - first.address, second.old, second.new) == (0x100000, first.old, first.new)
