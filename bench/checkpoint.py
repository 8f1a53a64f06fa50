"""The way by a checkpoint on redis-servers of several sizes: dump, rewriting with 40 sites, restore.

Rewriting as a layer, as dynacut does it; as a flat copy; and by crit, which turns image files into JSON and back.
"""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.crit import Edit, has_crit
from bench.figures import DYNACUT, Case, Claim, Figures, Result, Table, case, number, spread
from bench.machine import Cores
from bench.programs import BenchmarkError
from bench.tools import DYNACUT as COMMAND
from bench.tools import write_plan
from dynacut.handlers.table import Table as HandlerTable
from dynacut.offline import processes
from dynacut.offline.change import change
from dynacut.offline.checkpoint import checkpoint
from dynacut.offline.images.image import Image
from dynacut.offline.restore import restore
from dynacut.shared import resolve
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.errors import DynacutError
from dynacut.shared.patch_set import PatchSet
from dynacut.shared.plan import Plan
from dynacut.shared.plan_file import load
from dynacut.shared.target import Target
from tests.integration.servers import Redis, ServerFailed, ServerMissing

SITES = 40
REWRITE_LIMIT_MS = 10
WRITTEN_LIMIT = 300_000
RESTORE_RATIO = 1.15
KINDS = ("image", "layer", "flat")
CRIT, CRIT_AT_ONCE = "crit", "crit, in one run"
_EXECUTABLE = Path("/usr/bin/redis-server")
_VALUE = 4096
_KEYS = {"5 MB": 0, "200 MB": 38_000, "1 GB": 195_000}
"""How many values each redis holds: so that its image has about this size."""
_RESTORES = {"5 MB": 7, "200 MB": 3, "1 GB": 1}
"""Rounds of restores of each image: a short one needs more, to be told from what else the machine does."""
_REWRITES, _FLAT_REWRITES = 5, 2
_SLOW_REPETITIONS = 5


def run(cores: Cores, folder: Path, repeat: int, *, quick: bool, progress: Callable[[str], None]) -> Result:
    """A fresh redis for each repetition of each size; what is dumped once is rewritten and restored in every way."""
    del cores
    figures = Figures("checkpoint")
    sizes = ["5 MB", "200 MB"] if quick else list(_KEYS)
    try:
        plan = _plan(folder / "plan.toml")
        processes.become_subreaper()
        for repetition in range(repeat):
            for size in sizes:
                if size == "1 GB" and repetition >= _SLOW_REPETITIONS:
                    continue
                progress(f"checkpoint: repetition {repetition + 1} of {repeat}, {size}")
                work = folder / "work"
                work.mkdir()
                try:
                    _measure(figures, case(size=size), _KEYS[size], plan, folder / "plan.toml", work)
                finally:
                    shutil.rmtree(work)
    except (ServerMissing, ServerFailed, DynacutError) as error:
        raise BenchmarkError(str(error)) from None
    return Result(
        figures, [_sizes(figures, sizes), _rewriting(figures, sizes), _restores(figures, sizes)], _claims(figures)
    )


def _plan(path: Path) -> Plan:
    """Disables 40 commands: those on sorted sets and streams, which nobody sends here."""
    executable = _EXECUTABLE.resolve()
    elf = ElfFile.open(executable)
    listing = subprocess.run(["nm", "-D", "--defined-only", executable], capture_output=True, text=True, check=True)
    words = [line.split() for line in listing.stdout.splitlines()]
    entries = sorted({int(address, 16) for address, _, name in words if re.fullmatch("[xz][a-z]+Command", name)})
    if len(entries) < SITES:
        raise BenchmarkError(f"{executable} exports {len(entries)} commands, not {SITES}")
    write_plan(path, executable, [entry - elf.link_base for entry in entries[:SITES]], "terminate")
    return load(path)


