"""Finding and checking the sites of a plan in a target."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from dynacut.handlers.records import INT3
from dynacut.handlers.table import Action, TableSite
from dynacut.shared.added import Added, is_mapped
from dynacut.shared.binary.functions import FunctionRange
from dynacut.shared.code import Code, CodeOf, KnownFiles
from dynacut.shared.errors import DynacutError
from dynacut.shared.holes import idle_pages
from dynacut.shared.on_hit import OnHit
from dynacut.shared.plan import Plan, PlannedEdit, PlannedFeature, PlannedRemoval, PlannedSite, Scope
from dynacut.shared.restoring import SiteMemory
from dynacut.shared.sites import ABSOLUTE, Ask, Locator, Place
from dynacut.shared.target import PAGE_SIZE, Target

_APART = "a part of one that lies apart, with a frame on the stack"


class MisfitError(Exception):
    """One thing about a plan that does not fit the target."""


class Resolver:
    """Finds and checks the sites of one plan, and gathers the misfits."""

    def __init__(
        self,
        plan: Plan,
        target: Target,
        known_sites: Sequence[TableSite],
        *,
        has_library: bool,
        ask: Ask | None = None,
        known: KnownFiles | None = None,
    ) -> None:
        """ask: knows further names of functions and lines. known: what is known of files, to be added to."""
        self.misfits: list[str] = []
        self.advice = "nothing was changed; correct it, or make a plan anew for this build of the program"
        self._plan = plan
        self._target = target
        self._has_library = has_library
        self._codes = CodeOf(target, known)
        self._locator = Locator(self._codes, plan.modules, ask)
        self._known = sorted(known_sites, key=lambda site: site.address)
        self._known_starts = [site.address for site in self._known]

    def sites(self) -> list[TableSite]:
        """The table's entries for everything in the plan."""
        found = []
        for feature in self._plan.features:
            if feature.scope is Scope.PAGE and feature.on_hit.action is Action.LEARN:
                self.misfits.append(
                    f"feature {feature.name!r}: scope page cannot learn, the handler cannot map pages back; use block"
                )
                continue
            for site in feature.sites:
                try:
                    found.append(self._site(feature, site))
                except (MisfitError, DynacutError) as error:
                    self._misfit(error)
        for edit in self._plan.edits:
            try:
                found.append(self._edit(edit))
            except (MisfitError, DynacutError) as error:
                self._misfit(error)
        return found

    def removed_pages(self) -> list[TableSite]:
        """The table's entries for the pages of code that the plan unmaps: int3 goes there first, so none is in use."""
        found = []
        for removal in self._plan.removed:
            try:
                found += self._removal(removal)
            except (MisfitError, DynacutError) as error:
                self._misfit(error)
        return found

    def _removal(self, removal: PlannedRemoval) -> list[TableSite]:
        place = self._locator.locate(removal.at)
        start, end = place.address, place.address + removal.size
        if start % PAGE_SIZE:
            raise MisfitError(f"{place} is not where a page begins")
        self._check_code(place)
        segments = [segment for segment in place.code.elf.segments if segment.executable]
        if not any(one.offset <= place.offset and place.offset + removal.size <= one.file_end for one in segments):
            raise MisfitError(f"{place}: {removal.size} bytes reach beyond the code of {place.code.module.path}")
        if not self._holds_files_bytes(place.code, place.offset, place.offset + removal.size):
            return []
        ends = OnHit.parse("terminate")
        pages = [
            TableSite(page, removal.feature, ends.action, ends.argument, PAGE_SIZE, old, INT3 * PAGE_SIZE)
            for page in range(start, end, PAGE_SIZE)
            if (old := place.code.elf.read(page - place.code.module.base, PAGE_SIZE))
        ]
        return [TableSite.unmapped(start, removal.feature, removal.size), *pages]

    def added(self) -> list[Added]:
        """The memory that the plan adds, with its place found; what is there already is left out of problems."""
        found: list[Added] = []
        for planned in self._plan.added:
            try:
                is_absolute = ABSOLUTE.fullmatch(planned.at) is not None
                address = int(planned.at, 16) if is_absolute else self._locator.locate(planned.at).address
                added = Added(address, planned)
                if any(one.address < address + planned.size and address < one.end for one in found):
                    raise MisfitError(f"{planned.at}: the plan adds memory there twice")
                known = added.entry in self._known and is_mapped(self._target, added.entry)
                if not known and (problem := added.problem(self._target)):
                    raise MisfitError(f"{planned.at}: {problem}")
                found.append(added)
            except (MisfitError, DynacutError) as error:
                self._misfit(error)
        return found

    def idle_pages(self, wanted: Sequence[TableSite]) -> list[TableSite]:
        """The table's entries for the pages that features of scope page leave without code."""
        found = []
        for feature in self._plan.features:
            if feature.scope is not Scope.PAGE or self.misfits:
                continue
            by_code: dict[str, tuple[Code, list[tuple[int, int]]]] = {}
            for site in wanted:
                code = self._codes.containing(site.address)
                if site.feature == feature.name and code is not None:
                    base = code.module.base
                    blocks = by_code.setdefault(code.module.path, (code, []))[1]
                    blocks.append((site.address - base, site.end - base))
            for code, blocks in by_code.values():
                for start, end in idle_pages(code, blocks):
                    address = code.module.base + start
                    if self._holds_files_bytes(code, start, end):
                        found.append(TableSite.unmapped(address, feature.name, end - start))
        return found

    def _holds_files_bytes(self, code: Code, start: int, end: int) -> bool:
        """Whether pages can be had from the file again: nobody else has changed them, and it is still that file."""
        memory = self._target.read(code.module.base + start, end - start)
        if self._with_patches(code.module.base + start, memory) != code.elf.read(start, end - start):
            self.misfits.append(f"{code.module.name}+{start:#x}: somebody else has changed the page; use scope block")
            return False
        return True

    def check_replaced(self, before: Sequence[TableSite], wanted: Sequence[TableSite]) -> None:
        """A feature may be given other sites only while its present ones are not patched."""
        stay = set(wanted)
        memory = SiteMemory(self._target)
        for site in before:
            is_there = site.action is Action.MAP and is_mapped(self._target, site)
            is_patched = bool(site.old) and memory.found(site) not in (site.old, None)
            if site not in stay and (is_there or is_patched):
                self.misfits.append(
                    f"feature {site.feature!r} is disabled already, with other sites or another action; enable it first"
                )
                return

    def check_overlaps(self, sites: Sequence[TableSite]) -> None:
        """No byte may belong to two sites: their old bytes and actions would contradict each other."""
        known = {site.feature for site in self._known}
        for before, after in pairwise(site for site in sites if site.old):
            if after.address < before.end:
                there = sorted(known.intersection((before.feature, after.feature)).difference(self._plan.feature_names))
                self.misfits.append(
                    f"{self._codes.describe(after.address)} ({after.feature}) overlaps "
                    f"{self._codes.describe(before.address)} ({before.feature})"
                    + "".join(f"; feature {name!r} has it already: use that name, or undo first" for name in there)
                )

    def check_destinations(self, sites: Sequence[TableSite]) -> None:
        """A redirect into patched code would trap again, perhaps for ever."""
        starts = [site.address for site in sites]
        for site in sites:
            destination = {
                Action.REDIRECT: site.argument,
                Action.SKIP: site.address + site.argument,
            }.get(site.action)
            if destination is None:
                continue
            index = bisect_right(starts, destination) - 1
            if index >= 0 and sites[index].action != Action.EDIT and destination < sites[index].end:
                self.misfits.append(
                    f"{self._codes.describe(site.address)} ({site.feature}): it would go on at "
                    f"{self._codes.describe(destination)}, which is disabled itself"
                )

    def _misfit(self, error: MisfitError | DynacutError) -> None:
        if isinstance(error, DynacutError):
            self.misfits.append(error.problem)
            if error.advice:
                self.advice = error.advice
        else:
            self.misfits.append(str(error))

    def _site(self, feature: PlannedFeature, site: PlannedSite) -> TableSite:
        place = self._locator.locate(site.at)
        self._check_place(place)
        # Without a size, an entry stands for its first byte alone.
        size = site.size or (1 if feature.scope is Scope.ENTRY else place.code.block_size(place.offset))
        if size > 1:
            self._check_end(place, size)
        original = self._original(place, size, site.old)
        length = 1 if feature.scope is Scope.ENTRY else size
        if original[:1] == INT3:
            raise MisfitError(f"{place}: the program itself has an int3 there")
        if place.code.is_restartable(place.offset, place.offset + length):
            raise MisfitError(f"{place} lies in a restartable sequence (rseq), which the kernel aborts at each hit")
        return TableSite(
            address=place.address,
            feature=feature.name,
            action=feature.on_hit.action,
            argument=self._argument(place, feature.on_hit),
            size=size,
            old=original[:length],
            new=INT3 * length,
        )

    def _edit(self, edit: PlannedEdit) -> TableSite:
        place = self._locator.locate(edit.at)
        self._check_place(place)
        self._check_inside(place, len(edit.old))
        if edit.new[:1] == INT3:
            raise MisfitError(f"{place}: an edit to int3 has no action for its hits; make it a site of a feature")
        original = self._original(place, len(edit.old), edit.old)
        return TableSite(place.address, edit.feature, Action.EDIT, 0, len(original), original, edit.new)

    def _check_code(self, place: Place) -> None:
        """The place must lie in private, executable file memory."""
        module = place.code.module
        mapping = next((part for part in module.mappings if part.start <= place.address < part.end), None)
        if mapping is None or not mapping.executable:
            raise MisfitError(f"{place} is not in the code of {module.path}")
        if mapping.writable or not mapping.private:
            raise MisfitError(f"{place}: its mapping is writable or shared, what is there may change")

    def _check_place(self, place: Place) -> None:
        """The place must be certain to be the first byte of an instruction in private, executable file memory."""
        self._check_code(place)
        function = place.code.function_at(place.offset)
        if function is None:
            raise MisfitError(f"{place} lies outside known code: in no function that .eh_frame describes")
        if not place.code.is_boundary(place.offset):
            raise MisfitError(
                f"{place} is not the first byte of an instruction (function {function.start:#x}-{function.end:#x})"
            )

    def _check_inside(self, place: Place, size: int) -> FunctionRange:
        function = place.code.function_at(place.offset)
        assert function is not None
        if place.offset + size > function.end:
            raise MisfitError(f"{place}: {size} bytes reach beyond its function, which ends at {function.end:#x}")
        return function

    def _check_end(self, place: Place, size: int) -> None:
        end = place.offset + size
        if end < self._check_inside(place, size).end and not place.code.is_boundary(end):
            raise MisfitError(f"{place}: {size} bytes end in the midst of an instruction")

    def _original(self, place: Place, size: int, planned: bytes) -> bytes:
        """The bytes the file has there, once the plan and the target's memory agree with them."""
        original = place.code.elf.read(place.offset, size)
        in_file = place.code.elf.read(place.offset, len(planned))
        if in_file != planned:
            raise MisfitError(f"{place}: the plan says {planned.hex(' ')}, the file has {in_file.hex(' ')}")
        if not planned and not self._is_verified(place):
            raise MisfitError(f"{place}: the plan gives neither old bytes nor the build-id of the module")
        memory = self._target.read(place.address, size)
        expected = self._with_patches(place.address, memory)
        if expected != original:
            raise MisfitError(
                f"{place}: other bytes in memory than in the file: {_difference(expected, original)}; "
                "another tool has patched it"
            )
        return original

    def _is_verified(self, place: Place) -> bool:
        if not self._plan.modules:
            return True  # sites given by hand, for this very process
        build_id = place.code.elf.build_id
        return any(module.build_id == build_id for module in self._plan.modules.values() if module.build_id)

    def _with_patches(self, address: int, memory: bytes) -> bytes:
        """Memory with the bytes of known sites put back."""
        data = bytearray(memory)
        end = address + len(memory)
        index = max(0, bisect_right(self._known_starts, address) - 1)
        for site in self._known[index:]:
            if site.address >= end:
                break
            for position, (old, new) in enumerate(zip(site.old, site.new, strict=True), site.address - address):
                if 0 <= position < len(data) and data[position] == new:
                    data[position] = old
        return bytes(data)

    def _argument(self, place: Place, on_hit: OnHit) -> int:
        function = place.code.function_at(place.offset)
        assert function is not None
        match on_hit.action:
            case Action.REDIRECT:
                return self._destination(place, on_hit.destination)
            case Action.SKIP:
                offset = place.offset + on_hit.argument
                if not function.start <= offset < function.end or not place.code.is_boundary(offset):
                    raise MisfitError(f"{place}: skip={on_hit.argument} leads to no instruction of the same function")
            case Action.RETURN:
                if place.offset != function.start:
                    raise MisfitError(
                        f"{place}: return needs the entry of a function, its function begins at {function.start:#x}"
                    )
                if place.offset not in place.code.entries:
                    raise MisfitError(f"{place}: return needs the entry of a function, this is {_APART}")
                if self._target.has_shadow_stack:
                    raise MisfitError(f"{place}: return does not work in a process with a shadow stack")
            case Action.HANDLER if not self._has_library:
                raise MisfitError(f"{place}: the action handler needs a handler library; give it by --handler LIB.so")
        return on_hit.argument

    def _destination(self, place: Place, site: str) -> int:
        destination = self._locator.locate(site)
        self._check_place(destination)
        function = destination.code.function_at(destination.offset)
        same = destination.code is place.code and function == place.code.function_at(place.offset)
        if not same and destination.offset not in destination.code.entries:
            raise MisfitError(
                f"{place}: the redirect to {destination} leads into the midst of another function; only its entry "
                "has a known stack"
            )
        if not same and place.offset not in place.code.entries:
            raise MisfitError(
                f"{place}: a redirect to another function is possible only from a function's entry, where the stack is "
                "as after a call"
            )
        self._original(destination, 1, destination.code.elf.read(destination.offset, 1))
        return destination.address


def _difference(found: bytes, expected: bytes) -> str:
    index = next(index for index, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other)
    return f"{found[index : index + 4].hex(' ')} instead of {expected[index : index + 4].hex(' ')} at byte {index}"
