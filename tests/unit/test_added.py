"""Memory that plans add to an image: there, read back, and undone. What cannot be added or taken away is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from image_builder import ANONYMOUS, build_image, memory_of, snapshot
from test_sites import BASE

from dynacut.offline.change import change, look
from dynacut.offline.images.image import Image
from dynacut.shared import resolve
from dynacut.shared.errors import DynacutError
from dynacut.shared.patch_set import Resolve
from dynacut.shared.plan import Plan, PlannedMemory, PlannedRemoval
from dynacut.shared.region import find_region
from dynacut.shared.target import PAGE_SIZE

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")
KINDS = pytest.mark.parametrize("flat", [False, True], ids=["layer", "flat"])
PLACE = 0x1234_5000_0000


def disabling(*parts: PlannedMemory | PlannedRemoval) -> Resolve:
    """Resolves a plan with these."""
    added = tuple(part for part in parts if isinstance(part, PlannedMemory))
    removed = tuple(part for part in parts if isinstance(part, PlannedRemoval))
    plan = Plan("plan", added=added, removed=removed)
    return lambda target, table: resolve.disable(plan, target, table)


def written(image: Path, how: Resolve, output: Path, *, flat: bool) -> Path:
    with Image(image) as opened:
        change(opened, how, output, dry_run=False, flat=flat)
    return output


@KINDS
def test_memory_is_added_and_goes_again(tmp_path: Path, flat: bool) -> None:
    image = build_image().write(tmp_path / "image")
    before = snapshot(image)
    data = bytes(range(256)) * 20
    how = disabling(
        PlannedMemory(f"{PLACE:#x}", 3 * PAGE_SIZE, "rw-", data, "one"),
        PlannedMemory("server+0x100000", PAGE_SIZE, "r-x", b"\xc3", "one"),
    )
    changed = written(image, how, tmp_path / "changed", flat=flat)
    with Image(changed) as opened:
        for process, seen in zip(opened.processes, look(opened).processes, strict=True):
            assert process.read(PLACE, 3 * PAGE_SIZE) == data.ljust(3 * PAGE_SIZE, b"\0")
            assert process.read(BASE + 0x100000, 2) == b"\xc3\0"
            protections = {part.start: (part.readable, part.writable, part.executable) for part in process.mappings}
            assert protections[PLACE] == (True, True, False)
            assert protections[BASE + 0x100000] == (True, False, True)
            (feature,) = seen.features
            assert (feature.name, feature.state, feature.added_bytes) == ("one", "disabled", 4 * PAGE_SIZE)
    again = written(changed, how, tmp_path / "again", flat=flat)  # it is there: nothing to do
    undone = written(again, resolve.undo, tmp_path / "undone", flat=flat)
    enabled = written(changed, lambda *of: resolve.enable(["one"], *of), tmp_path / "enabled", flat=flat)
    with Image(image) as one, Image(undone) as other, Image(enabled) as third:
        for original, process, known in zip(one.processes, other.processes, third.processes, strict=True):
            ours = memory_of(original)
            assert {place: data for place, data in memory_of(process).items() if place in ours} == ours
            for each in (process, known):
                with pytest.raises(DynacutError):
                    each.read(PLACE, 1)
            found = find_region(known)
            assert found is not None and found.table is not None
            with pytest.raises(DynacutError, match="whose contents only its plan has"):
                resolve.disable_again(["one"], known, found.table)
    assert snapshot(image) == before


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        (PlannedMemory(f"{ANONYMOUS:#x}", PAGE_SIZE, "rw-", b""), "is not free"),
        (PlannedMemory("server+0x1000", PAGE_SIZE, "rw-", b""), "is not free: /"),
        (PlannedMemory(f"{PLACE + 8:#x}", PAGE_SIZE, "rw-", b""), "is no address for memory"),
        (PlannedMemory("0x1000", PAGE_SIZE, "rw-", b""), "is no address for memory"),
        (PlannedMemory(f"{(1 << 47) - PAGE_SIZE:#x}", 2 * PAGE_SIZE, "rw-", b""), "is no address for memory"),
        (PlannedMemory("nonsense", PAGE_SIZE, "rw-", b""), "nonsense"),
        (PlannedRemoval("server+0x1008", PAGE_SIZE), "is not where a page begins"),
        (PlannedRemoval("server", PAGE_SIZE), "server"),
        (PlannedRemoval("server+0x0", PAGE_SIZE), "is not in the code of"),
        (PlannedRemoval("server+0x1000", PAGE_SIZE), "reach beyond the code of"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, part: PlannedMemory | PlannedRemoval, problem: str) -> None:
    image = build_image().write(tmp_path / "image")
    with pytest.raises(DynacutError) as caught:
        written(image, disabling(part), tmp_path / "changed", flat=False)
    assert problem in "\n".join([caught.value.problem, *caught.value.details])
    assert not (tmp_path / "changed").exists()


def test_two_of_a_plan_may_not_overlap(tmp_path: Path) -> None:
    image = build_image().write(tmp_path / "image")
    how = disabling(
        PlannedMemory(f"{PLACE:#x}", 2 * PAGE_SIZE, "rw-", b""),
        PlannedMemory(f"{PLACE + PAGE_SIZE:#x}", PAGE_SIZE, "rw-", b""),
    )
    with pytest.raises(DynacutError, match="adds memory there twice"):
        written(image, how, tmp_path / "changed", flat=False)
