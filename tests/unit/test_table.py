"""The table beside the handler: the same layout as table.h, changed in one step, and read without trust."""

from __future__ import annotations

import shutil
import struct
import subprocess
import tracemalloc
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dynacut.handlers import table as table_module
from dynacut.handlers.blob import HANDLER_ENTRY
from dynacut.handlers.layout import BANK, PAGE_SIZE, SITE
from dynacut.handlers.table import (
    BANKS_OFFSET,
    CODE_SIZE,
    FEATURE_CAPACITY,
    GENERATION_OFFSET,
    MAGIC,
    MAX_HEAP_CAPACITY,
    MAX_RANGES,
    MAX_SITE_CAPACITY,
    NAME_SIZE,
    OBSERVED_OFFSET,
    PREVIOUS_OFFSET,
    REPAIR_CAPACITY,
    Action,
    KernelAction,
    Layout,
    Repair,
    RepairKind,
    Table,
    TableError,
    TableFullError,
    TableSite,
    UserLibrary,
    Write,
)

HANDLERS = Path(__file__).resolve().parents[2] / "handlers"
ADDRESS = 0x10_0000_0000 + CODE_SIZE
SMALL = Layout.of_capacities(8, 256)
NAMES = SMALL.features + FEATURE_CAPACITY * NAME_SIZE
"""Of the bank in force after one update."""
needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")


class Memory:
    """The bytes of a table, as a process would hold them."""

    def __init__(self, layout: Layout = SMALL) -> None:
        self.data = bytearray(layout.size)
        self.write([Write(0, MAGIC), Table.empty(layout).header()])
        # As after an installation; else parse() takes the observed action for the target's own.
        self.write([Write(OBSERVED_OFFSET, KernelAction(ADDRESS - CODE_SIZE + HANDLER_ENTRY).pack())])

    def write(self, writes: Iterable[Write]) -> None:
        for write in writes:
            self.data[write.offset : write.offset + len(write.data)] = write.data

    def table(self) -> Table:
        return Table.parse(bytes(self.data), ADDRESS)

    def update(self, features: Sequence[str], sites: Sequence[TableSite]) -> None:
        self.write(self.table().update(features, sites))

    def hit(self, address: int, times: int) -> None:
        """Counts hits as the handler does."""
        for placed in self.table().placed:
            if placed.site.address == address:
                struct.pack_into("<Q", self.data, SMALL.counters + 8 * placed.counter, placed.site.hits + times)


def site(
    address: int, feature: str = "one", action: Action = Action.TERMINATE, old: bytes = b"\x55", argument: int = 0
) -> TableSite:
    return TableSite(address, feature, action, argument, 16, old, b"\xcc" * len(old))


def edit(address: int, feature: str = "one", old: bytes = b"\x74", new: bytes = b"\xeb") -> TableSite:
    return TableSite(address, feature, Action.EDIT, 0, len(old), old, new)


def contents(table: Table) -> tuple[object, ...]:
    """All that a table says, hits included (they do not count when sites are compared)."""
    return table.features, table.sites, [each.hits for each in table.sites], table.previous, table.repairs


# The layout.

