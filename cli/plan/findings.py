"""What dynacut plan has found, as people think of it: functions, source lines, instructions, and why this way."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynacut.cli.console import SCHEMA, print_table, warn
from dynacut.cli.quantities import counted
from dynacut.shared.errors import DynacutError, printable

if TYPE_CHECKING:
    from dynacut.live.trial import Trial
    from dynacut.shared.coverage.suggest import Difference, Suggestion

_SHOWN = 12
_OTHER_WAYS = 3


@dataclass(frozen=True)
class Findings:
    """All there is to show. chosen: the way that the plan takes. trials: of the ways in their order, from the first."""

    differences: Sequence[Difference]
    ways: Sequence[Suggestion]
    chosen: Suggestion
    trials: Sequence[Trial]

    def source_lines(self) -> dict[tuple[str, int], str]:
        """FILE:LINE by module path and offset, where there is debug information."""
        found = {}
        for difference in self.differences:
            code = difference.code
            offsets = {function.first for function in difference.functions}
            offsets |= {
                offset
                for way in self.ways
                if way.code is code
                for offset in (way.candidate.entry, way.candidate.destination)
            }
            try:
                lines = code.source_lines(offsets)
            except DynacutError as error:
                warn(error.problem)
                continue
            found.update({(code.module.path, offset): line for offset, line in lines.items()})
        return found


def print_findings(arguments: argparse.Namespace, findings: Findings) -> None:
    """Prints it, from what was found to what was made of it."""
    lines = findings.source_lines()
    _print_functions(findings, lines)
    chosen, candidate = findings.chosen, findings.chosen.candidate
    print(f"A request of the feature is stopped at {_place(chosen, candidate.entry, lines)}")
    for line in chosen.disassembly_of_jump():
        print(f"    {printable(line)}    (leads there)")
    for line in chosen.disassembly():
        print(f"    {printable(line)}")
    print(f"and goes on at {_place(chosen, candidate.destination, lines)}")
    for line in chosen.disassembly_instead():
        print(f"    {printable(line)}")
    print(f"Why: {printable(candidate.reason)}")
    _print_ways(findings)
    state = "tried: it works" if findings.trials else "not tried yet: --try proves it on an instance"
    print(f"{printable(str(arguments.output))}: feature {printable(arguments.name)}, {state}")


def _print_functions(findings: Findings, lines: dict[tuple[str, int], str]) -> None:
    shares = [(difference, function) for difference in findings.differences for function in difference.functions]
    total = sum(len(difference.blocks) for difference in findings.differences)
    size = sum(difference.size_bytes for difference in findings.differences)
    print(
        f"Only unwanted requests execute {counted(total, 'block')} ({size:,} bytes) of "
        f"{counted(len(shares), 'function')}, the first reached first:"
    )
    rows = [
        [
            difference.code.module.name,
            function.name,
            f"{function.blocks} of {function.of}",
            "entered by them only" if function.is_entered else "",
            *([lines.get((difference.code.module.path, function.first), "")] if lines else []),
        ]
        for difference, function in shares[:_SHOWN]
    ]
    columns = ["module", "function", "blocks", "", *(["source"] if lines else [])]
    print_table("functions", columns, rows, right=frozenset({2}))
    if len(shares) > _SHOWN:
        print(f"… and {counted(len(shares) - _SHOWN, 'more function')}; --json has all of them")


def _print_ways(findings: Findings) -> None:
    """The trials, or what else there would be to try."""
    tried = len(findings.trials)
    for number, (way, trial) in enumerate(zip(findings.ways, findings.trials, strict=False), 1):
        print(f"  {number}. {printable(way.entry)} → {printable(way.destination)}: {printable(trial.verdict)}")
    others = len(findings.ways) - max(tried, 1)
    if tried or not others:
        return
    following = "; ".join(f"{way.entry} → {way.destination}" for way in findings.ways[1 : 1 + _OTHER_WAYS])
    print(f"{counted(others, 'other way')} found, the next: {printable(following)}")


def _place(way: Suggestion, offset: int, lines: dict[tuple[str, int], str]) -> str:
    """``setCommand (redis-server+0xab060, t_string.c:295)``."""
    plain = f"{way.code.module.name}+{offset:#x}"
    name = way.code.describe(offset)
    line = lines.get((way.code.module.path, offset))
    known = [part for part in (plain if name != plain else "", line or "") if part]
    return printable(f"{name} ({', '.join(known)})" if known else name)


def document(arguments: argparse.Namespace, findings: Findings) -> dict[str, Any]:
    """The same as JSON."""
    chosen, trials = findings.chosen, findings.trials
    lines = findings.source_lines()
    return {
        "schema": SCHEMA,
        "plan": str(arguments.output),
        "blocks": sum(len(difference.blocks) for difference in findings.differences),
        "bytes": sum(difference.size_bytes for difference in findings.differences),
        "functions": [
            {
                "module": difference.code.module.name,
                "name": function.name,
                "offset": function.entry,
                "blocks": function.blocks,
                "of": function.of,
                "bytes": function.size_bytes,
                "entered": function.is_entered,
                "source": lines.get((difference.code.module.path, function.first)),
            }
            for difference in findings.differences
            for function in difference.functions
        ],
        "candidates": len(findings.ways),
        "entry": chosen.entry,
        "destination": chosen.destination,
        "entry_source": lines.get((chosen.code.module.path, chosen.candidate.entry)),
        "destination_source": lines.get((chosen.code.module.path, chosen.candidate.destination)),
        "disassembly": chosen.disassembly(),
        "reason": chosen.candidate.reason,
        "trials": [trial.verdict for trial in trials],
        "works": trials[-1].works if trials else None,
    }
