"""Which code ran: covered blocks by module and offset, and their union, intersection and difference.

Blocks of one log can overlap (DynamoRIO starts a block at every address that is jumped to, even amid another block),
and the blocks of two logs need not begin at the same places. So the set operations are exact to the byte: a
difference holds the code that ran in one log and in none of the others, cut where it has to be.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from dynacut.shared.binary.blocks import BlockMap
from dynacut.shared.errors import DynacutError

UNKNOWN_PATH = "<unknown>"
"""What DynamoRIO calls a module without a name."""

_WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_NO_OFFSET_IS_THIS_HIGH = 1 << 72


def file_name(path: str) -> str:
    """Return the last part of a path, which may be a Windows path."""
    return re.split(r"[\\/]" if _WINDOWS_PATH.match(path) else "/", path)[-1]


@dataclass(frozen=True)
class CoveredModule:
    """The covered blocks of one module: offset relative to the load base → size in bytes, at least 1.

    The blocks are in the order of their first hits, where the source knows it. Operations keep the order of the
    module they are called on; what is new comes after it.
    """

    name: str
    path: str
    build_id: str | None
    blocks: Mapping[int, int]

    @classmethod
    def of(cls, path: str, blocks: Mapping[int, int], build_id: str | None = None) -> CoveredModule:
        """Return the module at path, named by the path's last part."""
        return cls(file_name(path), path, build_id, blocks)

    @property
    def count(self) -> int:
        """The number of blocks; overlapping ones count each."""
        return len(self.blocks)

    @cached_property
    def size_bytes(self) -> int:
        """The number of bytes covered; none counts twice."""
        return sum(end - start for start, end in _merged([self.blocks]))

    def union(self, *others: CoveredModule) -> CoveredModule:
        """Return what is covered here or in any other; of two blocks at one offset the longer is kept."""
        blocks = dict(self.blocks)
        for other in others:
            for offset, size in other.blocks.items():
                if blocks.get(offset, 0) < size:
                    blocks[offset] = size
        known = (module.build_id for module in (self, *others) if module.build_id is not None)
        return replace(self, blocks=blocks, build_id=next(known, None))

    def intersection(self, other: CoveredModule) -> CoveredModule:
        """Return the code that is covered in both."""
        return self._clipped(_merged([other.blocks]))

    def difference(self, *others: CoveredModule) -> CoveredModule:
        """Return the code that is covered here and in none of the others."""
        return self._clipped(_gaps(_merged([other.blocks for other in others])))

    def normalised(self, block_map: BlockMap) -> CoveredModule:
        """Return every block of the map that a covered block overlaps, as a whole.

        Covered bytes that are in no block of the map are left out. DynacutError if the build-ids show that the
        map is another module's.
        """
        build_id = block_map.elf.build_id
        if None not in (build_id, self.build_id) and build_id != self.build_id:
            raise DynacutError(
                f"the coverage of {self.path!r} is of build-id {self.build_id}, but {block_map.elf.path} is {build_id}",
                "record the coverage again, with the program that is to be changed",
            )
        starts, sizes = block_map.block_starts, block_map.block_sizes
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        blocks: dict[int, int] = {}
        for start, _ in _pieces(self.blocks, starts, ends):
            index = bisect_right(starts, start) - 1
            blocks[starts[index]] = sizes[index]
        return replace(self, blocks=blocks, build_id=build_id or self.build_id)

    def _clipped(self, ranges: Sequence[tuple[int, int]]) -> CoveredModule:
        starts = [start for start, _ in ranges]
        ends = [end for _, end in ranges]
        blocks: dict[int, int] = {}
        for start, end in _pieces(self.blocks, starts, ends):
            blocks[start] = max(blocks.get(start, 0), end - start)
        return replace(self, blocks=blocks)


