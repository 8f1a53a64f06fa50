"""Pointers to functions in a module's data, and the tables of equal records they are in.

Such as redis's commands: records of 216 bytes with the command's name and its function. A table is found from the
relocations alone: function pointers at equal distances.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property

from dynacut.shared.binary.dynamic import Dynamic
from dynacut.shared.binary.elf import ElfFile

MAX_RECORD = 1024
"""The longest record looked for, in bytes."""
_GAP = 8
"""So many records in a row may lack the function, if they have the other pointers."""

_WORD = re.compile(r"[A-Za-z_][\w.|:/-]{0,63}")


@dataclass(frozen=True)
class PointerTable:
    """Records of equal size (stride, in bytes) with a function pointer at the same position in each.

    places: module offsets of the pointers, ascending; functions: the entries they point at, in the same order.
    """

    stride: int
    places: tuple[int, ...]
    functions: tuple[int, ...]


class PointerTables:
    """All pointers in the data of one module, by the place they are stored at."""

    def __init__(self, elf: ElfFile, entries: frozenset[int]) -> None:
        """entries: where functions begin."""
        self._elf = elf
        self._entries = entries
        self._found: dict[int, PointerTable | None] = {}
        self._names_at: dict[PointerTable, int | None] = {}

    @cached_property
    def pointers(self) -> dict[int, int]:
        """What each relocated word points at, both as module offsets. DynacutError if a table is malformed.

        A program linked for a fixed address has no relocations: there, each aligned word in writable or
        read-only data that is the address of a loaded byte counts.
        """
        elf = self._elf
        found = {place: address for place, address, is_resolver in Dynamic(elf).own_addresses() if not is_resolver}
        if elf.is_fixed:
            low, high = elf.link_base, elf.link_base + max(s.offset + s.memory_size for s in elf.segments)
            for segment in (segment for segment in elf.segments if not segment.executable):
                start = segment.offset + -segment.offset % 8
                words = elf.view(start, max(0, segment.file_end - start) & -8).cast("Q")
                found.update((start + 8 * at, word - low) for at, word in enumerate(words) if low <= word < high)
        return found

    @cached_property
    def places_of(self) -> dict[int, tuple[int, ...]]:
        """Where each function's address is stored; places ascending."""
        found: dict[int, list[int]] = {}
        for place in self._places:
            found.setdefault(self.pointers[place], []).append(place)
        return {entry: tuple(places) for entry, places in found.items()}

    @cached_property
    def _places(self) -> list[int]:
        return sorted(place for place, value in self.pointers.items() if value in self._entries)

    @cached_property
    def _all_places(self) -> list[int]:
        return sorted(self.pointers)

    def table_at(self, place: int) -> PointerTable | None:
        """Return the table that the function pointer at a place belongs to: that with the most functions, or None.

        A record may have several: what is found for one of them says nothing about the others.
        """
        if place not in self._found:
            self._found[place] = self._find_table(place)
        return self._found[place]

    def _find_table(self, place: int) -> PointerTable | None:
        near = self._places[
            bisect_left(self._places, place - MAX_RECORD) : bisect_right(self._places, place + MAX_RECORD)
        ]
        best: tuple[int, ...] = ()
        best_stride = 0
        for stride in sorted({abs(other - place) for other in near} - {0}):
            run = self._run(place, stride)
            # A run of every second record is shorter than that of every record: the right stride wins.
            if len(run) > len(best):
                best, best_stride = run, stride
        best = self._alike(place, best, best_stride)
        if len(best) < 2:
            return None
        return PointerTable(best_stride, best, tuple(self.pointers[other] for other in best))

    def _run(self, place: int, stride: int) -> tuple[int, ...]:
        """Return the function pointers at places place + N * stride, without a break."""
        anchors = self._anchors(place, stride)
        found = [place]
        for step in (-stride, stride):
            at, gap = place + step, 0
            while gap <= _GAP:
                if self.pointers.get(at) in self._entries:
                    found.append(at)
                    gap = 0
                elif any(self._is_data(at + distance) for distance in anchors):
                    gap += 1
                else:
                    break
                at += step
        return tuple(sorted(found))

    def _alike(self, place: int, run: tuple[int, ...], stride: int) -> tuple[int, ...]:
        """Return the places of a run whose records have most of what nearly all of them have.

        A table may lie beside another one whose pointers happen to be at a multiple of the distance.
        """
        anchors = self._anchors(place, stride)
        usual = [one for one in anchors if sum(self._is_data(other + one) for other in run) > 0.8 * len(run)]
        return tuple(other for other in run if 2 * sum(self._is_data(other + one) for one in usual) >= len(usual))

    def _is_data(self, place: int) -> bool:
        """Whether a pointer to something else than a function is stored at a place."""
        return place in self.pointers and self.pointers[place] not in self._entries

    def _anchors(self, place: int, stride: int) -> list[int]:
        """Return where, relative to a function pointer, its record has its name and other pointers to data."""
        places = self._all_places
        around = places[bisect_right(places, place - stride) : bisect_left(places, place + stride)]
        return [at - place for at in around if self._is_data(at)]

    def name_beside(self, place: int, table: PointerTable | None = None) -> str | None:
        """Return the name in the record of a function pointer, such as redis's ``set`` for setCommand; None without.

        table: the table that the place is in, if known already.
        """
        table = table or self.table_at(place)
        if table is None:
            return None
        if table not in self._names_at:
            self._names_at[table] = self._name_distance(table)
        distance = self._names_at[table]
        return self._word_at(place + distance) if distance is not None else None

    def _name_distance(self, table: PointerTable) -> int | None:
        """Return where the names are, relative to the functions: where the most different words are."""
        words: dict[int, set[str]] = {}
        for distance in range(8 - table.stride, table.stride, 8):
            texts = {self._word_at(place + distance) for place in table.places} - {None}
            if 2 * len(texts) > len(table.places):
                words[distance] = {text for text in texts if text is not None}
        most = max(map(len, words.values()), default=0)
        # What comes after the function may be the next record's, and is taken only if nothing before it is a name.
        good = [distance for distance in words if 10 * len(words[distance]) >= 9 * most]
        return min(good, key=lambda distance: (distance > 0, -len(words[distance]), abs(distance)), default=None)

    def _word_at(self, place: int) -> str | None:
        text = self.text_at(self.pointers[place]) if place in self.pointers else None
        return text if text is not None and _WORD.fullmatch(text) else None

    def text_at(self, offset: int) -> str | None:
        """Return the printable C string at a module offset, up to 255 bytes, or None."""
        segment = self._elf.segment_at(offset)
        if segment is None or segment.executable or offset >= segment.file_end:
            return None
        data, end, _ = bytes(self._elf.view(offset, min(256, segment.file_end - offset))).partition(b"\0")
        if not end or not data or any((byte < 0x20 and byte not in b"\r\n\t") or byte > 0x7E for byte in data):
            return None
        return data.decode("ascii")
