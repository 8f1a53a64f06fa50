"""What a refused image must and must not do, and images changed message by message, for tests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from image_builder import (
    ROOT_PID,
    snapshot,
)
from image_trial import limited_memory

from dynacut.offline.change import look
from dynacut.offline.images.files import ImageFolder, packed
from dynacut.offline.images.image import Image
from dynacut.offline.images.pages import PAGEMAP_MAGIC
from dynacut.offline.images.process import MM_MAGIC
from dynacut.offline.images.schema import Message, MmEntry, PagemapEntry, PagemapHead
from dynacut.shared.errors import DynacutError, ExitStatus

CORE, MM, PAGEMAP = (f"{kind}-{ROOT_PID}.img" for kind in ("core", "mm", "pagemap"))


def refused(path: Path) -> str:
    """Why an image is refused: at once, with little memory, in one line of print, and without a file left open."""
    open_before = os.listdir("/proc/self/fd")  # noqa: PTH208
    before = snapshot(path.parent)
    started = time.process_time()
    with limited_memory(), pytest.raises(DynacutError) as caught, Image(path) as image:
        look(image)
    assert time.process_time() - started < 1
    assert os.listdir("/proc/self/fd") == open_before  # noqa: PTH208
    assert snapshot(path.parent) == before
    error = caught.value
    assert error.status is ExitStatus.REFUSED
    assert error.problem.isprintable() and error.advice.isprintable() and error.advice
    return error.problem


def changed(path: Path, name: str, magic: int, change: Callable[[list[Message]], object], *kinds: Message) -> Path:
    """Rewrites a file of messages. kinds: of the first message and of all others."""
    folder = ImageFolder(path)
    with folder:
        data = list(folder.messages(name, magic))
    messages = [kinds[min(index, len(kinds) - 1)].FromString(part) for index, part in enumerate(data)]
    change(messages)
    (path / name).write_bytes(packed(magic, messages))
    return path


def with_vmas(path: Path, change: Callable[[Message], object]) -> Path:
    """Changes the VMAs of the root process."""
    return changed(path, MM, MM_MAGIC, lambda messages: change(messages[0].vmas), MmEntry)


def with_pagemap(path: Path, change: Callable[[list[Message]], object]) -> Path:
    """Changes the pagemap of the root process."""
    return changed(path, PAGEMAP, PAGEMAP_MAGIC, change, PagemapHead, PagemapEntry)