C_PROGRAM = """
#include <stddef.h>
#include <stdio.h>
#include "table.h"
#define FIELD(type, name) printf(#type "." #name " %zu\\n", offsetof(struct dynacut_##type, name));
#define SIZE(type) printf(#type " %zu\\n", sizeof(struct dynacut_##type));
#define NUMBER(name) printf(#name " %ld\\n", (long)DYNACUT_##name);
int main(void)
{
	SIZE(table) SIZE(site) SIZE(bank) SIZE(feature) SIZE(repair) SIZE(sigaction)
	FIELD(table, magic) FIELD(table, version) FIELD(table, generation) FIELD(table, size) FIELD(table, serial)
	FIELD(table, site_capacity) FIELD(table, feature_capacity) FIELD(table, heap_capacity)
	FIELD(table, repair_capacity) FIELD(table, repair_count) FIELD(table, features) FIELD(table, repairs)
	FIELD(table, counters) FIELD(table, heap) FIELD(table, sites) FIELD(table, bank) FIELD(table, observed)
	FIELD(table, previous) FIELD(table, input) FIELD(table, output) FIELD(table, slot_done)
	FIELD(table, user) FIELD(table, library) FIELD(table, library_digest) FIELD(table, library_path)
	FIELD(site, address) FIELD(site, argument) FIELD(site, counter) FIELD(site, bytes) FIELD(site, feature)
	FIELD(site, length) FIELD(site, size) FIELD(site, action)
	FIELD(bank, site_count) FIELD(bank, feature_count) FIELD(bank, heap_used) FIELD(bank, counter_count)
	FIELD(repair, kind) FIELD(repair, id) FIELD(repair, start_time)
	FIELD(sigaction, handler) FIELD(sigaction, flags) FIELD(sigaction, restorer) FIELD(sigaction, mask)
	NUMBER(CODE_SIZE) NUMBER(VERSION) NUMBER(SLOTS) NUMBER(SIGNALS)
	NUMBER(TERMINATE) NUMBER(REDIRECT) NUMBER(RETURN) NUMBER(SKIP) NUMBER(LEARN) NUMBER(HANDLER) NUMBER(EDIT)
	NUMBER(UNMAP) NUMBER(MAP)
}
"""