def _measure(figures: Figures, size: Case, keys: int, plan: Plan, plan_file: Path, work: Path) -> None:
    with Redis({"enable-debug-command": "yes"}) as redis:
        if keys:
            redis.command("DEBUG", "POPULATE", str(keys), "key", str(_VALUE))
        redis.disconnect()
        image = work / "image"
        dumped = checkpoint(redis.pid, image)
        for measure, value in (
            ("dump_criu_ms", dumped.criu_ms),
            ("dump_frozen_ms", dumped.frozen_us / 1000),
            ("dump_wall_ms", dumped.wall_ms),
            ("image_bytes", dumped.size_bytes),
        ):
            figures.add(size, DYNACUT, measure, value)
        for turn in range(_REWRITES):
            for kind in ("layer", "flat") if turn < _FLAT_REWRITES else ("layer",):
                output = work / kind
                if output.exists():
                    shutil.rmtree(output)
                _rewrite(figures, size, image, output, plan)
        if has_crit():
            _by_crit(figures, size, work)
        _command(figures, size, image, work / "command", plan_file)
        for kind in _in_turns(KINDS, _RESTORES[str(dict(size)["size"])]):
            spent = resource.getrusage(resource.RUSAGE_CHILDREN)
            figures.add(size, kind, "restore_ms", restore(work / kind).criu_ms)
            figures.add(size, kind, "restore_cpu_ms", _processor_ms(redis.pid, spent))
            _check_serves(redis, keys)
            if processes.end([redis.pid]):
                raise BenchmarkError("redis cannot be ended")


def _in_turns(kinds: Sequence[str], rounds: int) -> Iterator[str]:
    """Each of them once in a round, in random order: so that what slows the machine for a while slows all."""
    for _ in range(rounds):
        yield from random.sample(kinds, len(kinds))


def _by_crit(figures: Figures, size: Case, work: Path) -> None:
    """What dynacut has made of an image as a flat copy, made once more by crit."""
    image, output = work / "image", work / "crit"
    edit = Edit.of(image, work / "flat", work)
    changing, copying = edit.apply(image, output)
    edit.check(output)
    figures.add(size, CRIT, "rewrite_ms", changing)
    figures.add(size, CRIT, "copy_ms", copying)
    figures.add(size, CRIT, "written_bytes", sum(path.stat().st_size for path in output.iterdir()))
    figures.add(size, CRIT_AT_ONCE, "rewrite_ms", edit.apply_at_once(image, output))
    edit.check(output)
    shutil.rmtree(output)


def _rewrite(figures: Figures, size: Case, image: Path, output: Path, plan: Plan) -> None:
    """In this process, so that no start of Python counts. Finding and checking the sites is the same work as live."""
    resolving = 0.0

    def disable(target: Target, table: HandlerTable | None) -> PatchSet:
        nonlocal resolving
        begun = time.perf_counter()
        patches = resolve.disable(plan, target, table)
        resolving += time.perf_counter() - begun
        return patches

    started = time.perf_counter()
    with Image(image) as opened:
        done = change(opened, disable, output, dry_run=False, flat=output.name == "flat")
    whole = time.perf_counter() - started
    if done.written is None or done.edits != SITES:
        raise BenchmarkError(f"{done.edits} places were changed, not {SITES}")
    figures.add(size, output.name, "rewrite_ms", (whole - resolving) * 1000)
    figures.add(size, output.name, "resolve_ms", resolving * 1000)
    figures.add(size, output.name, "written_bytes", done.written.bytes_written)


def _command(figures: Figures, size: Case, image: Path, output: Path, plan_file: Path) -> None:
    command = [str(word) for word in (COMMAND, "offline", image, "--plan", plan_file, "-o", output, "--json")]
    started = time.perf_counter()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"dynacut offline ended with {done.returncode}: {done.stderr.strip()}")
    figures.add(size, DYNACUT, "command_wall_ms", (time.perf_counter() - started) * 1000)
    figures.add(size, DYNACUT, "command_own_ms", json.loads(done.stdout)["wall_ms"])


def _processor_ms(pid: int, before: resource.struct_rusage) -> float:
    """The processor time of CRIU, which has ended since, and so far of what it has restored (proc_pid_schedstat(5))."""
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    criu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return criu * 1000 + int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e6


def _check_serves(redis: Redis, keys: int) -> None:
    with redis.connect() as connection:
        found = connection.command("DBSIZE") if keys else 0
    if found != keys:
        raise BenchmarkError(f"the restored redis has {found} keys, not {keys}")


