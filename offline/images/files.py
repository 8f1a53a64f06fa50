"""Image files on disk: opened within one folder only, with every length checked.

An image may come from elsewhere and be hostile: no link is followed but `parent`, which must stay beside or below the
image; sizes are bounded; whatever does not fit is a DynacutError.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from google.protobuf.message import DecodeError

from dynacut.offline.images.schema import Message
from dynacut.offline.images.wire import has_more_fields
from dynacut.shared.errors import DynacutError

IMAGE_MAGIC = 0x54564319
"""Of every image file but the inventory, CRIU's include/magic.h: IMG_COMMON_MAGIC."""
MAX_METADATA_SIZE = 256 << 20
MAX_PARENTS = 64
MAX_MESSAGES = 1 << 20
"""In one file, pagemaps apart; far more than a process tree has open files."""
_MAX_FIELDS = 1 << 19
"""In one message; more than a process has mappings (vm.max_map_count is 65,530, for databases 262,144)."""
_SMALL = 1 << 20
"""Bytes of a message that cannot cost much memory, whatever it holds."""
_WORD = struct.Struct("<I")
_ADVICE = "check that the directory holds a complete image of `criu dump`, or make a new one by `dynacut checkpoint`"


class ImageFolder:
    """One directory of image files, held open. Use as a context manager or close() it.

    above: the directories whose `parent` this is, to notice cycles.
    """

    def __init__(self, path: Path, above: Sequence[ImageFolder] = ()) -> None:
        """Opens the directory.

        Raises:
            DynacutError: it is not there, or no directory.
        """
        self.path = path
        self._above = above
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DynacutError(f"the image directory {path} cannot be opened: {reason}", _ADVICE) from None
        status = os.fstat(self.descriptor)
        self._identity = (status.st_dev, status.st_ino)

    def __enter__(self) -> ImageFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the directory."""
        os.close(self.descriptor)

    def names(self) -> list[str]:
        """The names of all its entries, sorted."""
        return sorted(os.listdir(self.descriptor))  # noqa: PTH208 - pathlib lists no descriptors

    def image_names(self) -> list[str]:
        """The files that make up the image: not CRIU's logs and statistics, which each restore writes anew.

        Raises:
            DynacutError: one of them is a link, or no regular file.
        """
        names = []
        with os.scandir(self.descriptor) as entries:
            for entry in entries:
                if entry.name.endswith(".img") or entry.name == "descriptors.json":
                    if not entry.is_file(follow_symlinks=False):
                        raise self.broken(entry.name, "not a regular file")
                    names.append(entry.name)
        return sorted(names)

    def open(self, name: str) -> int:
        """Opens a regular file for reading; the caller closes it.

        Raises:
            DynacutError: it is missing, a link, or no regular file.
        """
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.descriptor)
        except OSError as error:
            raise self.broken(name, error.strerror or str(error)) from None
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise self.broken(name, "not a regular file")
        return file

    def has(self, name: str) -> bool:
        """Whether there is an entry of that name."""
        try:
            os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except OSError:
            return False
        return True

    def read(self, name: str) -> bytes:
        """The whole contents of a metadata file.

        Raises:
            DynacutError: it cannot be read, or is larger than any such file.
        """
        with os.fdopen(self.open(name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_METADATA_SIZE:
                raise self.broken(name, f"larger than {MAX_METADATA_SIZE >> 20} MiB")
            return file.read(size)  # a larger size would be allocated first

    def messages(self, name: str, magic: int, limit: int = MAX_MESSAGES) -> Iterator[bytes]:
        """The messages of an image file, not yet parsed.

        Raises:
            DynacutError: it is not an image file of this type, cut off, or has more messages than the limit.
        """
        data = self.read(name)
        for start, end in self._places(name, data, magic, limit):
            yield data[start:end]

    def framed_messages(self, name: str, magic: int, limit: int) -> tuple[bytes, array[int]]:
        """The contents of an image file, and where in it each message begins with its length; last, where they end.

        Raises:
            DynacutError: as messages().
        """
        data = self.read(name)
        starts = array("Q", (start - 4 for start, _ in self._places(name, data, magic, limit)))
        starts.append(len(data))
        return data, starts

    def _places(self, name: str, data: bytes, magic: int, limit: int) -> Iterator[tuple[int, int]]:
        """Where each message begins and ends, its length left out."""
        if len(data) < 8 or struct.unpack_from("<II", data) != (IMAGE_MAGIC, magic):
            raise self.broken(name, "its magic number is not that of such an image")
        position, end, count = 8, len(data), 0
        while position < end:
            count += 1
            if count > limit:
                raise self.broken(name, f"more than {limit} message{'s' if limit > 1 else ''}")
            if position + 4 > end:
                raise self.broken(name, "it is cut off")
            (length,) = _WORD.unpack_from(data, position)
            position += 4
            if length > end - position:
                raise self.broken(name, f"a message of {length} bytes at {position:#x} does not end in the file")
            yield position, position + length
            position += length

    def parse(self, name: str, magic: int, kind: Message) -> list[Message]:
        """The messages of an image file, all of one kind."""
        every = list(self.messages(name, magic))  # so that too many are noticed before they are decoded
        return [self.decode(name, kind, data) for data in every]

    def parse_one(self, name: str, magic: int, kind: Message, within: int | None = None) -> Message:
        """The message of an image file that has just one. within: the field of a message in it, counted like it."""
        data = list(self.messages(name, magic, 1))
        if not data:
            raise self.broken(name, "there is no message in it")
        try:
            if len(data[0]) > _SMALL and has_more_fields(data[0], _MAX_FIELDS, within):
                raise self.broken(name, f"a message with more than {_MAX_FIELDS} fields")
        except ValueError:
            raise self._not_decoded(name) from None
        return self.decode(name, kind, data[0])

    def decode(self, name: str, kind: Message, data: bytes) -> Message:
        """One message.

        Raises:
            DynacutError: the bytes are no such message.
        """
        try:
            return kind.FromString(data)
        except (DecodeError, ValueError):
            raise self._not_decoded(name) from None

    def _not_decoded(self, name: str) -> DynacutError:
        return self.broken(name, "a message in it cannot be decoded")

    def parent(self) -> ImageFolder | None:
        """The directory that pages marked as its parent's are in; None if there is none.

        Raises:
            DynacutError: the link leads to nowhere, out of the folder that the image lies in, or in a circle.
        """
        try:
            status = os.stat("parent", dir_fd=self.descriptor, follow_symlinks=False)
        except OSError:
            return None
        path = self.path / "parent"
        if stat.S_ISLNK(status.st_mode):
            target = Path(os.path.realpath(path))
            home = Path(os.path.realpath(self.path)).parent
            if not target.is_relative_to(home):
                raise self.broken("parent", f"the link leads out of {home}")
            path = target
        elif not stat.S_ISDIR(status.st_mode):
            raise self.broken("parent", "neither a directory nor a link to one")
        chain = [*self._above, self]
        folder = ImageFolder(path, chain)
        if len(chain) > MAX_PARENTS or any(folder._identity == other._identity for other in chain):
            folder.close()
            raise self.broken("parent", "the chain of parents never ends")
        return folder

    def broken(self, name: str, problem: str) -> DynacutError:
        """The error for a file of this directory."""
        return DynacutError(f"{self.path / name}: {problem}", _ADVICE)


def packed(magic: int, messages: Sequence[Message | bytes]) -> bytes:
    """The contents of an image file with these messages, as such or serialized."""
    return b"".join([struct.pack("<II", IMAGE_MAGIC, magic), *map(framed, messages)])


def framed(message: Message | bytes) -> bytes:
    """A message, as such or serialized, with its length before it."""
    data = message if isinstance(message, bytes) else message.SerializeToString()
    return _WORD.pack(len(data)) + data


def copy_range(source: int, output: int, offset: int, size: int) -> int:
    """Copies part of a file to where another one is being written, sharing the storage where the file system can.

    source, output: descriptors. What has never been written to stays so (SEEK_DATA in lseek(2)). Returns the number of
    bytes; fewer at the file's end.

    Raises:
        OSError: the output cannot be written, or the source not read.
    """
    done = 0
    while done < size:
        start, stop = _data(source, offset + done, offset + size)
        if start > offset + done:
            os.ftruncate(output, os.lseek(output, start - offset - done, os.SEEK_CUR))
            done = start - offset
        elif count := _copy_some(source, output, start, stop - start):
            done += count
        else:
            break
    return done


def _data(source: int, start: int, end: int) -> tuple[int, int]:
    """The first run of bytes in a part of a file that was written to; empty at the end if none was."""
    size = os.fstat(source).st_size
    try:
        first = os.lseek(source, start, os.SEEK_DATA)
        return min(first, end), min(os.lseek(source, first, os.SEEK_HOLE), end)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return min(max(start, size), end), end  # nothing but a hole up to the file's end


def _copy_some(source: int, output: int, offset: int, size: int) -> int:
    try:
        return os.copy_file_range(source, output, size, offset)
    except OSError as error:
        # copy_file_range(2): to another file system, or one that does not know the call.
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return os.sendfile(output, source, offset, size)
