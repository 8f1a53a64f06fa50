"""Sets of covered code: exact to the byte, by module, and as whole blocks of a map."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynacut.shared.binary.blocks import BlockMap
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.coverage.coverage import Coverage, CoveredModule, file_name
from dynacut.shared.errors import DynacutError, ExitStatus

some_blocks = st.dictionaries(st.integers(0, 60), st.integers(1, 20), max_size=12)


@st.composite
def coverages(draw: st.DrawFn) -> Coverage:
    paths = draw(st.lists(st.sampled_from(["/bin/a", "/bin/b", "/lib/c.so"]), unique=True))
    return Coverage(tuple(CoveredModule.of(path, draw(some_blocks)) for path in paths))


def covered(blocks: Mapping[int, int]) -> set[int]:
    return {byte for offset, size in blocks.items() for byte in range(offset, offset + size)}


def everything(coverage: Coverage) -> set[tuple[str, int]]:
    return {(module.path, byte) for module in coverage.modules for byte in covered(module.blocks)}


def module(blocks: Mapping[int, int], path: str = "/bin/a", build_id: str | None = None) -> CoveredModule:
    return CoveredModule.of(path, blocks, build_id)


@dataclass
class OtherElf:
    build_id: str | None
    path: Path = Path("/bin/a")


def block_map(blocks: Iterable[tuple[int, int]], build_id: str | None = None) -> BlockMap:
    starts, sizes = array("Q"), array("I")
    for start, size in blocks:
        starts.append(start)
        sizes.append(size)
    return BlockMap(cast(ElfFile, OtherElf(build_id)), 0, b"", starts, sizes)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/usr/bin/redis-server", "redis-server"),
        ("[vdso]", "[vdso]"),
        ("/odd/with\\backslash", "with\\backslash"),
        ("C:\\Windows\\SYSTEM32\\ntdll.dll", "ntdll.dll"),
        ("C:\\tools\\release/drx.dll", "drx.dll"),
        ("\\\\server\\share\\a.exe", "a.exe"),
        ("", ""),
    ],
)
def test_file_names(path: str, name: str) -> None:
    assert file_name(path) == name


def test_counts() -> None:
    overlapping = module({10: 5, 12: 10, 0: 2, 2: 1})
    assert overlapping.count == 4
    assert overlapping.size_bytes == 3 + 12
    both = Coverage((overlapping, module({1: 1}, "/bin/b")))
    assert both.count == 5
    assert both.size_bytes == 16


def test_order_of_first_hits_is_kept() -> None:
    first = module({30: 5, 10: 5, 20: 5})
    assert list(first.union(module({5: 1, 10: 6})).blocks.items()) == [(30, 5), (10, 6), (20, 5), (5, 1)]
    assert list(first.difference(module({10: 5})).blocks) == [30, 20]
    assert list(first.intersection(module({10: 50})).blocks) == [30, 10, 20]
    assert list(first.normalised(block_map([(8, 4), (12, 3), (30, 9)])).blocks.items()) == [(30, 9), (8, 4), (12, 3)]


def test_a_difference_cuts_blocks_that_overlap() -> None:
    unwanted = module({0x100: 0x30})
    assert unwanted.difference(module({0x110: 0x10})).blocks == {0x100: 0x10, 0x120: 0x10}
    assert unwanted.difference(module({0xF0: 0x20})).blocks == {0x110: 0x20}
    assert unwanted.difference(module({0xF0: 0x10, 0x130: 1})).blocks == unwanted.blocks
    assert unwanted.difference().blocks == unwanted.blocks
    # A block that begins amid a wanted one did run as part of it: no trap may be put there.
    assert module({0x110: 0x20}).difference(unwanted).blocks == {}


@given(some_blocks, some_blocks, some_blocks)
def test_modules_against_sets_of_bytes(a: dict[int, int], b: dict[int, int], c: dict[int, int]) -> None:
    one, two, three = module(a), module(b), module(c)
    assert covered(one.union(two, three).blocks) == covered(a) | covered(b) | covered(c)
    assert covered(one.intersection(two).blocks) == covered(a) & covered(b)
    assert covered(one.difference(two, three).blocks) == covered(a) - covered(b) - covered(c)
    assert one.size_bytes == len(covered(a))
    for result in (one.union(two), one.intersection(two), one.difference(two)):
        assert min(result.blocks.values(), default=1) >= 1


@given(some_blocks, some_blocks)
def test_normalised_against_comparing_all(blocks: dict[int, int], gaps: dict[int, int]) -> None:
    ours = []
    position = 0
    for gap, size in gaps.items():
        ours.append((position + gap % 4, size))
        position += gap % 4 + size
    wanted = {
        start: size
        for start, size in ours
        if any(start < offset + length and offset < start + size for offset, length in blocks.items())
    }
    normalised = module(blocks).normalised(block_map(ours))
    assert normalised.blocks == wanted
    assert normalised.normalised(block_map(ours)) == normalised


@settings(deadline=None)
@given(coverages(), coverages(), coverages())
def test_set_laws(a: Coverage, b: Coverage, c: Coverage) -> None:
    assert a.union(a) == a.union() == a
    assert everything(a.union(b)) == everything(b.union(a)) == everything(a) | everything(b)
    assert everything(a.union(b).union(c)) == everything(a.union(b.union(c))) == everything(a.union(b, c))
    assert everything(a.intersection(b)) == everything(b.intersection(a)) == everything(a) & everything(b)
    assert everything(a.intersection(a)) == everything(a)
    assert everything(a.difference(b, c)) == everything(a.difference(b).difference(c))
    assert (
        everything(a.difference(b, c))
        == everything(a.difference(b.union(c)))
        == everything(a) - everything(b) - everything(c)
    )
    assert everything(a.difference(a)) == set()
    assert everything(a.difference(b).union(a.intersection(b))) == everything(a)


def test_build_ids_decide_where_both_are_known() -> None:
    old, new = module({1: 1, 5: 1}, "/bin/a", "11"), module({1: 1, 9: 1}, "/bin/a", "22")
    moved = module({5: 1}, "/opt/other-name", "11")
    assert Coverage((old,)).difference(Coverage((new,))).modules == (old,)
    assert Coverage((old,)).union(Coverage((new,))).modules == (old, new)
    assert Coverage((old,)).difference(Coverage((moved,))).modules[0].blocks == {1: 1}
    unknown = module({9: 1}, "/bin/a")
    union = Coverage((unknown,)).union(Coverage((old,)))
    assert union.modules == (module({9: 1, 1: 1, 5: 1}, "/bin/a", "11"),)


def test_one_file_under_two_paths() -> None:
    twice = Coverage((module({1: 1}, "/bin/a", "11"), module({2: 1}, "/usr/bin/a", "11")))
    assert twice.union(twice) == twice
    assert twice.intersection(twice).count == 2
    assert twice.difference(Coverage((twice.modules[1],))).count == 1
    assert twice.difference(twice).count == 0


def test_file_names_are_used_where_they_are_unambiguous() -> None:
    here, there = module({1: 1, 2: 1}, "/usr/bin/redis-server"), module({1: 1}, "/build/redis-server")
    assert Coverage((here,)).difference(Coverage((there,))).count == 1
    assert Coverage((here,)).intersection(Coverage((there,))).modules == (module({1: 1}, here.path),)
    another = module({2: 1}, "/opt/redis-server")
    assert Coverage((here,)).difference(Coverage((there, another))).count == 2
    assert Coverage((here, another)).difference(Coverage((there,))).count == 3
    # The same path is better than the same name.
    assert Coverage((here,)).difference(Coverage((here, there))).count == 0
    assert Coverage((here, another)).difference(Coverage((here,))).modules == (module({}, here.path), another)
    renamed = module({1: 1}, "/usr/bin/redis-server", "11"), module({2: 1}, "/build/redis-server", "22")
    assert Coverage(renamed[:1]).difference(Coverage(renamed[1:])).count == 1


@pytest.mark.parametrize("path", ["", "<unknown>"])
def test_unnamed_modules_are_never_the_same(path: str) -> None:
    unnamed = Coverage((module({1: 1}, path),))
    assert unnamed.union(unnamed).count == 2
    assert unnamed.intersection(unnamed).modules == ()


def test_looking_up_a_module() -> None:
    coverage = Coverage((module({1: 1}, "/bin/a"), module({2: 2}, "/bin/b"), module({}, "/lib/b"), module({}, "b")))
    assert coverage.module("a").path == coverage.module("/bin/a").path == "/bin/a"
    assert coverage.module("b").path == "b"
    with pytest.raises(DynacutError, match="no module 'c'") as missing:
        coverage.module("c")
    assert missing.value.advice == "it has blocks of 'a', 'b'"
    with pytest.raises(DynacutError, match="several modules 'b': '/bin/b', '/lib/b'"):
        Coverage(coverage.modules[:3]).module("b")
    with pytest.raises(DynacutError, match="no module 'a'"):
        Coverage(()).module("a")


def test_normalising_knows_the_build_id() -> None:
    assert module({1: 1}).normalised(block_map([(0, 2)], "11")).build_id == "11"
    assert module({1: 1}, build_id="11").normalised(block_map([(0, 2)])).build_id == "11"
    with pytest.raises(DynacutError, match="is of build-id 22, but /bin/a is 11") as refused:
        module({1: 1}, build_id="22").normalised(block_map([(0, 2)], "11"))
    assert refused.value.status is ExitStatus.REFUSED and refused.value.advice


def test_blocks_that_all_overlap_do_not_cost_their_product() -> None:
    nested = module(dict.fromkeys(range(30_000), 1 << 20))
    comb = module(dict.fromkeys(range(0, 60_000, 2), 1))
    assert nested.intersection(comb).size_bytes == 30_000
    assert nested.difference(comb).size_bytes == nested.size_bytes - 30_000
    assert nested.normalised(block_map((offset, 1) for offset in range(0, 60_000, 2))).count == 30_000
