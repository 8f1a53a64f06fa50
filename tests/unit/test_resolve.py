"""From a plan to a patch set and back: what fits is switched off and on again, each misfit is refused and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sites import BASE, MemoryTarget, new_target
from test_table import Memory

from dynacut.handlers.table import Action, KernelAction, Layout, Table, TableSite, UserLibrary
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.library.library import Library
from dynacut.shared.memory import NewMemory
from dynacut.shared.on_hit import DIE_BY_SIGTRAP, OnHit
from dynacut.shared.patch_set import ByteEdit, HandlerChange, PatchSet
from dynacut.shared.plan import Plan, PlannedEdit, PlannedFeature, PlannedModule, PlannedSite, Scope
from dynacut.shared.plan_file import loads
from dynacut.shared.resolve import disable, disable_again, enable, install, undo
from dynacut.shared.target import PAGE_SIZE

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")


LIBRARY = Library(
    UserLibrary(KernelAction(0x1_0010), 0x1_0000, bytes(32), "/srv/handler.so"),
    (NewMemory(0x1_0000, PAGE_SIZE, 5, b""),),
    is_mapped=False,
    bound_to=(),
)


class Patched:
    """A target with its table, to which patch sets are applied as exactly as they are written."""

    def __init__(self) -> None:
        self.target: MemoryTarget = new_target()
        self.memory = Memory(Layout.of_capacities(64, 4096))
        self.handler = False

    @property
    def table(self) -> Table | None:
        return self.memory.table() if self.handler else None

    @property
    def state(self) -> tuple[object, ...]:
        table = self.table
        return self.target.everything, table and (table.features, table.sites), self.handler

    def apply(self, patches: PatchSet) -> None:
        for one, other in pairwise(patches.edits):
            assert one.end <= other.address, "edits ascend and do not overlap"
        for edit in patches.edits:
            assert len(edit.old) == len(edit.new)
            assert self.target.read(edit.address, len(edit.old)) == edit.old
            self.target.write(edit.address, edit.new)
        if patches.handler is HandlerChange.INSTALL:
            self.handler = True
        if self.handler:
            self.memory.update(patches.features, patches.sites)
        if patches.handler is HandlerChange.REMOVE:
            self.handler = False

    def disable(self, plan: Plan) -> PatchSet:
        patches = disable(plan, self.target, self.table)
        self.apply(patches)
        return patches

    def enable(self, *names: str) -> PatchSet:
        patches = enable(names, self.target, self.table)
        self.apply(patches)
        return patches

    def undo(self) -> PatchSet:
        patches = undo(self.target, self.table)
        self.apply(patches)
        return patches


@pytest.fixture
def patched() -> Patched:
    return Patched()


@pytest.fixture
def target() -> MemoryTarget:
    return new_target()


def feature(
    *sites: str | PlannedSite, name: str = "one", on_hit: str = "terminate", scope: Scope = Scope.ENTRY
) -> PlannedFeature:
    planned = tuple(site if isinstance(site, PlannedSite) else PlannedSite(site) for site in sites)
    return PlannedFeature(name, OnHit.parse(on_hit), scope, planned)


def plan(*features: PlannedFeature, edits: Sequence[PlannedEdit] = ()) -> Plan:
    return Plan("plan", features, tuple(edits))


def misfits(target: MemoryTarget, unfit: Plan, table: Table | None = None) -> list[str]:
    """What a plan is refused for, a line each; the target must not have been written to."""
    before = target.everything
    with pytest.raises(DynacutError) as caught:
        disable(unfit, target, table)
    error = caught.value
    assert error.status is ExitStatus.REFUSED
    assert target.everything == before
    lines = list(error.details) or [error.problem]
    assert all("\n" not in line for line in [error.problem, error.advice, *lines])
    return lines


def misfit(target: MemoryTarget, unfit: Plan, table: Table | None = None) -> str:
    (line,) = misfits(target, unfit, table)
    return line


# What was unloaded.


def test_a_feature_of_an_unloaded_module_is_put_back_without_an_edit(patched: Patched) -> None:
    patched.disable(plan(feature("extra")))
    patched.disable(plan(feature("alpha", name="two")))
    library = patched.target.modules[1]
    patched.target.modules = patched.target.modules[:1]
    for mapping in library.mappings:
        del patched.target._memory[mapping.start]
    table = patched.table
    assert table is not None
    with pytest.raises(DynacutError, match="'one' is of a module that is not loaded any more"):
        disable_again(["one"], patched.target, table)
    assert enable(["one"], patched.target, table).edits == ()
    assert [edit.address for edit in undo(patched.target, table).edits] == [patched.target.address("alpha")]
    patched.disable(plan(feature("beta")))  # the same name, for other sites
    patched.undo()
    assert patched.target.read(patched.target.address("alpha"), 1) == b"\x55"


# What the table says, where the program has changed it.


def forged(address: int, old: bytes, new: bytes) -> Table:
    """A table with one plain edit, as a program can write it over its own."""
    memory = Memory(Layout.of_capacities(64, 4096))
    memory.update(["one"], [TableSite(address, "one", Action.EDIT, 0, len(old), old, new)])
    return memory.table()


def test_bytes_that_are_not_the_files_are_never_written(target: MemoryTarget) -> None:
    before = target.everything
    alpha = target.address("alpha")
    data = next(part.start for part in target.modules[0].mappings if not part.executable)
    table = forged(alpha, b"\x0f\x05\x90", target.read(alpha, 3))
    assert undo(target, table).edits == enable(["one"], target, table).edits == ()
    table = forged(data, b"\x0f\x05\x90", target.read(data, 3))
    with pytest.raises(DynacutError, match="other bytes than expected") as caught:
        undo(target, table)
    assert caught.value.details == (f"{data:#x} (one): no code of a file is mapped there",)
    with pytest.raises(DynacutError, match="other bytes than expected"):
        enable(["one"], target, table)
    assert target.everything == before
    target.write(alpha, b"\x0f\x05\x90")
    with pytest.raises(DynacutError, match="does not fit its code"):
        disable_again(["one"], target, forged(alpha, b"\x0f\x05\x90", b"\x90\x0f\x05"))


def test_a_module_that_has_come_to_lie_at_a_site_is_left_alone(target: MemoryTarget) -> None:
    address = target.address("alpha")
    assert undo(target, forged(address, b"\x0f\x05", b"\xcc\xcc")).edits == ()
    target.write(address, b"\xcc\xcc")
    with pytest.raises(DynacutError, match="other bytes than expected") as caught:
        undo(target, forged(address, b"\x0f\x05", b"\xcc\xcc"))
    assert "the table says 0f 05 was there, the file has 55" in caught.value.details[0]


# What fits.


def test_an_entry_becomes_one_int3_with_all_the_table_needs(patched: Patched) -> None:
    alpha = patched.target.address("alpha")
    patches = patched.disable(plan(feature("alpha")))
    assert patches.edits == (ByteEdit(alpha, b"\x55", b"\xcc"),)
    assert patches.handler is HandlerChange.INSTALL
    assert patches.features == ("one",)
    assert patches.sites == (TableSite(alpha, "one", Action.TERMINATE, DIE_BY_SIGTRAP, 1, b"\x55", b"\xcc"),)
    assert (patches.before_features, patches.before_sites) == ((), ())


def test_a_block_is_overwritten_to_its_end(patched: Patched) -> None:
    alpha = patched.target.address("alpha")
    block = feature("alpha", PlannedSite("alpha+13", 5), scope=Scope.BLOCK)
    patches = patched.disable(plan(block))
    assert [(edit.address, len(edit.new)) for edit in patches.edits] == [(alpha, 13), (alpha + 13, 5)]
    assert patched.target.read(alpha, 18) == b"\xcc" * 18
    assert [site.size for site in patches.sites] == [13, 5]


def test_a_plain_edit_replaces_bytes(patched: Patched) -> None:
    change = PlannedEdit("alpha+11", b"\x74\x05", b"\xeb\x05", "always")
    patches = patched.disable(plan(edits=[change]))
    assert patched.target.read(patched.target.address("alpha") + 11, 2) == b"\xeb\x05"
    assert patches.features == ("always",)
    assert patches.sites[0].action is Action.EDIT
    assert patched.undo().edits == (patches.edits[0].inverse(),)


def test_an_edit_may_replace_a_part_of_an_instruction(patched: Patched) -> None:
    """As in the example of the design: 0f 84, two of the six bytes of a je; all threads are stopped meanwhile."""
    patched.disable(plan(edits=[PlannedEdit("alpha+11", b"\x74", b"\xeb")]))
    assert patched.target.read(patched.target.address("alpha") + 11, 2) == b"\xeb\x05"


@pytest.mark.parametrize(
    ("at", "on_hit", "action", "argument"),
    [
        ("alpha", "return=-3", Action.RETURN, (1 << 64) - 3),
        ("alpha+4", "skip=9", Action.SKIP, 9),
        ("alpha+4", "redirect=alpha+0x12", Action.REDIRECT, "alpha+18"),
        ("alpha", "redirect=main", Action.REDIRECT, "main"),
        ("alpha", "redirect=libextra!extra", Action.REDIRECT, "extra"),
        ("alpha", "learn", Action.LEARN, 0),
        ("alpha", "terminate=3", Action.TERMINATE, 3),
    ],
)
def test_each_action_is_in_the_table_with_its_argument(
    target: MemoryTarget, at: str, on_hit: str, action: Action, argument: int | str
) -> None:
    if isinstance(argument, str):
        symbol, _, offset = argument.partition("+")
        argument = target.address(symbol) + int(offset or 0)
    (site,) = disable(plan(feature(at, on_hit=on_hit)), target, None).sites
    assert (site.action, site.argument) == (action, argument)


def test_a_planned_file_is_resolved_by_build_id_and_old_bytes(target: MemoryTarget) -> None:
    text = f"""
        format = 1
        [module.program]
        build_id = "{ElfFile.open(target.modules[0].file).build_id}"
        [[feature]]
        name = "set"
        on_hit = "redirect=program+{target.offset("beta"):#x}"
        sites = [{{ at = "program+{target.offset("alpha"):#x}", size = 4, old = "55 48" }}]
    """
    (site,) = disable(loads(text), target, None).sites
    assert (site.address, site.size, site.old) == (target.address("alpha"), 4, b"\x55")


def test_what_is_disabled_already_is_left_alone(patched: Patched) -> None:
    patched.disable(plan(feature("alpha")))
    before = patched.state
    assert patched.disable(plan(feature("alpha"))).edits == ()
    assert patched.state == before


def test_a_feature_can_be_added_to_another(patched: Patched) -> None:
    patched.disable(plan(feature("alpha")))
    patches = patched.disable(plan(feature("server!beta", name="two")))
    assert len(patches.edits) == 1
    assert patches.features == ("one", "two")
    assert [site.feature for site in patches.sites] == ["one", "two"]


# Back.


def test_undo_leaves_everything_as_it_was(patched: Patched) -> None:
    before = patched.state
    patched.disable(plan(feature("alpha"), edits=[PlannedEdit("server!beta", b"\xb8\x05\0\0\0", b"\xb8\x06\0\0\0")]))
    assert patched.undo().handler is HandlerChange.REMOVE
    assert patched.state == before
    assert undo(patched.target, None) == PatchSet((), HandlerChange.KEEP, (), ())


def test_enable_puts_back_only_the_features_named_and_disable_again_takes_them_away(patched: Patched) -> None:
    alpha, beta = patched.target.address("alpha"), patched.target.address("beta")
    patched.disable(plan(feature("alpha"), feature("server!beta", name="two", scope=Scope.BLOCK)))
    disabled = patched.state
    patched.enable("two")
    assert patched.target.read(alpha, 1) == b"\xcc"
    assert patched.target.read(beta, 6) == b"\xb8\x05\x00\x00\x00\xc3"
    table = patched.table
    assert table is not None
    assert table.features == ("one", "two")
    again = disable_again(["two"], patched.target, table)
    assert again.handler is HandlerChange.INSTALL
    patched.apply(again)
    assert patched.state == disabled
    assert disable_again(["two"], patched.target, table).edits == ()


def test_an_unknown_feature_cannot_be_enabled(patched: Patched) -> None:
    with pytest.raises(DynacutError, match="no feature 'set'") as caught:
        enable(["set"], patched.target, None)
    assert "nothing is patched" in caught.value.advice
    patched.disable(plan(feature("alpha")))
    with pytest.raises(DynacutError, match="no feature 'set'") as caught:
        enable(["one", "set"], patched.target, patched.table)
    assert "it has one" in caught.value.advice


def test_half_written_sites_are_put_back_and_completed(patched: Patched) -> None:
    """A patcher was killed amid a block: some bytes are ours, the others the original."""
    alpha = patched.target.address("alpha")
    original = patched.target.everything
    patched.disable(plan(feature("alpha", scope=Scope.BLOCK)))
    disabled = patched.state
    patched.target.write(alpha + 4, b"\xb8\x01")
    table = patched.table
    assert table is not None
    patched.apply(disable_again(["one"], patched.target, table))
    assert patched.state == disabled
    patched.target.write(alpha + 1, b"\x48")
    patched.undo()
    assert patched.target.everything == original


def test_half_written_sites_are_completed_by_the_same_plan(patched: Patched) -> None:
    alpha = patched.target.address("alpha")
    block = plan(feature("alpha", scope=Scope.BLOCK))
    patched.disable(block)
    disabled = patched.state
    patched.target.write(alpha + 4, b"\xb8\x01")
    patches = disable(block, patched.target, patched.table)
    for edit in patches.edits:
        assert patched.target.read(edit.address, len(edit.old)) == edit.old, "old is what is there now"
        patched.target.write(edit.address, edit.new)
    assert patched.state == disabled


def test_bytes_that_somebody_else_wrote_are_not_overwritten(patched: Patched) -> None:
    alpha = patched.target.address("alpha")
    patched.disable(plan(feature("alpha")))
    patched.target.write(alpha, b"\x90")
    table = patched.table
    assert table is not None
    steps: tuple[Callable[[], PatchSet], ...] = (
        lambda: undo(patched.target, table),
        lambda: enable(["one"], patched.target, table),
        lambda: disable_again(["one"], patched.target, table),
    )
    for step in steps:
        with pytest.raises(DynacutError, match="other bytes than expected") as caught:
            step()
        assert f"{alpha:#x} (one): 90" in caught.value.details[0]
        assert "another tool" in caught.value.advice


PLACES = ("alpha", "alpha+4", "alpha+9", "alpha+13", "server!beta", "main", "extra")


@st.composite
def fitting_plans(draw: st.DrawFn) -> Plan:
    chosen = draw(st.lists(st.sampled_from(PLACES), unique=True, min_size=1, max_size=4))
    features = [
        feature(place, name=draw(st.sampled_from(["f1", "f2"])) + place, on_hit=draw(st.sampled_from(ACTIONS)))
        for place in chosen
    ]
    edits = [PlannedEdit("alpha+18", b"\x5d", b"\x58", "edited")] if draw(st.booleans()) else []
    return plan(*features, edits=edits)


ACTIONS = ("terminate", "terminate=0", "learn")


@settings(max_examples=60, deadline=None)
@given(st.lists(fitting_plans(), min_size=1, max_size=3), st.data())
def test_the_inverse_of_a_patch_set_takes_it_back_exactly(plans: list[Plan], data: st.DataObject) -> None:
    patched = Patched()
    original = patched.state
    states = []
    applied = []
    for each in plans:
        states.append(patched.state)
        try:
            applied.append(patched.disable(each))
        except DynacutError:
            states.pop()  # the same place by another feature: rightly refused
            continue
        if data.draw(st.booleans()):
            states.append(patched.state)
            applied.append(patched.enable(data.draw(st.sampled_from(each.feature_names))))
    disabled = patched.state
    undone = patched.undo()
    assert patched.state == original
    patched.apply(undone.inverse())
    assert patched.state == disabled
    for patches, before in zip(reversed(applied), reversed(states), strict=True):
        after = patched.state
        patched.apply(patches.inverse())
        assert patched.state == before
        assert patches.inverse().inverse() == patches or patches.handler is HandlerChange.INSTALL
        patched.apply(patches)
        assert patched.state == after
        patched.apply(patches.inverse())
    assert patched.state == original


def test_the_inverse_of_a_first_installation_removes_the_handler(patched: Patched) -> None:
    first = patched.disable(plan(feature("alpha")))
    second = patched.disable(plan(feature("server!beta", name="two")))
    assert first.inverse().handler is HandlerChange.REMOVE
    assert second.inverse().handler is HandlerChange.KEEP


# Misfits, in the order of shared/resolve.py.


def test_pages_cannot_be_learned(target: MemoryTarget) -> None:
    assert "'one': scope page cannot learn" in misfit(target, plan(feature("alpha", on_hit="learn", scope=Scope.PAGE)))


def test_scope_page_leaves_a_page_with_other_code(patched: Patched) -> None:
    patches = patched.disable(plan(feature("alpha", scope=Scope.PAGE)))
    assert patches.unmap == ()
    assert patches.edits[0].new == b"\xcc" * len(patches.edits[0].old)


def test_a_disabled_feature_is_not_given_other_sites_or_another_action(patched: Patched) -> None:
    patched.disable(plan(feature("alpha")))
    for other in (feature("server!beta"), feature("alpha", on_hit="learn")):
        line = misfit(patched.target, plan(other), patched.table)
        assert "'one' is disabled already" in line and "enable it first" in line
        assert disable(plan(feature("alpha", "server!beta")), patched.target, patched.table)
    patched.enable("one")
    patched.disable(plan(feature("server!beta", on_hit="learn")))
    assert patched.table is not None
    assert [site.address for site in patched.table.sites] == [patched.target.address("beta")]


def test_no_byte_may_belong_to_two_sites(patched: Patched) -> None:
    target = patched.target
    offset = target.offset("alpha")
    line = misfit(target, plan(feature("alpha", scope=Scope.BLOCK), feature("alpha+4", name="two")))
    assert line == f"server+{offset + 4:#x} (two) overlaps server+{offset:#x} (one)"
    assert "overlaps" in misfit(target, plan(feature("alpha", "alpha")))
    change = PlannedEdit("alpha+11", b"\x74\x05", b"\xeb\x05")
    assert "overlaps" in misfit(target, plan(feature(PlannedSite("alpha", 13), scope=Scope.BLOCK), edits=[change]))
    patched.disable(plan(feature("alpha")))
    assert "overlaps" in misfit(target, plan(feature("alpha", name="two")), patched.table)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (feature("alpha", on_hit="redirect=server!beta"), feature("server!beta", name="two")),
        (feature("alpha", on_hit="skip=4"), feature("alpha+4", name="two")),
        (feature("alpha+4", on_hit="redirect=alpha+0"), feature("alpha", name="two")),
        (feature("alpha", on_hit="redirect=alpha+9"), feature("alpha+4", name="two", scope=Scope.BLOCK)),
    ],
)
def test_no_hit_may_go_on_in_disabled_code(first: PlannedFeature, second: PlannedFeature) -> None:
    patched = Patched()
    assert "which is disabled itself" in misfit(patched.target, plan(first, second))
    for one, other in ((first, second), (second, first)):
        patched = Patched()
        patched.disable(plan(one))
        assert "which is disabled itself" in misfit(patched.target, plan(other), patched.table)


def test_a_redirect_to_itself_is_refused(target: MemoryTarget) -> None:
    assert "which is disabled itself" in misfit(target, plan(feature("alpha", on_hit="redirect=alpha")))


def test_a_redirect_into_code_that_an_edit_changed_is_allowed(target: MemoryTarget) -> None:
    change = PlannedEdit("server!beta", b"\xb8\x05\0\0\0", b"\xb8\x06\0\0\0", "edited")
    assert disable(plan(feature("alpha", on_hit="redirect=server!beta"), edits=[change]), target, None)


def test_data_is_not_code(target: MemoryTarget) -> None:
    data = target.address("counter")
    for site in (f"{data:#x}", "server+0", "server+0x7fffffffffffffff"):
        assert "is not in the code of" in misfit(target, plan(feature(site)))


def test_code_that_may_change_is_refused(target: MemoryTarget) -> None:
    for change in ({"writable": True}, {"private": False}):
        other = new_target()
        module = other.modules[0]
        mappings = tuple(replace(part, **change) if part.executable else part for part in module.mappings)  # type: ignore[arg-type]
        other.modules = (replace(module, mappings=mappings), *other.modules[1:])
        assert "writable or shared" in misfit(other, plan(feature("alpha")))
    assert disable(plan(feature("alpha")), target, None)


def test_code_that_eh_frame_does_not_describe_is_refused(target: MemoryTarget) -> None:
    line = misfit(target, plan(feature("undescribed")))
    assert f"server+{target.offset('undescribed'):#x}" in line and "outside known code" in line


def test_an_instructions_midst_is_refused(target: MemoryTarget) -> None:
    line = misfit(target, plan(feature("alpha+2")))
    start = target.offset("alpha")
    assert f"server+{start + 2:#x} is not the first byte of an instruction" in line
    assert f"{start:#x}-{start + 20:#x}" in line


def test_a_size_that_does_not_fit_is_refused(target: MemoryTarget) -> None:
    for scope in (Scope.ENTRY, Scope.BLOCK):
        line = misfit(target, plan(feature(PlannedSite("alpha", 21), scope=scope)))
        assert "21 bytes reach beyond its function" in line
        line = misfit(target, plan(feature(PlannedSite("alpha", 3), scope=scope)))
        assert "3 bytes end in the midst of an instruction" in line
    whole = feature(PlannedSite("alpha", 20), scope=Scope.BLOCK)
    assert len(disable(plan(whole), target, None).edits[0].new) == 20


def test_an_edit_beyond_its_function_is_refused(target: MemoryTarget) -> None:
    original = target.read(target.address("beta"), 7)
    line = misfit(target, plan(edits=[PlannedEdit("server!beta", original, bytes(7))]))
    assert "7 bytes reach beyond" in line


def test_other_old_bytes_than_in_the_file_are_refused(target: MemoryTarget) -> None:
    line = misfit(target, plan(feature(PlannedSite("alpha", 4, b"\x55\x90"))))
    assert "the plan says 55 90, the file has 55 48" in line
    line = misfit(target, plan(edits=[PlannedEdit("alpha+11", b"\x75\x05", b"\xeb\x05")]))
    assert "the plan says 75 05, the file has 74 05" in line


def test_a_plan_that_nothing_vouches_for_is_refused(target: MemoryTarget) -> None:
    module = {"server": PlannedModule("/usr/bin/server", None)}
    unsure = Plan("plan", (feature("server+" + hex(target.offset("alpha"))),), (), module)
    assert "neither old bytes nor the build-id" in misfit(target, unsure)


def test_a_site_in_another_module_than_the_one_with_the_build_id_is_not_vouched_for(target: MemoryTarget) -> None:
    build_id = ElfFile.open(target.modules[0].file).build_id
    unsure = Plan("plan", (feature("libextra!extra"),), (), {"server": PlannedModule("", build_id)})
    assert "neither old bytes nor the build-id" in misfit(target, unsure)


def test_code_that_another_tool_has_patched_is_refused(target: MemoryTarget) -> None:
    alpha = target.address("alpha")
    target.write(alpha + 1, b"\xe9\x00")
    line = misfit(target, plan(feature("alpha", scope=Scope.BLOCK)))
    assert "e9 00 e5 b8 instead of 48 89 e5 b8 at byte 1" in line and "another tool" in line
    target.write(alpha, b"\xcc")
    assert "at byte 0" in misfit(target, plan(feature("alpha")))


def test_a_redirect_to_code_that_another_tool_has_patched_is_refused(target: MemoryTarget) -> None:
    target.write(target.address("beta"), b"\xcc")
    assert "another tool" in misfit(target, plan(feature("alpha", on_hit="redirect=server!beta")))


def test_an_int3_of_the_program_itself_is_refused(target: MemoryTarget) -> None:
    assert "the program itself has an int3 there" in misfit(target, plan(feature("stopping+1")))


@pytest.mark.parametrize("count", [1, 3, 20, 26, 1000])
def test_a_skip_to_no_instruction_of_its_function_is_refused(target: MemoryTarget, count: int) -> None:
    line = misfit(target, plan(feature("alpha+1", on_hit=f"skip={count}")) if count != 3 else BAD_SKIP)
    assert "leads to no instruction of the same function" in line


BAD_SKIP = plan(feature("alpha+4", on_hit="skip=3"))


def test_return_needs_the_entry_of_a_function(target: MemoryTarget) -> None:
    line = misfit(target, plan(feature("alpha+1", on_hit="return=0")))
    assert f"its function begins at {target.offset('alpha'):#x}" in line


def test_return_is_refused_with_a_shadow_stack(target: MemoryTarget) -> None:
    target.has_shadow_stack = True
    assert "shadow stack" in misfit(target, plan(feature("alpha", on_hit="return=0")))


def test_the_action_handler_needs_a_library(target: MemoryTarget, patched: Patched) -> None:
    wanted = plan(feature("alpha", on_hit="handler"))
    assert "handler library" in misfit(target, wanted)
    patches = disable(wanted, target, None, LIBRARY)
    assert [site.action for site in patches.sites] == [Action.HANDLER]
    assert (patches.library, patches.changes, patches.handler) == (LIBRARY, True, HandlerChange.INSTALL)
    patched.disable(plan(feature("server!beta", name="other")))
    patched.memory.write(LIBRARY.record.writes())
    again = disable(wanted, patched.target, patched.table)
    assert (again.library, again.before_user) == (None, LIBRARY.record), "the one that is in force is meant"


def test_a_library_alone_changes_no_code(patched: Patched) -> None:
    alone = install(LIBRARY, None)
    assert (alone.edits, alone.features, alone.sites, alone.library) == ((), (), (), LIBRARY)
    assert alone.handler is HandlerChange.INSTALL and alone.changes and not alone.had_handler
    patched.disable(plan(feature("alpha")))
    patched.memory.write(LIBRARY.record.writes())
    mapped = replace(LIBRARY, is_mapped=True)
    again = install(mapped, patched.table)
    assert (again.library, again.changes, again.had_handler) == (None, False, True)
    assert again.features == ("one",)
    moved = replace(mapped, record=replace(mapped.record, action=KernelAction(0x1_0020)))
    assert install(moved, patched.table).library == moved
    undone = undo(patched.target, patched.table)
    assert undone.changes and undone.handler is HandlerChange.REMOVE
    assert alone.inverse().handler is HandlerChange.REMOVE
    assert again.inverse().handler is HandlerChange.KEEP


def test_redirects_that_do_not_fit_the_stack_are_refused(target: MemoryTarget) -> None:
    for at in ("alpha", "alpha+4"):
        line = misfit(target, plan(feature(at, on_hit="redirect=server!beta+5")))
        assert "into the midst of another function" in line
    line = misfit(target, plan(feature("alpha+4", on_hit="redirect=server!beta")))
    assert "only from a function's entry" in line


@pytest.mark.parametrize(
    ("destination", "problem"),
    [
        ("alpha+2", "not the first byte"),
        ("undescribed", "outside known code"),
        ("nowhere", "no function 'nowhere'"),
        ("0x10", "lies in no module"),
        ("server+0", "is not in the code"),
    ],
)
def test_a_redirect_must_lead_to_an_instruction(target: MemoryTarget, destination: str, problem: str) -> None:
    assert problem in misfit(target, plan(feature("alpha", on_hit=f"redirect={destination}")))


def test_all_misfits_are_named_at_once(target: MemoryTarget) -> None:
    unfit = plan(
        feature("alpha+2", "nowhere"),
        feature("stopping+1", name="two"),
        feature("alpha", name="three", on_hit="learn", scope=Scope.PAGE),
        edits=[PlannedEdit("alpha+11", b"\x75\x05", b"\xeb\x05")],
    )
    lines = misfits(target, unfit)
    expected = ("not the first byte", "no function 'nowhere'", "int3", "scope page", "the plan says 75 05")
    assert len(lines) == len(expected)
    assert all(part in line for part, line in zip(expected, lines, strict=True))
    with pytest.raises(DynacutError, match="the plan does not fit process 4711"):
        disable(unfit, target, None)


def test_very_many_misfits_are_counted(target: MemoryTarget) -> None:
    lines = misfits(target, plan(feature(*[f"server+{offset}" for offset in range(100)])))
    assert len(lines) == 41
    assert lines[-1] == "… and 60 more"


def test_a_build_id_that_is_not_there_is_named(target: MemoryTarget) -> None:
    unfit = Plan("plan", (feature("server+0x10"),), (), {"server": PlannedModule("", "ab" * 20)})
    assert "ab" * 20 in misfit(target, unfit)


def test_the_pages_of_the_target_are_read_not_loaded(target: MemoryTarget) -> None:
    disable(plan(feature("alpha")), target, None)
    assert target.written == set()
    assert BASE % PAGE_SIZE == 0