def _sizes(figures: Figures, sizes: list[str]) -> Table:
    rows = []
    for name in sizes:
        size = case(size=name)
        megabytes = (figures.median(size, DYNACUT, "image_bytes") or 0) / 1e6
        measures = ("dump_frozen_ms", "dump_criu_ms", "dump_wall_ms", "command_wall_ms")
        rows.append([name, number(megabytes), *(spread(figures.values(size, DYNACUT, each)) for each in measures)])
    return Table(
        "redis dumped, and the whole command `dynacut offline`, in ms",
        ["", "image, MB", "frozen", "criu dump", "dynacut checkpoint", "dynacut offline"],
        rows,
        ("median (90th percentile). dynacut checkpoint: without the start of Python; offline: with it",),
    )


def _rewriting(figures: Figures, sizes: list[str]) -> Table:
    rows = []
    for name in sizes:
        size = case(size=name)
        written = [(figures.median(size, kind, "written_bytes") or 0) / 1e6 for kind in ("layer", "flat")]
        rows.append(
            [
                name,
                *(spread(figures.values(size, kind, "rewrite_ms")) for kind in ("layer", "flat", CRIT, CRIT_AT_ONCE)),
                spread(figures.values(size, CRIT, "copy_ms")),
                spread(figures.values(size, "layer", "resolve_ms")),
                *map(number, written),
            ]
        )
    return Table(
        f"an image rewritten with {SITES} sites, in ms",
        [
            "",
            "layer",
            "flat copy",
            CRIT,
            CRIT_AT_ONCE,
            "crit: copying",
            "and finding the sites",
            "layer: MB",
            "flat: MB",
        ],
        rows,
        (
            "layer, flat copy: reading the image, applying, writing, in a Python that runs already; finding and "
            "verifying the sites is the same work as on a running process",
            "crit: the files that differ decoded to JSON and encoded, by two runs of crit each; in one run: by its "
            "functions in a Python that runs already. What is to be changed in the JSON is known beforehand. copying: "
            "the other files, pages included"
            if has_crit()
            else "crit NOT MEASURED: tools/criu.sh crit fetches it",
        ),
    )


def _restores(figures: Figures, sizes: list[str]) -> Table:
    rows = []
    for name in sizes:
        size = case(size=name)
        rows.append([name, *(spread(figures.values(size, kind, "restore_ms")) for kind in KINDS)])
        rows[-1] += [number(_restore_ratio(figures, size, kind)) for kind in KINDS[1:]]
        rows[-1] += [number(figures.median(size, kind, "restore_cpu_ms")) for kind in KINDS]
    return Table(
        "criu restore, in ms",
        [
            "",
            "unmodified",
            "layer",
            "flat copy",
            "layer: times",
            "flat: times",
            *(f"processor: {kind}" for kind in KINDS),
        ],
        rows,
        (
            "times: how many times as long as of the unmodified image, by the medians. processor: its time, of CRIU "
            "and of what is restored, which other work on the machine has less part in",
        ),
    )


def _restore_ratio(figures: Figures, size: Case, kind: str) -> float | None:
    plain, changed = (figures.median(size, each, "restore_ms") for each in ("image", kind))
    return changed / plain if plain and changed else None


def _claims(figures: Figures) -> list[Claim]:
    claims = []
    size = case(size="1 GB")
    rewriting = figures.median(size, "layer", "rewrite_ms")
    if rewriting is not None:
        values = figures.values(size, "layer", "rewrite_ms")
        written = max(figures.values(size, "layer", "written_bytes"))
        claims += [
            Claim(
                f"a 1 GB image is rewritten with {SITES} sites in under {REWRITE_LIMIT_MS} ms inside the rewriter",
                f"{rewriting:.1f} ms median, {max(values):.1f} ms at most",
                rewriting < REWRITE_LIMIT_MS,
            ),
            Claim(
                f"under {WRITTEN_LIMIT // 1000} KB are written for it",
                f"{written / 1000:.0f} KB",
                written < WRITTEN_LIMIT,
            ),
        ]
    for each, ratio in (
        (size, _restore_ratio(figures, size, "layer")) for size in figures.medians("image", "restore_ms")
    ):
        if ratio is not None:
            claims.append(
                Claim(
                    f"a rewritten image of {dict(each)['size']} is restored within 15 % of the unmodified one's time",
                    f"{100 * ratio - 100:+.0f} %",
                    ratio <= RESTORE_RATIO,
                )
            )
    return claims
