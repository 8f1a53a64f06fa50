"""Mutates image directories as accident and malice would, for the unit tests and for `make fuzz`."""

from __future__ import annotations

import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from image_builder import FILES_MAGIC, PSTREE_MAGIC

from dynacut.offline.images.files import IMAGE_MAGIC, packed
from dynacut.offline.images.image import Image
from dynacut.offline.images.pages import PAGEMAP_MAGIC
from dynacut.offline.images.process import MM_MAGIC
from dynacut.offline.images.schema import CoreEntry, FileEntry, Message, MmEntry, PagemapEntry, PagemapHead, PstreeEntry
from dynacut.offline.images.tree import CORE_MAGIC
from dynacut.shared.plan import Plan
from dynacut.shared.region import find_region
from dynacut.shared.target import PAGE_SIZE

_NUMBERS = (
    *(0, 1, 2, 4, 255, 4095, 4096, 4097, 1 << 16, 1 << 20, 1 << 22, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32),
    *(1 << 46, (1 << 47) - 4096, 1 << 47, 1 << 56, (1 << 62) + 4096, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096),
    (1 << 64) - 1,
)
_NAMES = (
    *(b"", b"\0", b"/", b"..", b"/../../etc/passwd", b"/dev/null", b"/proc/self/mem", b"/tmp", b"\xff\xfe", b"a\nb"),
    *(b"\x1b]0;title\x07\x1b[2J", b"/" * 5000, b"x" * 300, b"%s%n"),
)
_KINDS: dict[int, tuple[Message, Message]] = {
    PSTREE_MAGIC: (PstreeEntry, PstreeEntry),
    FILES_MAGIC: (FileEntry, FileEntry),
    CORE_MAGIC: (CoreEntry, CoreEntry),
    MM_MAGIC: (MmEntry, MmEntry),
    PAGEMAP_MAGIC: (PagemapHead, PagemapEntry),
}


@dataclass(frozen=True)
class Seed:
    """An image to mutate. tables: where its tables lie, the file of the pages with the offset in it."""

    directory: Path
    tables: tuple[tuple[str, int], ...]
    plan: Plan

    @classmethod
    def of(cls, directory: Path, plan: Plan) -> Seed:
        """Finds the tables."""
        tables = []
        with Image(directory) as image:
            for process in image.processes:
                found = find_region(process)
                if found is None:
                    continue
                pages, name = process.memory.pages, ""
                for extent in pages.within(found.region.table, found.region.table + PAGE_SIZE):
                    while extent.in_parent and pages.parent is not None:
                        name, pages = f"{name}parent/", pages.parent
                        (extent,) = pages.all_within(extent.start, extent.start + PAGE_SIZE)
                    tables.append((name + pages.pages_name, extent.offset))
        return cls(directory, tuple(tables), plan)