@pytest.fixture(scope="module")
def in_c(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    folder = tmp_path_factory.mktemp("layout")
    (folder / "layout.c").write_text(C_PROGRAM)
    subprocess.run(["gcc", "-I", HANDLERS, folder / "layout.c", "-o", folder / "layout"], check=True)
    lines = subprocess.run([folder / "layout"], check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}


@needs_gcc
def test_numbers_are_those_of_table_h(in_c: dict[str, int]) -> None:
    assert {name: in_c[name] for name in Action.__members__} == {action.name: action.value for action in Action}
    assert in_c["CODE_SIZE"] == table_module.CODE_SIZE
    assert in_c["VERSION"] == table_module.VERSION
    assert in_c["SLOTS"] == table_module.SLOT_COUNT
    assert in_c["feature"] == NAME_SIZE
    assert in_c["SIGNALS"] == 64


@needs_gcc
def test_offsets_are_those_of_table_h(in_c: dict[str, int]) -> None:
    assert in_c["table.version"] == table_module.VERSION_OFFSET
    assert in_c["table.generation"] == GENERATION_OFFSET
    assert in_c["table.repair_count"] == table_module.REPAIR_COUNT_OFFSET
    assert in_c["table.bank"] == table_module.BANKS_OFFSET
    assert in_c["table.observed"] == OBSERVED_OFFSET
    assert in_c["table.previous"] == PREVIOUS_OFFSET
    assert in_c["table.input"] == table_module.INPUT_OFFSET
    assert in_c["table.output"] == table_module.OUTPUT_OFFSET
    assert in_c["table.slot_done"] == table_module.SLOT_DONE_OFFSET
    assert in_c["table.user"] == table_module.USER_OFFSET
    assert in_c["table.library"] == table_module.LIBRARY_OFFSET
    assert in_c["table"] <= SMALL.features


@needs_gcc
def test_what_python_writes_is_what_c_reads(in_c: dict[str, int]) -> None:
    """Each field of a written table, found at the offset that C says."""
    memory = Memory()
    memory.write([Write(PREVIOUS_OFFSET, KernelAction(0x11, 0x22, 0x33, 0x44).pack())])
    memory.update(["one", "two"], [site(0x1000), TableSite(0x2000, "two", Action.SKIP, 0x77, 99, b"ab", b"\xcc\xcc")])
    memory.write(memory.table().repair_writes([Repair(RepairKind.SIGNAL_MASK, 12, 0x1122334455667788)]))
    memory.write(UserLibrary(KernelAction(0x55, 0x66, 0x77, 0x88), 0x99, b"\xaa" * 32, "/srv/handler.so").writes())
    data = memory.data

    def number(offset: int, size: int = 4) -> int:
        return int.from_bytes(data[offset : offset + size], "little")

    assert number(in_c["table.version"]) == 1
    assert number(in_c["table.generation"], 1) == 1
    assert number(in_c["table.size"], 8) == SMALL.size
    assert number(in_c["table.serial"]) == 1
    assert number(in_c["table.site_capacity"]) == 8
    assert number(in_c["table.feature_capacity"]) == FEATURE_CAPACITY
    assert number(in_c["table.heap_capacity"]) == 256
    assert number(in_c["table.repair_capacity"]) == REPAIR_CAPACITY
    assert number(in_c["table.repair_count"]) == 1
    heap = number(in_c["table.heap"])
    features = number(in_c["table.features"]) + FEATURE_CAPACITY * in_c["feature"]  # those of the second bank
    assert data[features + in_c["feature"] :][:4] == b"two\0"
    bank = in_c["table.bank"] + in_c["bank"]  # generation 1: the second one
    assert [number(bank + in_c[f"bank.{name}"]) for name in ("site_count", "feature_count")] == [2, 2]
    assert [number(bank + in_c[f"bank.{name}"]) for name in ("heap_used", "counter_count")] == [3, 3]
    second = number(in_c["table.sites"] + 4) + in_c["site"]
    assert number(second + in_c["site.address"], 8) == 0x2000
    assert number(second + in_c["site.argument"], 8) == 0x77
    assert number(second + in_c["site.counter"]) == 2, "counter 0 numbers the hits of blocks that learn"
    assert number(second + in_c["site.feature"]) == 1
    assert number(second + in_c["site.length"]) == 2
    assert number(second + in_c["site.size"]) == 99
    assert number(second + in_c["site.action"], 1) == Action.SKIP
    assert data[heap + number(second + in_c["site.bytes"]) :][:2] == b"ab"
    repair = number(in_c["table.repairs"])
    assert number(repair + in_c["repair.kind"]) == RepairKind.SIGNAL_MASK
    assert number(repair + in_c["repair.id"]) == 12
    assert number(repair + in_c["repair.start_time"], 8) == 0x1122334455667788
    order = ("handler", "flags", "restorer", "mask")
    for action, values in (("previous", [0x11, 0x22, 0x33, 0x44]), ("user", [0x55, 0x66, 0x77, 0x88])):
        assert [number(in_c[f"table.{action}"] + in_c[f"sigaction.{name}"], 8) for name in order] == values
    assert number(in_c["table.library"], 8) == 0x99
    assert data[in_c["table.library_digest"] :][:32] == b"\xaa" * 32
    assert data[in_c["table.library_path"] :][:16] == b"/srv/handler.so\0"


def test_the_parts_of_a_table_do_not_overlap() -> None:
    layout = Layout.for_contents(3000, 100_000)
    assert layout.site_capacity == 8192 and layout.heap_capacity == 262_144
    starts = [layout.features, layout.repairs, layout.counters, *layout.sites, layout.heap, layout.size]
    sizes = [2 * FEATURE_CAPACITY * NAME_SIZE, REPAIR_CAPACITY * 16, 8 * 8193, 40 * 8192, 40 * 8192, 262_144]
    assert all(start + size <= following for start, size, following in zip(starts, sizes, starts[1:], strict=False))
    assert layout.size % 4096 == 0


# Round trips.


@pytest.mark.parametrize("path", ["/srv/handler.so", "/srv/ü\udc80.so", ""])
def test_a_users_library_is_read_back(path: str) -> None:
    memory = Memory()
    library = UserLibrary(KernelAction(0x1234, 4), 0x1000, bytes(range(32)), path)
    memory.write(library.writes())
    assert memory.table().user == library
    memory.write(library.out_of_force().writes())
    assert memory.table().user == replace(library, action=KernelAction())
    assert not memory.table().user.is_in_force


def test_a_users_library_is_recorded_before_it_is_in_force_and_until_it_is_out_of_force() -> None:
    memory = Memory()
    library = UserLibrary(KernelAction(0x1234, 4), 0x1000, bytes(range(32)), "/srv/handler.so")
    for write in library.writes():
        assert not memory.table().user.is_in_force
        memory.write([write])
    assert memory.table().user == library
    first, *rest = library.out_of_force().writes()
    memory.write([first])
    assert memory.table().user == replace(library, action=KernelAction(0, 4))
    memory.write(rest)
    assert memory.table().user == library.out_of_force()


def test_a_long_path_is_shortened_to_its_end() -> None:
    memory = Memory()
    memory.write(UserLibrary(KernelAction(1), 1, bytes(32), "/" + "x" * 2000 + "/handler.so").writes())
    user = memory.table().user
    assert user.path.startswith("...x") and user.path.endswith("x/handler.so")
    assert len(user.path) == 1023


def test_an_empty_table_is_read_back() -> None:
    table = Memory().table()
    assert (table.features, table.sites, table.repairs, table.serial) == ((), (), (), 1)


def test_sites_features_and_actions_are_read_back() -> None:
    memory = Memory()
    sites = [
        edit(0x3000, "zwei", b"\x0f\x84", b"\x90\xe9"),
        site(0x1000, "one", Action.REDIRECT, argument=0xFFFF_FFFF_FFFF_FFFF),
        site(0x2000, "zwei", Action.LEARN, old=bytes(range(100))),
    ]
    memory.update(["one", "zwei"], sites)
    assert memory.table().features == ("one", "zwei")
    assert list(memory.table().sites) == [sites[1], sites[2], sites[0]]


def test_the_targets_own_action_is_the_observed_one_until_the_patcher_has_copied_it() -> None:
    memory = Memory()
    memory.write([Write(PREVIOUS_OFFSET, KernelAction(0x2222).pack())])
    assert memory.table().previous == KernelAction(0x2222)
    memory.write([Write(OBSERVED_OFFSET, KernelAction(0x1111, 4, 5, 6).pack())])
    assert memory.table().previous == KernelAction(0x1111, 4, 5, 6)


def test_hits_survive_for_sites_that_stay_and_are_zero_for_new_ones() -> None:
    memory = Memory()
    memory.update(["one"], [site(0x1000), site(0x2000)])
    memory.hit(0x1000, 7)
    memory.hit(0x2000, 9)
    memory.update(["one", "two"], [site(0x0800, "two"), site(0x2000)])
    assert [(each.address, each.hits) for each in memory.table().sites] == [(0x800, 0), (0x2000, 9)]
    memory.update(["one", "two"], [site(0x1000), site(0x2000)])
    assert [(each.address, each.hits) for each in memory.table().sites] == [(0x1000, 0), (0x2000, 9)]


def test_a_site_with_another_action_starts_its_hits_anew() -> None:
    memory = Memory()
    memory.update(["one"], [site(0x1000)])
    memory.hit(0x1000, 7)
    memory.update(["one"], [site(0x1000, action=Action.LEARN)])
    assert [each.hits for each in memory.table().sites] == [0]


def test_the_generation_wraps_after_a_byte() -> None:
    memory = Memory()
    for turn in range(600):
        sites = [site(0x1000), site(0x2000)][: 1 + turn % 2] if turn % 100 else []
        memory.update(["one"], sites)
        assert list(memory.table().sites) == sites


addresses = st.sampled_from([0x1000, 0x1010, 0x1020, 0x1030, 0x1040, 0x1050])
FEATURES = ("one", "two", "three")


@st.composite
def site_sets(draw: st.DrawFn) -> list[TableSite]:
    chosen = draw(st.lists(addresses, unique=True, max_size=6))
    sites = []
    for address in chosen:
        feature = draw(st.sampled_from(FEATURES))
        old = draw(st.sampled_from([b"\x55", b"\x41\x57", bytes(range(16))]))
        if draw(st.booleans()):
            sites.append(site(address, feature, draw(st.sampled_from([Action.TERMINATE, Action.LEARN])), old))
        else:
            sites.append(edit(address, feature, old, old[::-1] + b"" if len(old) > 1 else b"\x90"))
    return sites


@settings(max_examples=200, deadline=None)
@given(st.lists(site_sets(), min_size=1, max_size=5))
def test_any_sequence_of_contents_is_read_back(sequence: list[list[TableSite]]) -> None:
    memory = Memory()
    expected_hits: dict[TableSite, int] = {}
    for sites in sequence:
        try:
            memory.update(FEATURES, sites)
        except TableFullError:
            memory.update(FEATURES, [])  # as a move to an empty table
            memory.update(FEATURES, sites)
            expected_hits = {}
        table = memory.table()
        assert list(table.sites) == sorted(sites, key=lambda each: each.address)
        expected_hits = {each: expected_hits.get(each, 0) for each in sites}
        assert {each: each.hits for each in table.sites} == expected_hits
        counters = {placed.site.address: placed.counter for placed in table.placed}
        assert Table.counters_of(bytes(memory.data)) == counters
        for each in sites[::2]:
            memory.hit(each.address, 3)
            expected_hits[each] = 1 if each.action is Action.LEARN else expected_hits[each] + 3


def test_blocks_that_learn_tell_the_order_of_their_hits() -> None:
    memory = Memory()
    memory.update(["one"], [site(0x1000, action=Action.LEARN), site(0x2000, action=Action.LEARN), site(0x3000)])
    memory.hit(0x2000, 1)
    memory.hit(0x1000, 2)
    memory.hit(0x3000, 5)
    assert [(each.hits, each.order) for each in memory.table().sites] == [(1, 2), (1, 1), (5, 0)]


def test_counters_may_lie_in_shared_memory_behind_the_table() -> None:
    layout = Layout.of_capacities(8, 256, shared=True)
    assert layout.counters == layout.size and layout.total_size == layout.size + 4096
    memory = Memory(layout)
    memory.data += bytes(layout.total_size - layout.size)
    memory.update(["one"], [site(0x1000)])
    (placed,) = memory.table().placed
    struct.pack_into("<Q", memory.data, layout.counters + 8 * placed.counter, 9)
    assert [each.hits for each in memory.table().sites] == [9]
    with pytest.raises(TableError, match="cut off"):
        Table.parse(bytes(memory.data[: layout.size]), ADDRESS)


# Killed at any instant.


def check_every_instant(memory: Memory, writes: Sequence[Write]) -> None:
    """Cut anywhere, also amid a write: the table says what it said before; after the last write, something else."""
    before = contents(memory.table())
    for write in writes[:-1]:
        for end in sorted({0, len(write.data) // 3, len(write.data) // 2, len(write.data)}):
            memory.write([replace(write, data=write.data[:end])])
            assert contents(memory.table()) == before, f"changed by {end} bytes at {write.offset}"
    assert len(writes[-1].data) == 1 or writes[-1].offset == table_module.REPAIR_COUNT_OFFSET
    memory.write(writes[-1:])


A, B = [site(0x1000, old=b"\x41")], [site(0x2000, old=b"\x55")]


@settings(max_examples=300, deadline=None)
@given(st.lists(site_sets(), min_size=1, max_size=4))
@example([A, B])
def test_killed_amid_an_update_the_table_is_as_before(sequence: list[list[TableSite]]) -> None:
    memory = Memory()
    for sites in sequence:
        try:
            writes = list(memory.table().update(FEATURES, sites))
        except TableFullError:
            return
        check_every_instant(memory, writes)
        assert list(memory.table().sites) == sorted(sites, key=lambda each: each.address)
        for each in sites:
            memory.hit(each.address, 5)


def test_killed_amid_an_update_that_replaces_all_sites_their_old_bytes_are_as_before() -> None:
    """The one feature was enabled, and is disabled with other sites: nothing stays, and the heap starts anew."""
    memory = Memory()
    memory.update(["one"], A)
    for write in list(memory.table().update(["one"], B))[:-1]:
        memory.write([write])
    assert [each.old for each in memory.table().sites] == [b"\x41"]


def test_killed_amid_an_update_the_hits_of_sites_that_go_are_as_before() -> None:
    """The counter of a site that goes is zeroed for the one that comes, before the banks turn."""
    memory = Memory()
    memory.update(["one"], [site(0x1000), site(0x3000)])
    memory.hit(0x1000, 7)
    for write in list(memory.table().update(["one"], [site(0x2000), site(0x3000)]))[:-1]:
        memory.write([write])
    assert [each.hits for each in memory.table().sites] == [7, 0]


def test_killed_amid_an_update_the_names_of_features_are_as_before() -> None:
    memory = Memory()
    memory.update(["one"], A)
    for write in list(memory.table().update(["two"], [site(0x1000, "two")]))[:-1]:
        memory.write([write])
    assert memory.table().features == ("one",)


def test_killed_while_repairs_are_added_they_are_as_before() -> None:
    memory = Memory()
    repairs = [Repair(RepairKind.THREAD_MASK, 4711 + index, 100 + index) for index in range(5)]
    for count in range(1, 6):
        check_every_instant(memory, list(memory.table().repair_writes(repairs[:count])))
        assert memory.table().repairs == tuple(repairs[:count])
    check_every_instant(memory, list(memory.table().repair_writes(())))
    assert memory.table().repairs == ()


def test_features_may_change_their_places_while_a_site_stays() -> None:
    memory = Memory()
    memory.update(["one", "two"], [site(0x1000)])
    memory.hit(0x1000, 7)
    for names in (["two", "one"], ["one"], ["zero", "one", "two"]):
        check_every_instant(memory, list(memory.table().update(names, [site(0x1000)])))
        assert memory.table().features == tuple(names)
        assert [(each.feature, each.hits) for each in memory.table().sites] == [("one", 7)]


# Full.


def test_more_than_fits_is_refused() -> None:
    table = Memory().table()
    for features, sites in (
        (["one"], [site(0x1000 + index) for index in range(9)]),
        (["one"], [site(0x1000, old=bytes(257))]),
        (["one"], [edit(0x1000, "one", bytes(129), bytes(128) + b"\1")]),
        (["one"] + [f"f{index}" for index in range(FEATURE_CAPACITY)], [site(0x1000)]),
    ):
        with pytest.raises(TableFullError):
            list(table.update(features, sites))
    with pytest.raises(TableFullError):
        list(table.repair_writes([Repair(RepairKind.THREAD_MASK, 1, 1)] * (REPAIR_CAPACITY + 1)))


def test_as_much_as_fits_is_taken() -> None:
    memory = Memory()
    memory.update(["one"], [site(0x1000 + 32 * index, old=bytes(32)) for index in range(8)])
    assert len(memory.table().sites) == 8
    memory.write(memory.table().repair_writes([Repair(RepairKind.THREAD_MASK, 1, 1)] * REPAIR_CAPACITY))
    assert len(memory.table().repairs) == REPAIR_CAPACITY


def test_further_repairs_come_behind_those_on_record() -> None:
    memory = Memory()
    repairs = [Repair(RepairKind.THREAD_MASK, tid, 5, 1 << 4) for tid in range(4)]
    memory.write(memory.table().repair_writes(repairs[:1]))
    memory.write(memory.table().further_repair_writes([]))
    check_every_instant(memory, list(memory.table().further_repair_writes(repairs[1:])))
    assert memory.table().repairs == tuple(repairs)
    memory.write(memory.table().repair_writes(repairs[:1] * REPAIR_CAPACITY))
    with pytest.raises(TableFullError):
        list(memory.table().further_repair_writes(repairs[:1]))


def test_no_layout_is_larger_than_the_limits() -> None:
    assert Layout.for_contents(MAX_SITE_CAPACITY // 2, MAX_HEAP_CAPACITY // 2).site_capacity == MAX_SITE_CAPACITY
    for count, heap in ((MAX_SITE_CAPACITY // 2 + 1, 0), (0, MAX_HEAP_CAPACITY // 2 + 1)):
        with pytest.raises(TableFullError):
            Layout.for_contents(count, heap)


@pytest.mark.parametrize("name", ["", "x" * NAME_SIZE, "a\0b"])
def test_a_name_that_does_not_fit_is_a_bug_of_the_caller(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        list(Memory().table().update([name], []))


# Hostile.


def filled() -> Memory:
    memory = Memory()
    memory.update(["one", "two"], [site(0x1000), edit(0x1100, "two"), site(0x1200, "two", Action.LEARN, bytes(16))])
    memory.write(memory.table().repair_writes([Repair(RepairKind.THREAD_MASK, 1, 1)]))
    return memory


def sound_or_refused(data: bytes) -> None:
    """Either a table that holds together, or TableError: never anything else, and never much memory."""
    try:
        table = Table.parse(data, ADDRESS)
    except TableError as error:
        assert "\n" not in str(error)
        return
    assert len(data) >= table.layout.size
    end = 0
    for each in table.sites:
        assert end <= each.address and each.end < 1 << 64
        assert each.feature in table.features
        assert len(each.old) == len(each.new) > 0
        end = each.end


@pytest.mark.parametrize("start", [*range(0, 104, 4), *range(SMALL.sites[1], SMALL.sites[1] + 120, 4)])
def test_a_field_with_any_value_is_refused_or_harmless(start: int) -> None:
    data = bytes(filled().data)
    for value in (0, 1, 2, 3, 7, 0x7F, 0xFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 22, 1 << 28):
        sound_or_refused(data[:start] + struct.pack("<I", value) + data[start + 4 :])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(0, 2400), st.sampled_from([SMALL.sites[1], NAMES, SMALL.repairs, SMALL.heap])),
            st.binary(min_size=1, max_size=80),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_random_damage_is_refused_or_harmless(damages: list[tuple[int, bytes]]) -> None:
    memory = filled()
    memory.write(Write(offset, data) for offset, data in damages)
    sound_or_refused(bytes(memory.data))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_are_refused(data: bytes, with_magic: bool) -> None:
    if with_magic:
        data = (MAGIC + data).ljust(SMALL.size, data[:1] or b"\0")
    with pytest.raises(TableError):
        Table.parse(data, ADDRESS)


def test_a_truncated_table_is_refused_wherever_it_ends() -> None:
    data = bytes(filled().data)
    for size in [*range(200), *range(200, len(data), 4096), len(data) - 1]:
        with pytest.raises(TableError):
            Table.parse(data[:size], ADDRESS)
    assert Table.parse(data + bytes(4096), ADDRESS).features == ("one", "two")


def raw_table(records: Sequence[tuple[int, ...]], heap: int) -> bytes:
    """A table of one feature whose sites are just these records, as any program can write one."""
    memory = Memory(Layout.of_capacities(max(8, len(records)), max(heap, 256)))
    memory.update(["one"], [])
    layout, bank = memory.table().layout, memory.table().generation & 1
    memory.write(
        [
            Write(layout.sites[bank], b"".join(SITE.pack(*record) for record in records)),
            Write(BANKS_OFFSET + bank * BANK.size, BANK.pack(len(records), 1, heap, len(records) + 1)),
        ]
    )
    return bytes(memory.data)


def test_sites_do_not_share_saved_bytes() -> None:
    """Else some thousand sites of 64 KiB would name gigabytes."""
    one, other = (0x1000, 0, 1, 0, 0, 4, 4, 1), (0x2000, 0, 2, 4, 0, 4, 4, 1)
    assert len(Table.parse(raw_table([one, other], 8), ADDRESS).sites) == 2
    bomb = [(0x10000 * (index + 1), 0, index, 0, 0, 0xFFFF, 1, 1) for index in range(3000)]
    data = raw_table(bomb, 0xFFFF)
    tracemalloc.start()
    with pytest.raises(TableError, match="does not fit the table"):
        Table.parse(data, ADDRESS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_no_page_is_taken_away_twice() -> None:
    pages = [(PAGE_SIZE * (index + 1), PAGE_SIZE, index, 0, 0, 0, 0, Action.UNMAP) for index in range(3)]
    assert len(Table.parse(raw_table(pages, 0), ADDRESS).sites) == 3
    for bomb in (pages[:1] * 3, [(PAGE_SIZE, 2 * PAGE_SIZE, 0, 0, 0, 0, 0, Action.UNMAP), pages[1]]):
        with pytest.raises(TableError, match="does not fit the table"):
            Table.parse(raw_table(bomb, 0), ADDRESS)


def test_more_ranges_than_mappings_are_possible_are_refused() -> None:
    many = [(PAGE_SIZE * (index + 1), PAGE_SIZE, 0, 0, 0, 0, 0, Action.MAP) for index in range(MAX_RANGES + 1)]
    with pytest.raises(TableError, match="does not fit the table"):
        Table.parse(raw_table(many, 0), ADDRESS)


@pytest.mark.parametrize("number", [0, 65, 0xFFFF_FFFF])
def test_a_repair_of_a_signal_that_there_is_not_is_refused(number: int) -> None:
    memory = Memory()
    memory.write(memory.table().repair_writes([Repair(RepairKind.SIGNAL_MASK, 64, 0, 1 << 4)]))
    assert memory.table().repairs[0].id == 64
    memory.write(memory.table().repair_writes([Repair(RepairKind.SIGNAL_MASK, number, 0, 1 << 4)]))
    with pytest.raises(TableError, match=f"signal {number}, which there is not"):
        memory.table()


def test_large_counts_in_a_small_table_take_no_memory() -> None:
    data = bytearray(filled().data)
    for capacity in (MAX_SITE_CAPACITY, MAX_SITE_CAPACITY + 1, 0xFFFF_FFFF):
        struct.pack_into("<I", data, 28, capacity)
        for bank in (0, 1):
            struct.pack_into("<4I", data, table_module.BANKS_OFFSET + 16 * bank, capacity, 256, 256, capacity)
        tracemalloc.start()
        with pytest.raises(TableError):
            Table.parse(bytes(data), ADDRESS)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(data)
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("offset", "value", "problem"),
    [
        (8, 2, "version 2; this program knows version 1"),
        (28, 0, "capacities"),
        (28, MAX_SITE_CAPACITY + 1, "capacities"),
        (32, FEATURE_CAPACITY + 1, "capacities"),
        (36, MAX_HEAP_CAPACITY + 1, "capacities"),
        (40, REPAIR_CAPACITY - 1, "capacities"),
        (44, REPAIR_CAPACITY + 1, "capacities"),
        (28, 9, "do not lie where they should"),
        (16, 0, "do not lie where they should"),
        (48, 0, "do not lie where they should"),
        (64, SMALL.sites[0] + 40, "do not lie where they should"),
        (88, 9, "counts"),
        (92, FEATURE_CAPACITY + 1, "counts"),
        (96, 257, "counts"),
        (100, 10, "counts"),
        (92, 3, "name is not readable"),
        (92, 1, "does not fit the table"),
        (96, 1, "does not fit the table"),
        (100, 1, "does not fit the table"),
        (SMALL.sites[1] + 40, 0x0FFF, "does not fit the table"),
        (SMALL.sites[1] + 28, 0, "does not fit the table"),
        (SMALL.sites[1] + 28, 0x101, "does not fit the table"),
        (SMALL.sites[1] + 36, 8, "does not fit the table"),
        (SMALL.sites[1] + 36, 9, "does not fit the table"),
        (SMALL.sites[1] + 36, 10, "unknown action 10"),
        (SMALL.sites[1] + 36, 0, "unknown action 0"),
        (NAMES, 0xFF, "name is not readable"),
        (NAMES, 0x1B, "name is not readable"),
        (SMALL.repairs, 3, "unknown kind 3"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(offset: int, value: int, problem: str) -> None:
    data = filled().data
    struct.pack_into("<I", data, offset, value)
    with pytest.raises(TableError, match=problem):
        Table.parse(bytes(data), ADDRESS)
