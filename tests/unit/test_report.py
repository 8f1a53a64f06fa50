"""What is in force: features with state and hits, and what somebody else has patched."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
from test_sites import BASE, MemoryTarget, new_target
from test_table import Memory

from dynacut.handlers.table import Action, TableSite
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.code import CodeOf
from dynacut.shared.report import FeatureReport, SiteReport, features_of, foreign_changes

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")


@pytest.fixture
def target() -> MemoryTarget:
    return new_target()


def sites_of(target: MemoryTarget) -> list[TableSite]:
    alpha, beta = target.address("alpha"), target.address("beta")
    return [
        TableSite(alpha, "one", Action.REDIRECT, beta, 4, b"\x55", b"\xcc"),
        TableSite(alpha + 4, "two", Action.RETURN, (1 << 64) - 5, 5, b"\xb8\x01", b"\xcc\xcc"),
        TableSite(alpha + 9, "two", Action.EDIT, 0, 2, b"\x85\xff", b"\x90\x90"),
    ]


def test_without_a_table_there_are_no_features(target: MemoryTarget) -> None:
    assert features_of(target, None, CodeOf(target)) == ()
    assert foreign_changes(target, [], CodeOf(target)) == []


def test_features_have_state_hits_and_actions_as_they_are_written(target: MemoryTarget) -> None:
    memory = Memory()
    sites = sites_of(target)
    memory.update(["two", "one", "empty"], sites)
    memory.hit(sites[0].address, 3)
    memory.hit(sites[1].address, 4)
    target.write(sites[1].address, sites[1].new)
    two, one, empty = features_of(target, memory.table(), CodeOf(target))
    offset = target.offset("alpha")
    assert (one.name, one.state, one.patched, one.hits) == ("one", "enabled", 0, 3)
    assert (two.name, two.state, two.patched, two.hits) == ("two", "disabled", 1, 4)
    assert (empty.name, empty.state, empty.patched, empty.sites) == ("empty", "enabled", 0, ())
    assert [site.on_hit for site in two.sites] == ["return=-5", "edit"]
    assert one.sites[0].on_hit == f"redirect=server+{target.offset('beta'):#x}"
    assert [site.at for site in two.sites] == [f"server+{offset + 4:#x}", f"server+{offset + 9:#x}"]
    assert [site.patched for site in two.sites] == [True, False]


def test_a_site_that_is_half_patched_is_not_in_force(target: MemoryTarget) -> None:
    memory = Memory()
    memory.update(["one", "two"], sites_of(target))
    target.write(target.address("alpha") + 4, b"\xcc")
    assert [feature.patched for feature in features_of(target, memory.table(), CodeOf(target))] == [0, 0]


def test_a_feature_is_unloaded_only_if_nothing_of_it_is_left() -> None:
    here, gone = (SiteReport("server+0x10", 0x1010, 1, "learn", 0, False, loaded=loaded) for loaded in (True, False))
    assert FeatureReport("one", (gone, gone)).state == "unloaded"
    assert FeatureReport("one", (gone, here)).state == "enabled"
    assert FeatureReport("one", ()).state == "enabled"


def test_json_has_sites_only_when_asked() -> None:
    report = FeatureReport("one", (SiteReport("server+0x10", 0x1010, 1, "learn", 2, True),))
    short = {"name": "one", "state": "disabled", "sites": 1, "patched": 1, "hits": 2}
    assert report.as_json(with_sites=False) == short
    site = {"at": "server+0x10", "address": "0x1010", "length": 1, "on_hit": "learn", "hits": 2, "patched": True}
    assert report.as_json(with_sites=True) == {**short, "site_list": [site]}
    assert json.loads(json.dumps(report.as_json(with_sites=True)))


def test_patches_of_somebody_else_are_found_byte_by_byte(target: MemoryTarget) -> None:
    alpha, offset = target.address("alpha"), target.offset("alpha")
    target.write(alpha, b"\xcc")
    target.write(alpha + 4, b"\xe9\x11\x22\x33\x44")
    found = foreign_changes(target, [], CodeOf(target))
    assert [(each.at, each.size) for each in found] == [(f"server+{offset:#x}", 1), (f"server+{offset + 4:#x}", 5)]
    assert (found[0].found, found[0].original) == (b"\xcc", b"\x55")
    assert (found[1].found, found[1].original) == (b"\xe9\x11\x22\x33\x44", b"\xb8\x01\x00\x00\x00")


def test_our_own_patches_are_not_foreign_but_their_neighbours_are(target: MemoryTarget) -> None:
    memory = Memory()
    sites = sites_of(target)
    memory.update(["one", "two"], sites)
    for site in sites:
        target.write(site.address, site.new)
    assert foreign_changes(target, [memory.table()], CodeOf(target)) == []
    target.write(sites[0].address + 1, b"\xcc")
    (found,) = foreign_changes(target, [memory.table()], CodeOf(target))
    assert (found.at, found.size) == (f"server+{target.offset('alpha') + 1:#x}", 1)


def test_a_page_that_was_written_but_is_the_same_is_not_foreign(target: MemoryTarget) -> None:
    target.write(target.address("alpha"), b"\x55")
    assert foreign_changes(target, [], CodeOf(target)) == []


def test_a_patch_in_a_library_is_found_too(target: MemoryTarget) -> None:
    target.write(target.address("extra"), b"\xcc")
    (found,) = foreign_changes(target, [], CodeOf(target))
    assert found.at.startswith("libextra.so.1+0x")


def test_a_module_whose_file_is_gone_hides_no_other_ones(target: MemoryTarget, tmp_path: Path) -> None:
    server = tmp_path / "server"
    server.write_bytes(target.modules[0].file.read_bytes())
    other = MemoryTarget((server, BASE), (target.modules[1].file, target.modules[1].base))
    other.write(target.address("alpha"), b"\xcc")
    other.write(target.address("extra"), b"\xcc")
    server.unlink()
    (found,) = foreign_changes(other, [], CodeOf(other))
    assert found.at.startswith("libextra.so.1+0x")


def test_a_patch_in_the_first_page_of_code_that_begins_amid_it_is_found(target: MemoryTarget, tmp_path: Path) -> None:
    """lld lays segments so: neither offset nor address at a page's start. The kernel maps the whole page."""
    server = tmp_path / "server"
    data = bytearray(target.modules[0].file.read_bytes())
    (table,) = struct.unpack_from("<Q", data, 32)
    for index in range(struct.unpack_from("<H", data, 56)[0]):
        header = table + 56 * index
        kind, flags, offset, vaddr, paddr, size, memory_size = struct.unpack_from("<IIQQQQQ", data, header)
        if kind == 1 and flags & 1:
            moved = (kind, flags, offset + 16, vaddr + 16, paddr + 16, size - 16, memory_size - 16)
            struct.pack_into("<IIQQQQQ", data, header, *moved)
    server.write_bytes(data)
    code = next(segment for segment in ElfFile.open(server).segments if segment.executable)
    assert code.offset % 4096 == 16
    other = MemoryTarget((server, BASE))
    other.write(target.address("alpha"), b"\xcc")
    assert target.offset("alpha") // 4096 == code.offset // 4096, "alpha is in the first page"
    (found,) = foreign_changes(other, [], CodeOf(other))
    assert found.at == f"server+{target.offset('alpha'):#x}"


def test_very_many_foreign_bytes_do_not_make_an_endless_list(target: MemoryTarget) -> None:
    text = next(part for part in target.modules[0].mappings if part.executable)
    memory = target.read(text.start, text.size)
    target.write(text.start, bytes(byte ^ (index & 1) for index, byte in enumerate(memory)))
    assert 1 <= len(foreign_changes(target, [], CodeOf(target))) <= 1000 + 4096
