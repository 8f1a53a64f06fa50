"""Some thousand mutated images, the same ones each time; `make fuzz` tries many more."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from image_builder import build_image, snapshot, write_incremental
from image_mutations import Mutant, Seed
from image_trial import limited_memory, try_image, try_mutant

from dynacut.handlers.table import Table
from dynacut.offline.change import change
from dynacut.offline.images.image import Image
from dynacut.shared import resolve
from dynacut.shared.errors import DynacutError
from dynacut.shared.on_hit import OnHit
from dynacut.shared.patch_set import PatchSet
from dynacut.shared.plan import Plan, PlannedFeature, PlannedSite, Scope
from dynacut.shared.target import Target

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")
COUNT = 40
BATCHES = 4
PLAN = Plan("fuzz", (PlannedFeature("alpha", OnHit.parse("terminate"), Scope.ENTRY, (PlannedSite("alpha"),)),))


def disable(target: Target, table: Table | None) -> PatchSet:
    return resolve.disable(PLAN, target, table)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """In memory where that is possible: much is written."""
    shared = Path("/dev/shm")
    with TemporaryDirectory(prefix="dynacut-test-", dir=shared if shared.is_dir() else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def seeds(folder: Path) -> list[Seed]:
    """An image of one dump and one of three, each also patched."""
    plain = [build_image().write(folder / "one"), write_incremental(folder / "three", build_image())]
    patched = []
    for path in plain:
        patched.append(path.with_name(f"{path.name}-patched"))
        with Image(path) as image:
            change(image, disable, patched[-1], dry_run=False, flat=False)
    return [Seed.of(path, PLAN) for path in (*plain, *patched)]


def test_the_seeds_themselves_are_accepted(seeds: list[Seed], folder: Path) -> None:
    assert [len(seed.tables) for seed in seeds] == [0, 0, 2, 2]
    for index, seed in enumerate(seeds):
        assert try_image(seed.directory, folder / f"tried-{index}", PLAN) == "changed and undone"


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(BATCHES))
def test_mutated_images_are_refused_or_read_as_they_are(seeds: list[Seed], folder: Path, batch: int) -> None:
    seed = seeds[batch % len(seeds)]
    before = snapshot(seed.directory)
    results: Counter[str] = Counter()
    with TemporaryDirectory(dir=folder) as name, limited_memory():
        for index in range(COUNT):
            results[try_mutant(seed, Path(name), f"{batch}:{index}").result] += 1
    assert snapshot(seed.directory) == before
    assert results["refused"] > COUNT // 10
    assert results["changed and undone"] > COUNT // 10


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(BATCHES))
def test_each_mutant_is_only_looked_at(seeds: list[Seed], folder: Path, batch: int) -> None:
    """Many more of them, as opening is where nearly all are refused."""
    seed = seeds[batch % len(seeds)]
    refused = 0
    with TemporaryDirectory(dir=folder) as name, limited_memory():
        for index in range(8 * COUNT):
            mutant = Mutant.of(seed, Path(name, str(index)), f"look:{batch}:{index}")
            try:
                Image(mutant.directory).close()
            except DynacutError as error:
                refused += 1
                assert error.problem.isprintable()
    assert 0 < refused < 8 * COUNT
