"""What `dynacut trim` measures of a service that runs: resident memory, gadgets, what is in force."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacut.shared.proc import tree_of

if TYPE_CHECKING:
    from dynacut.shared.plan import Plan


def resident_memory(pid: int) -> dict[str, int]:
    """The resident memory of a process with its descendants, in bytes.

    rss: all of it; pss: with shared pages divided by their users. Source: smaps_rollup, proc_pid_smaps(5).
    """
    total = {"rss": 0, "pss": 0}
    for each in tree_of(pid):
        try:
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has ended
        for line in lines:
            name = line.partition(":")[0].lower()
            if name in total:
                total[name] += int(line.split()[1]) * 1024
    return total


def gadgets_of(pid: int, plan: Plan) -> dict[str, list[int]]:
    """The gadgets of each module of the plan, by its path: in the file, and in memory.

    Raises:
        DynacutError: they cannot be counted.
    """
    from concurrent.futures import ThreadPoolExecutor

    from dynacut.live.process import Process
    from dynacut.shared.binary.elf import ElfFile
    from dynacut.shared.binary.gadgets import count_gadgets, gadgets_of_file
    from dynacut.shared.code import Code
    from dynacut.shared.holes import Patched
    from dynacut.shared.region import find_region

    files: dict[str, ElfFile] = {}
    codes: dict[str, bytes] = {}
    paths = {module.path for module in plan.modules.values()}
    with Process(pid) as process:
        found = find_region(process)
        view = Patched(process, found.table if found else None)
        for module in process.modules:
            if module.path in paths:
                elf = files[module.path] = Code(module).elf
                places = [(part.offset, part.file_size) for part in elf.segments if part.executable]
                codes[module.path] = b"".join(view.read(module.base + offset, size) for offset, size in places)
    with ThreadPoolExecutor() as pool:  # each count is a process of its own
        before, after = pool.map(gadgets_of_file, files.values()), pool.map(count_gadgets, codes.values())
        return {path: [one, two] for path, one, two in zip(files, before, after, strict=True)}


def trimmed_facts(pid: int, plan: Plan) -> dict[str, Any]:
    """What is to be known of a trimmed service while it runs. hits: of its removed code, by all its processes."""
    from dynacut.live.change import look
    from dynacut.shared.coverage.startup import FEATURE

    processes = look(pid, tree=True).processes
    features = [[feature for feature in each.features if feature.name == FEATURE] for each in processes]
    return {
        "pid": pid,
        "exe": processes[0].exe,
        "processes": len(processes),
        "memory_after": resident_memory(pid),
        "text_pages": _text_pages(plan),
        "unmapped_pages": sum(feature.unmapped_pages for feature in features[0]),
        "hits": sum(feature.hits for each in features for feature in each),
        "gadgets": gadgets_of(pid, plan),
    }


def _text_pages(plan: Plan) -> int:
    """The pages of the executable segments of the plan's modules, as their files have them."""
    from dynacut.shared.binary.elf import ElfFile
    from dynacut.shared.target import PAGE_SIZE

    segments = [part for module in plan.modules.values() for part in ElfFile.open(Path(module.path)).segments]
    return sum(-(-(part.offset % PAGE_SIZE + part.memory_size) // PAGE_SIZE) for part in segments if part.executable)
