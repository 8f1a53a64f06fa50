"""What stands where a table says that code was changed, and the edits that put it back.

A table lies in memory that the program itself can write to. What it calls the old bytes of a site is believed only
where the mapped file has them: sites are made of nothing else (Resolver), so nothing else is ever to be put back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from dynacut.handlers.table import Action, TableSite
from dynacut.shared.errors import DynacutError
from dynacut.shared.page_reader import PageReader
from dynacut.shared.patch_set import ByteEdit
from dynacut.shared.target import Mapping, Target

_MAX_DETAILS = 40


class SiteMemory:
    """The memory of a target at the sites of its table."""

    def __init__(self, target: Target) -> None:
        self._reader = PageReader(target)
        self._mappings = target.mappings
        self._starts = [mapping.start for mapping in self._mappings]
        self._last: tuple[Mapping, ...] = ()
        self._modules = {part.start: module for module in target.modules for part in module.mappings}

    def parts(self, address: int, size: int) -> tuple[Mapping, ...]:
        """The mappings that hold some bytes, ascending; none if not all of them are mapped."""
        if self._last and self._last[0].start <= address and address + size <= self._last[0].end:
            return self._last[:1]  # sites mostly lie one behind the other
        found = []
        index = bisect_right(self._starts, address) - 1
        position = address
        while position < address + size:
            part = self._mappings[index] if 0 <= index < len(self._mappings) else None
            if part is None or not part.start <= position < part.end:
                return ()
            found.append(part)
            position = part.end
            index += 1
        self._last = tuple(found)
        return self._last

    def has_pages(self, removal: TableSite) -> bool:
        """Whether pages that an entry takes away are those of a file."""
        parts = self.parts(removal.address, removal.range_size)
        return bool(parts) and all(part.is_file and part.executable for part in parts)

    def found(self, site: TableSite) -> bytes | None:
        """The bytes at a site; None if its module is unloaded: nothing is mapped there, or memory of no file that does
        not hold what was written to the site.

        Raises:
            DynacutError: they are mapped but cannot be read.
        """
        parts = self.parts(site.address, len(site.old))
        if not parts:
            return None
        data = self._reader.read(site.address, len(site.old))
        return data if data == site.new or all(part.is_file for part in parts) else None

    def original(self, site: TableSite) -> bytes:
        """The bytes that the mapped file has at a site.

        Raises:
            DynacutError: the site is not in private code of a file, or the file cannot be read.
        """
        data = b""
        for part in self.parts(site.address, len(site.old)):
            module = self._modules.get(part.start)
            if module is None or not part.executable or not part.private:
                break
            start = max(site.address, part.start)
            position = part.file_offset + start - part.start
            data += module.elf.data[position : position + min(site.end, part.end) - start]
        if len(data) != len(site.old):
            raise DynacutError("no code of a file is mapped there")
        return data

    def is_original(self, site: TableSite, found: bytes) -> bool:
        """Whether what was found at a site is what the mapped file has there."""
        try:
            return self.original(site) == found
        except DynacutError:
            return False

    def foul(self, site: TableSite) -> str | None:
        """Why the old bytes of a site are not to be believed; None if they are the file's."""
        try:
            original = self.original(site)
        except DynacutError as error:
            return f"{site.address:#x} ({site.feature}): {error.problem}"
        if original == site.old:
            return None
        said, has = site.old[:8].hex(" "), original[:8].hex(" ")
        return f"{site.address:#x} ({site.feature}): the table says {said} was there, the file has {has}"


def restoring(target: Target, sites: Iterable[TableSite]) -> tuple[ByteEdit, ...]:
    """The edits that put the old bytes of sites back; none where they stand already, or the module is unloaded.

    Raises:
        DynacutError: the bytes at a site are neither old nor new, or the old ones are not the file's; every such site
            is named.
    """
    memory = SiteMemory(target)
    edits = []
    strange = []
    for site in sites:
        found = memory.found(site) if site.old else b""
        if found is None or found == site.old:
            continue
        if found == site.new or _is_mixed(site, found):
            problem = memory.foul(site)
        else:
            problem = f"{site.address:#x} ({site.feature}): {found[:8].hex(' ')}, neither ours nor the original"
        if problem is None:
            edits.append(ByteEdit(site.address, found, site.old))
        elif not memory.is_original(site, found):  # where it is, another module has come to lie there
            strange.append(problem)
    if strange:
        raise DynacutError(
            f"other bytes than expected in {target.label}",
            "another tool changed them: take its change back first",
            details=strange[:_MAX_DETAILS],
        )
    return tuple(edits)


def _is_mixed(site: TableSite, found: bytes) -> bool:
    """Whether each byte is an old or a new one: what a killed patcher had written."""
    return all(byte in (old, new) for byte, old, new in zip(found, site.old, site.new, strict=True))


def check_believable(target: Target, sites: Iterable[TableSite]) -> None:
    """Checks that sites are in code, with the old bytes that its file has.

    Raises:
        DynacutError: they are not; every such site is named.
    """
    memory = SiteMemory(target)
    if strange := [problem for site in sites if site.old and (problem := memory.foul(site))]:
        raise DynacutError(
            f"the table in {target.label} does not fit its code",
            "somebody else has changed one of them: restart the program",
            details=strange[:_MAX_DETAILS],
        )


def unloaded(target: Target, sites: Iterable[TableSite]) -> list[TableSite]:
    """Those of some sites whose module is not loaded any more. target: with its holes filled (holes.Patched)."""
    memory = SiteMemory(target)
    return [
        site
        for site in sites
        if (memory.found(site) is None if site.old else site.action is Action.UNMAP and not memory.has_pages(site))
    ]
