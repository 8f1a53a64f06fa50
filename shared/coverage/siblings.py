"""Functions that could take another one's place: the others in its table of pointers, likeliest refusals first."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from dynacut.shared.binary.branches import BranchKind
from dynacut.shared.binary.functions import FunctionRange
from dynacut.shared.coverage.flow import Flow

_REFUSAL = re.compile(
    r"\b(?:-?ERR|errors?|denied|disabled|disallowed|forbidden|invalid|not (?:allowed|supported|permitted|enabled)|"
    r"refused?|rejected|unknown|unsupported|unimplemented|wrong number)\b",
    re.IGNORECASE,
)
"""What texts of refusals have in common, in English."""
_SMALL = 8  # a function with this many functions behind it counts half of what one with none does
_SEEN = 0.4  # the weight of being executed by refused requests and by no wanted ones
_ONLY_ERROR = 0.3  # the same for what is called: less, since it may be anything
_DEPTH = 2  # a handler may call what makes the error's text, and that what sends it
_CALLS = (BranchKind.CALL, BranchKind.INDIRECT_CALL)


@dataclass(frozen=True)
class Sibling:
    """Another function at the same position of another record of a table.

    name: what its record is called, if it is. weight: how likely it refuses whatever it is asked, 0 to 1.
    """

    entry: int
    name: str | None
    table_size: int
    weight: float
    why: str


class Siblings:
    """Finds siblings in one module. wanted and error: the blocks (module offsets) that those requests executed."""

    def __init__(self, flow: Flow, wanted: AbstractSet[int], error: AbstractSet[int]) -> None:
        self._flow = flow
        self._wanted = wanted
        self._error = error
        self._shares: dict[tuple[int, int], float] = {}

    def of(self, entry: int, excluded: AbstractSet[int]) -> list[Sibling]:
        """Return the siblings of the function at an offset, best first, without those whose entry is excluded."""
        pointers = self._flow.pointers
        found: dict[int, Sibling] = {}
        for place in pointers.places_of.get(entry, ()):
            table = pointers.table_at(place)
            if table is None:
                continue
            behind = {function: self._behind(function) for function in dict.fromkeys(table.functions)}
            users = Counter(callee for callees in behind.values() for callee in callees)
            # What most functions of the table use is the program's infrastructure, such as making a reply.
            special = {callee for callee, count in users.items() if 2 * count < len(behind)}
            for other, function in zip(table.places, table.functions, strict=True):
                if function != entry and function not in excluded and function not in found:
                    weight, why = self._weigh(function, len(behind[function] & special))
                    found[function] = Sibling(
                        function, pointers.name_beside(other, table), len(table.places), weight, why
                    )
        return sorted(found.values(), key=lambda sibling: (-sibling.weight, sibling.entry))

    def _weigh(self, entry: int, behind: int) -> tuple[float, str]:
        """Return how likely a function only refuses: it was seen to, or its first deed often is to say no.

        behind: how many functions it uses that others do not. What it does when it does not refuse matters too:
        redis's SWAPDB in the place of SET refuses most keys, but not ``SET 0 1``. A trial would not see that.
        """
        function = self._flow.function_at(entry)
        if function is None:
            return 0.0, ""
        refusing = self._refusing(function, _DEPTH)
        weight = refusing * _SMALL / (_SMALL + behind)
        parts = [f"{refusing:.0%} of its ways begin with what sounds like a refusal"]
        parts.append(f"{behind} functions of its own behind it")
        if entry in self._wanted:
            parts.append("executed by wanted requests")
        elif entry in self._error:
            # Not certain: the refused request may have needed another one before it, such as a login.
            weight = _SEEN + (1 - _SEEN) * weight
            parts.append("executed by refused requests")
        return weight, ", ".join(parts)

    def _behind(self, entry: int) -> frozenset[int]:
        """Return the functions that one may get to by direct calls, without those that refused requests use."""
        seen = {entry}
        waiting = [entry]
        while waiting:
            function = self._flow.function_at(waiting.pop())
            callees = self._flow.callees(function) if function is not None else ()
            fresh = [callee for callee in callees if callee not in seen and callee not in self._error]
            seen.update(fresh)
            waiting += fresh
        return frozenset(seen - {entry})

    def _refusing(self, function: FunctionRange, depth: int) -> float:
        """Return the share of a function's ways from its entry to its first call, or return, that refuse.

        A way refuses if the blocks on it take the address of a text that sounds like it, and a call follows; or if
        what it calls does so in turn, or is a function that only refused requests executed.
        """
        key = (function.start, depth)
        if key in self._shares:
            return self._shares[key]
        self._shares[key] = 0.0  # for functions that call each other
        refused, ways = 0.0, 0
        seen = {function.start}
        waiting = [(function.start, False)]
        while waiting:
            start, heard = waiting.pop()
            block = self._flow.blocks.block_at(start)
            if block is None or block.start != start:
                continue
            heard = heard or self._has_refusal(block.start, block.end)
            branch = self._flow.branch_of(start)
            leaves = branch is not None and (
                branch.kind in _CALLS
                or (branch.target is not None and not function.start <= branch.target < function.end)
                or not self._flow.successors(start)
            )
            if branch is not None and leaves:
                ways += 1
                if branch.kind is not BranchKind.END:
                    refused += 1.0 if heard else self._refuses(branch.target, depth)
            for successor in self._flow.successors(start) if branch is None or branch.kind not in _CALLS else ():
                if successor not in seen and function.start <= successor < function.end:
                    seen.add(successor)
                    waiting.append((successor, heard))
        self._shares[key] = refused / ways if ways else 0.0
        return self._shares[key]

    def _refuses(self, target: int | None, depth: int) -> float:
        """Return how likely a call of the function at an offset is a refusal."""
        if target is None or not self._flow.is_entry(target):
            return 0.0
        seen = _ONLY_ERROR if target in self._error and target not in self._wanted else 0.0
        function = self._flow.function_at(target)
        return max(seen, self._refusing(function, depth - 1) if function is not None and depth > 0 else 0.0)

    def _has_refusal(self, start: int, end: int) -> bool:
        """Whether code in [start, end) takes the address of a text that sounds like a refusal."""
        texts = map(self._flow.pointers.text_at, self._flow.data_references(start, end))
        return any(text is not None and _REFUSAL.search(text) is not None for text in texts)
