"""Tries many mutated images and counts what came of them: `make fuzz`.

    python tests/fuzz_images.py --count 100000
    python tests/fuzz_images.py --count 5000 --seed-image IMAGE_DIR --disable setCommand

A failure names its key; `--only KEY` tries that mutant alone. Exit status 1 if there was a failure.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent / "unit"))

from image_builder import build_image, snapshot, write_incremental
from image_mutations import Seed
from image_trial import limited_memory, try_mutant

from dynacut.handlers.table import Table
from dynacut.offline.change import change
from dynacut.offline.images.image import Image
from dynacut.shared import resolve
from dynacut.shared.on_hit import OnHit
from dynacut.shared.patch_set import PatchSet
from dynacut.shared.plan import Plan, PlannedFeature, PlannedSite, Scope
from dynacut.shared.target import Target


def main() -> int:
    """Tries them, prints the figures."""
    arguments = _arguments()
    shared = Path("/dev/shm")  # in memory where that is possible: much is written
    place = arguments.folder or (shared if shared.is_dir() else None)
    with TemporaryDirectory(prefix="dynacut-fuzz-", dir=place) as name:
        folder = Path(name)
        plan = _plan(arguments.disable)
        seeds = [Seed.of(path, plan) for path in _seed_images(folder, arguments.seed_image, plan)]
        before = [_digest(seed.directory) for seed in seeds]
        keys = [arguments.only] if arguments.only else [f"{arguments.key}:{index}" for index in range(arguments.count)]
        started = time.perf_counter()
        results: Counter[str] = Counter()
        slowest = 0.0
        with multiprocessing.get_context("fork").Pool(arguments.jobs, _limit) as pool:
            for result, seconds in pool.imap_unordered(partial(_try, seeds, folder), keys, chunksize=20):
                results[result.partition("\n")[0]] += 1
                slowest = max(slowest, seconds)
                if "\n" in result:
                    print(result, file=sys.stderr, flush=True)
                if sys.stderr.isatty() and results.total() % 100 == 0:
                    print(f"\r{results.total():,}", end=" ", file=sys.stderr, flush=True)
        wall = time.perf_counter() - started
        assert before == [_digest(seed.directory) for seed in seeds], "a seed was changed"
    total = ", ".join(f"{count:,} {result}" for result, count in results.most_common())
    print(f"{len(keys):,} mutants of {len(seeds)} images: {total}; slowest {slowest:.2f} s, in all {wall:.0f} s")
    return int(any(result.startswith("failed") for result in results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Try many mutated images.")
    parser.add_argument("--count", type=int, default=100_000, help="how many (default: 100000)")
    parser.add_argument("--key", default="0", help="another key gives other mutants (default: 0)")
    parser.add_argument("--only", metavar="KEY", help="only this mutant")
    parser.add_argument("--seed-image", type=Path, metavar="DIR", help="mutate this image instead of built ones")
    parser.add_argument("--disable", nargs="+", default=["alpha"], metavar="SITE", help="what is disabled in them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes (default: all cores)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where mutants are made (default: /dev/shm)")
    return parser.parse_args()


def _plan(sites: list[str]) -> Plan:
    planned = tuple(PlannedSite(site) for site in sites)
    return Plan("fuzz", (PlannedFeature("feature", OnHit.parse("terminate"), Scope.ENTRY, planned),))


def _seed_images(folder: Path, given: Path | None, plan: Plan) -> Iterator[Path]:
    """One dump, several dumps, and each of them patched."""
    images = []
    if given is None:
        images.append(build_image().write(folder / "one"))
        images.append(write_incremental(folder / "three", build_image()))
    else:
        with Image(given) as image:
            _patch(image, folder / "flat", plan, flat=True)
        with Image(folder / "flat") as image:
            change(image, resolve.undo, folder / "one", dry_run=False, flat=True)
        images.append(folder / "one")
    for path in images:
        output = path.with_name(f"{path.name}-patched")
        with Image(path) as image:
            _patch(image, output, plan, flat=False)
        yield from (path, output)


def _patch(image: Image, output: Path, plan: Plan, *, flat: bool) -> None:
    def disable(target: Target, table: Table | None) -> PatchSet:
        return resolve.disable(plan, target, table)

    change(image, disable, output, dry_run=False, flat=flat)


def _limit() -> None:
    """In each worker: the limit holds until its end."""
    limited_memory().__enter__()


def _try(seeds: list[Seed], folder: Path, key: str) -> tuple[str, float]:
    seed = seeds[int(hashlib.sha256(key.encode()).hexdigest(), 16) % len(seeds)]
    with TemporaryDirectory(prefix="mutant-", dir=folder) as name:
        try:
            tried = try_mutant(seed, Path(name), key)
        except Exception:
            return f"failed\n{traceback.format_exc()}", 0.0
    return tried.result, tried.seconds


def _digest(directory: Path) -> str:
    return hashlib.sha256(repr(snapshot(directory)).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
