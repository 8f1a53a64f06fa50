"""Reading many small pieces of a target's memory: page by page, as a call to the kernel for each piece adds up."""

from __future__ import annotations

from dynacut.shared.errors import DynacutError
from dynacut.shared.target import PAGE_SIZE, Target


class PageReader:
    """The memory of a target as it is when a page is first read from; for pieces that mostly ascend by address."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._start = -1
        self._page = b""

    def read(self, address: int, size: int) -> bytes:
        """Exactly size bytes at an address; DynacutError if they are not all mapped."""
        start = address & -PAGE_SIZE
        index = address - start
        if start != self._start:
            try:
                self._page = self._target.read(start, PAGE_SIZE)
            except DynacutError:
                return self._target.read(address, size)
            self._start = start
        if index + size > PAGE_SIZE:
            return self._target.read(address, size)
        return self._page[index : index + size]