@dataclass(frozen=True)
class Coverage:
    """The covered blocks of a run, or of several.

    Modules of two coverages are the same if their build-ids are known and equal; or else, unless both are known,
    if their paths are equal; or else if their file names are equal, and no other module of either has that name
    (a log made on another machine).
    """

    modules: tuple[CoveredModule, ...]

    @property
    def count(self) -> int:
        """The number of blocks of all modules."""
        return sum(module.count for module in self.modules)

    @property
    def size_bytes(self) -> int:
        """The number of bytes covered in all modules."""
        return sum(module.size_bytes for module in self.modules)

    def module(self, name_or_path: str) -> CoveredModule:
        """Return the module of that path or, if there is none, of that name; DynacutError if not exactly one fits."""
        found = [module for module in self.modules if module.path == name_or_path]
        found = found or [module for module in self.modules if module.name == name_or_path]
        if len(found) == 1:
            return found[0]
        if found:
            paths = ", ".join(repr(module.path) for module in found)
            raise DynacutError(f"the coverage has several modules {name_or_path!r}: {paths}", "name one by its path")
        named = ", ".join(repr(module.name) for module in self.modules if module.blocks) or "nothing"
        raise DynacutError(f"the coverage has no module {name_or_path!r}", f"it has blocks of {named}")

    def union(self, *others: Coverage) -> Coverage:
        """Return what is covered here or in any other."""
        modules = list(self.modules)
        for other in others:
            same = _same_modules(other.modules, modules)
            added = []
            for module, found in zip(other.modules, same, strict=True):
                if found:
                    index = next((index for index in found if modules[index].path == module.path), found[0])
                    modules[index] = modules[index].union(module)
                else:
                    added.append(module)
            modules += added
        return Coverage(tuple(modules))

    def intersection(self, other: Coverage) -> Coverage:
        """Return the code that is covered in both; modules that only one of them has are left out."""
        modules = []
        for module, found in zip(self.modules, _same_modules(self.modules, other.modules), strict=True):
            if found:
                first, *rest = (other.modules[index] for index in found)
                modules.append(module.intersection(first.union(*rest)))
        return Coverage(tuple(modules))

    def difference(self, *others: Coverage) -> Coverage:
        """Return the code that is covered here and in none of the others; modules stay, even without blocks."""
        same: list[list[CoveredModule]] = [[] for _ in self.modules]
        for other in others:
            for mine, found in zip(same, _same_modules(self.modules, other.modules), strict=True):
                mine += (other.modules[index] for index in found)
        return Coverage(tuple(module.difference(*mine) for module, mine in zip(self.modules, same, strict=True)))


def union_of_all(coverages: Iterable[Coverage]) -> Coverage:
    """All of them together; of none, nothing."""
    return Coverage(()).union(*coverages)


def _same_modules(modules: Sequence[CoveredModule], others: Sequence[CoveredModule]) -> list[list[int]]:
    """Return for each module the indexes of those others that are the same module; see Coverage."""
    by_build_id, by_path, by_name = defaultdict(list), defaultdict(list), defaultdict(list)
    for index, other in enumerate(others):
        if other.build_id is not None:
            by_build_id[other.build_id].append(index)
        if other.path not in ("", UNKNOWN_PATH):
            by_path[other.path].append(index)
            by_name[other.name].append(index)
    same = []
    for module in modules:
        found = by_build_id[module.build_id] if module.build_id is not None else []
        paths = (index for index in by_path[module.path] if not _contradict(module, others[index]))
        same.append(sorted({*found, *paths}))
    taken = {index for found in same for index in found}
    names = Counter(module.name for module in modules)
    for module, found in zip(modules, same, strict=True):
        alike = by_name[module.name]
        if found or not module.name or names[module.name] > 1 or len(alike) != 1 or alike[0] in taken:
            continue
        if not _contradict(module, others[alike[0]]):
            found.append(alike[0])
    return same


def _contradict(module: CoveredModule, other: CoveredModule) -> bool:
    return None not in (module.build_id, other.build_id) and module.build_id != other.build_id


def _merged(several: Iterable[Mapping[int, int]]) -> list[tuple[int, int]]:
    """Return the bytes that any of the blocks hold, as ascending ranges that do not touch; ends are exclusive."""
    ranges: list[tuple[int, int]] = []
    last = -1
    for start, size in sorted(block for blocks in several for block in blocks.items()):
        end = start + size
        if start > last:
            ranges.append((start, end))
            last = end
        elif end > last:
            ranges[-1] = (ranges[-1][0], end)
            last = end
    return ranges


def _gaps(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return what lies before, between and after ascending ranges."""
    edges = [0, *(edge for both in ranges for edge in both), _NO_OFFSET_IS_THIS_HIGH]
    return [both for both in zip(edges[::2], edges[1::2], strict=True) if both[0] < both[1]]


def _pieces(blocks: Mapping[int, int], starts: Sequence[int], ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the parts of blocks that lie inside ascending, disjoint ranges: each part's start and end.

    In the order of the blocks, and each part lies within one range. A range that lies in a block as a whole is
    yielded once, however many blocks hold it: else overlapping blocks of a hostile log would cost their product.
    """
    following = list(range(len(starts) + 1))  # of each range: itself, or nearer to the next one not yet yielded

    def pending(index: int) -> int:
        while following[index] != index:
            following[index] = index = following[following[index]]
        return index

    for block_start, size in blocks.items():
        block_end = block_start + size
        index = bisect_right(starts, block_start)
        if index and ends[index - 1] > block_start:
            yield block_start, min(block_end, ends[index - 1])
        index = pending(index)
        while index < len(starts) and starts[index] < block_end:
            if ends[index] > block_end:
                yield starts[index], block_end
                break
            yield starts[index], ends[index]
            following[index] = index + 1
            index = pending(index + 1)
