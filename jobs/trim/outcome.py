"""What a trim has come to: code that ran at start-up and in service, what was removed, gadgets and memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynacut.handlers.table import Action
from dynacut.shared.coverage.coverage import Coverage
from dynacut.shared.coverage.startup import StartupCode
from dynacut.shared.on_hit import OnHit
from dynacut.shared.plan import Plan


@dataclass(frozen=True)
class Amount:
    """Whole basic blocks, and their bytes."""

    blocks: int
    size_bytes: int

    @classmethod
    def of(cls, sizes: Iterable[int]) -> Amount:
        """The amount of blocks of these sizes."""
        known = list(sizes)
        return cls(len(known), sum(known))

    def as_json(self) -> dict[str, int]:
        """Blocks and bytes for --json."""
        return {"blocks": self.blocks, "bytes": self.size_bytes}


@dataclass(frozen=True)
class ModuleReport:
    """One module.

    startup: ran at start-up only. removed: of these, what the final plan removes. learned: of these, what was needed
    after all; standing: what threads were in. gadgets: before and after, of all its code; None where not counted.
    """

    name: str
    path: str
    build_id: str | None
    init: Amount
    serving: Amount
    startup: Amount
    removed: Amount
    learned: Amount
    standing: Amount
    gadgets: tuple[int, int] | None = None

    @property
    def removed_share(self) -> float:
        """What of the start-up code is removed, in blocks, 0 to 1."""
        return self.removed.blocks / self.startup.blocks if self.startup.blocks else 0.0

    def as_json(self) -> dict[str, Any]:
        """The module for --json."""
        amounts = ("init", "serving", "startup", "removed", "learned", "standing")
        return {
            "name": self.name,
            "path": self.path,
            "build_id": self.build_id,
            **{name: getattr(self, name).as_json() for name in amounts},
            "removed_share": round(self.removed_share, 4),
            "gadgets": None if self.gadgets is None else {"before": self.gadgets[0], "after": self.gadgets[1]},
        }


def module_reports(
    parts: Sequence[StartupCode],
    final: Plan,
    learned: Coverage,
    standing: Coverage,
    gadgets: Mapping[str, tuple[int, int]],
) -> list[ModuleReport]:
    """A report for each module that has start-up code. gadgets: before and after, by the path of a module."""
    reports = []
    for part in parts:
        names = {name for name, module in final.modules.items() if module.path == part.code.module.path}
        places = {site.at for feature in final.features for site in feature.sites}
        gone = {
            offset: size for offset, size in part.only.items() if any(f"{name}+{offset:#x}" in places for name in names)
        }
        module = part.code.module
        reports.append(
            ModuleReport(
                name=module.name,
                path=module.path,
                build_id=part.code.elf.build_id,
                init=Amount.of(part.init.values()),
                serving=Amount.of(part.later.values()),
                startup=Amount.of(part.only.values()),
                removed=Amount.of(gone.values()),
                learned=_of_startup(part, learned),
                standing=_of_startup(part, standing),
                gadgets=gadgets.get(module.path),
            )
        )
    return reports


def _of_startup(part: StartupCode, coverage: Coverage) -> Amount:
    """What of the start-up code is in a coverage, in whole blocks."""
    path = part.code.module.path
    found: set[int] = set()
    for module in coverage.modules:
        if module.path == path:
            found |= module.normalised(part.code.blocks).blocks.keys() & part.only.keys()
    return Amount.of(part.only[offset] for offset in found)


CODE_COLUMNS = ("code", "module", "blocks", "bytes")
CHANGE_COLUMNS = ("", "module", "before", "after")
ROUND_COLUMNS = ("how sure it is", "passes", "seconds", "last new block after", "then nothing for")


def code_rows(modules: Sequence[ModuleReport]) -> list[list[str]]:
    """What ran and what was removed, as lines of a table of CODE_COLUMNS."""
    return [
        [title, module.name, f"{amount.blocks:,}", f"{amount.size_bytes:,}"]
        for module in modules
        for title, amount in (
            ("executed at start-up", module.init),
            ("executed in service", module.serving),
            ("start-up only", module.startup),
            (f"removed ({module.removed_share:.1%})", module.removed),
            ("kept, as learned", module.learned),
            ("kept, as threads were there", module.standing),
        )
    ]


def change_rows(modules: Sequence[ModuleReport], process: Mapping[str, Any]) -> list[list[str]]:
    """Gadgets, pages and memory before and after, as lines of a table of CHANGE_COLUMNS.

    process: what the last step has noted: text pages, memory before and after, unmapped pages.
    """
    rows = [
        ["ROP gadgets", module.name, *(f"{count:,}" for count in module.gadgets)]
        for module in modules
        if module.gadgets is not None
    ]
    pages, unmapped = process["text_pages"], process["unmapped_pages"]
    rows.append(["mapped pages of text", "", f"{pages:,}", f"{pages - unmapped:,}"])
    before, after = process["memory_before"], process["memory_after"]
    for name, title in (("rss", "resident memory, KiB"), ("pss", "… shared pages divided, KiB")):
        rows.append([title, "all", f"{before[name] >> 10:,}", f"{after[name] >> 10:,}"])
    return rows


def rounds_of(steps: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rounds of the workload that the steps have noted: those that traced, and the one that learned."""
    traced = [{"round": "trace", **each} for each in steps["trace"]["rounds"]]
    return [*traced, *({"round": "learn", **step["round"]} for step in steps.values() if "round" in step)]


def round_rows(rounds: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What the rounds tell of how complete they were, as lines of a table of ROUND_COLUMNS."""
    titles = {"trace": "traced", "learn": "learned"}
    return [
        [
            titles[each["round"]],
            f"{each['passes']:,}",
            f"{each['seconds']:,.0f}",
            f"{each['last_new_seconds']:,.0f} s" if each["blocks"] else "none came",
            f"{each['seconds'] - each['last_new_seconds']:,.0f} s",
        ]
        for each in rounds
    ]


def summary_of(
    modules: Sequence[ModuleReport], steps: Mapping[str, Mapping[str, Any]], on_hit: OnHit, pid: int
) -> list[str]:
    """What was achieved, what a hit does now, and what speaks for or against it: a paragraph each."""
    startup, removed = (sum(getattr(each, name).blocks for each in modules) for name in ("startup", "removed"))
    share = removed / startup if startup else 0.0
    lines = [f"{removed:,} of {startup:,} basic blocks that only start-up executes are removed ({share:.1%})."]
    listing = f"`dynacut live --pid {pid} --tree --learned` lists them"
    if on_hit.action is Action.LEARN:
        lines.append(f"Blocks that are needed after all put themselves back, and {listing}.")
    else:
        lines.append("A removed block that is needed after all does not come back: what no round reached is not known.")
    learning = rounds_of(steps)[-1]
    if not learning["quiet"]:
        lines.append("Blocks still came as the learn round ended: more are to come.")
    elif learning["blocks"]:
        count, last, end = learning["blocks"], learning["last_new_seconds"], learning["seconds"]
        blocks = "1 block" if count == 1 else f"{count:,} blocks"
        lines.append(f"{blocks} had to come back, the last {last:.0f} s into the {end:.0f} s of learning.")
    if "checkpoint" in steps:
        lines.append(
            "Resident memory is smaller after any restore: pages of files are mapped anew only as they are used."
        )
    return lines