class Mutant:
    """A copy of a seed by hard links, of which some files are replaced."""

    def __init__(self, seed: Seed, directory: Path, dice: random.Random) -> None:
        self.seed = seed
        self.directory = directory.resolve()
        self.dice = dice
        shutil.copytree(seed.directory, directory, copy_function=os.link)  # parents become folders within
        self.names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*.img"))
        self.done: list[str] = []

    @classmethod
    def of(cls, seed: Seed, directory: Path, key: str) -> Mutant:
        """The mutant of a key, the same for each key."""
        mutant = cls(seed, directory, random.Random(key))
        mutant._mutate()
        return mutant

    def _mutate(self) -> None:
        """Does one mutation, sometimes several."""
        actions: Sequence[tuple[Callable[[], str], int]] = (
            (self._field, 12),
            (self._bits, 4),
            (self._cut, 2),
            (self._length, 2),
            (self._messages, 3),
            (self._swap, 1),
            (self._kind, 1),
            (self._parent, 1),
            (self._table, 6 if self.seed.tables else 0),
        )
        for _ in range(self.dice.choice((1, 1, 1, 2, 3))):
            (action,) = self.dice.choices([action for action, _ in actions], [weight for _, weight in actions])
            self.done.append(action())

    def _pick(self) -> str:
        """A file of metadata mostly: in the pages themselves, most bytes mean nothing."""
        folders = {name.rpartition("/")[0]: name for name in self.names}
        present = {folder for folder, name in folders.items() if self._is_here(name)}
        here = [name for name in self.names if name.rpartition("/")[0] in present]
        names = [name for name in here if not Path(name).name.startswith("pages-") or self.dice.random() < 0.2]
        return self.dice.choice(names or here)

    def _is_here(self, name: str) -> bool:
        """Whether a file still lies in the mutant: a mutation may have made a link of a folder above it."""
        folder = (self.directory / name).parent
        return folder.is_dir() and os.path.realpath(folder) == str(folder)

    def _read(self, name: str) -> bytearray:
        path = self.directory / name
        return bytearray(path.read_bytes()) if path.is_file() and not path.is_symlink() else bytearray()

    def _put(self, name: str, data: bytes | bytearray) -> None:
        assert self._is_here(name)
        path = self.directory / name
        self._remove(path)
        path.write_bytes(data)

    @staticmethod
    def _remove(path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _bits(self) -> str:
        name = self._pick()
        data = self._read(name)
        for _ in range(self.dice.choice((1, 1, 2, 8)) if data else 0):
            data[self.dice.randrange(len(data))] ^= 1 << self.dice.randrange(8)
        self._put(name, data)
        return f"bits of {name}"

    def _cut(self) -> str:
        name = self._pick()
        data = self._read(name)
        if self.dice.random() < 0.7:
            data = data[: self.dice.randrange(len(data) + 1)]
        else:
            data += self.dice.randbytes(self.dice.choice((1, 4, 8, 100, PAGE_SIZE)))
        self._put(name, data)
        return f"size of {name}: {len(data)}"

    def _length(self) -> str:
        """A length that lies."""
        name = self._pick()
        data = self._read(name)
        places = list(_message_places(data))
        if not places:
            return "nothing"
        place, size = self.dice.choice(places)
        lie = self.dice.choice((0, 1, size - 1, size + 1, 0x7FFFFFFF, 0xFFFFFFFF, len(data))) & 0xFFFFFFFF
        struct.pack_into("<I", data, place, lie)
        self._put(name, data)
        return f"length at {place} of {name}: {lie}"

    def _messages(self) -> str:
        """Duplicated, dropped, in another order."""
        name = self._pick()
        data = bytes(self._read(name))
        parts = [data[place : place + 4 + size] for place, size in _message_places(data)]
        if not parts:
            return "nothing"
        index = self.dice.randrange(len(parts))
        what = self.dice.choice(("doubled", "dropped", "shuffled", "many"))
        match what:
            case "doubled":
                parts.insert(self.dice.randrange(len(parts) + 1), parts[index])
            case "dropped":
                del parts[index]
            case "shuffled":
                self.dice.shuffle(parts)
            case "many":
                parts += [parts[index]] * 1000
        self._put(name, data[:8] + b"".join(parts))
        return f"message {index} of {name} {what}"

    def _field(self) -> str:
        """A field of a message set to a number or name that means trouble, or a submessage dropped or doubled."""
        name = self._pick()
        data = bytes(self._read(name))
        magic = int.from_bytes(data[4:8], "little")
        if magic not in _KINDS:
            return "nothing"
        first, others = _KINDS[magic]
        try:
            messages = [
                (others if index else first).FromString(data[place + 4 : place + 4 + size])
                for index, (place, size) in enumerate(_message_places(data))
            ]
        except DecodeError:  # because of a mutation before this one
            return "nothing"
        if not messages:
            return "nothing"
        what = _set_field(self.dice.choice(messages), self.dice)
        self._put(name, packed(magic, messages))
        return f"{what} in {name}"

    def _swap(self) -> str:
        one, other = self._pick(), self._pick()
        first, second = self._read(one), self._read(other)
        self._put(one, second)
        self._put(other, first)
        return f"{one} and {other} exchanged"

    def _kind(self) -> str:
        """Something else in a file's place."""
        name = self._pick()
        path = self.directory / name
        self._remove(path)
        kind = self.dice.choice(("missing", "link", "outside", "loop", "fifo", "directory", "empty"))
        match kind:
            case "link":
                path.symlink_to(self.seed.directory / name)
            case "outside":
                path.symlink_to("/etc/passwd")
            case "loop":
                path.symlink_to(path.name)
            case "fifo":
                os.mkfifo(path)
            case "directory":
                path.mkdir()
            case "empty":
                path.touch()
        return f"{name} is {kind}"

    def _parent(self) -> str:
        folders = [path for path in self.directory.rglob("*") if path.is_dir() and not path.is_symlink()]
        path = self.dice.choice([self.directory, *folders]) / "parent"
        self._remove(path)
        target = self.dice.choice((None, ".", "..", "/", "/etc", "nowhere", "parent", "../..", "./parent/parent", ""))
        if target:
            path.symlink_to(target)
        elif target is None:
            path.write_text("")
        return f"{path.relative_to(self.directory)} leads to {target!r}"

    def _table(self) -> str:
        """A word of a table's head, or a byte of it."""
        name, offset = self.dice.choice(self.seed.tables)
        if not self._is_here(name):
            return "nothing"
        data = self._read(name)
        end = min(len(data), offset + 6 * PAGE_SIZE)
        if offset + PAGE_SIZE > end:
            return "nothing"
        place = self.dice.randrange(offset, self.dice.choice((offset + 256, end - 8)))
        if self.dice.random() < 0.5:
            place &= -4
            number = self.dice.choice(_NUMBERS)
            size = self.dice.choice((4, 8))
            data[place : place + size] = (number & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        else:
            data[place] = self.dice.randrange(256)
        self._put(name, data)
        return f"table of {name} at {place - offset}"


def _message_places(data: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """The place of every message's length in an image file, with the length."""
    if len(data) < 8 or struct.unpack_from("<I", data)[0] != IMAGE_MAGIC:
        return
    position = 8
    while position + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, position)
        yield position, min(size, len(data) - position - 4)
        position += 4 + size


def _set_field(message: Message, dice: random.Random) -> str:
    """Changes one field of a message or of one within it."""
    field = dice.choice(message.DESCRIPTOR.fields)
    path = field.name
    value = getattr(message, path)
    is_list = hasattr(value, "append") or hasattr(value, "add")
    if field.message_type is not None and (not is_list or len(value)) and dice.random() < 0.85:
        part = dice.choice(value) if is_list else value
        return f"{path}.{_set_field(part, dice)}"
    if is_list:
        if len(value) and dice.random() < 0.5:
            index = dice.randrange(len(value))
            if dice.random() < 0.5 or field.message_type is not None:
                del value[index]
            else:
                value[index] = dice.choice(_NUMBERS) & 0xFFFFFFFF
        elif field.message_type is None:
            value.extend(number & 0xFFFFFFFF for number in dice.sample(_NUMBERS, dice.randrange(1, 5)))
        else:
            value.add().CopyFrom(value[0])
        return f"{path}[]"
    if field.message_type is not None or dice.random() < 0.15:
        message.ClearField(path)
        return f"{path} cleared"
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        setattr(message, path, dice.choice(_NAMES))
    elif field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        setattr(message, path, not value)
    else:
        bits = 64 if field.cpp_type in (FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_INT64) else 32
        near = (value + dice.choice((-PAGE_SIZE, -1, 1, PAGE_SIZE)), value ^ 1 << dice.randrange(bits))
        number = dice.choice((dice.choice(_NUMBERS), *near)) & ((1 << bits) - 1)
        is_signed = field.cpp_type == FieldDescriptor.CPPTYPE_INT64
        setattr(message, path, number - (1 << 64) if is_signed and number >> 63 else number)
    return f"{path}: {getattr(message, path)!r}"
