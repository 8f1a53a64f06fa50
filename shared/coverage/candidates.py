"""Where a feature begins, and where it can be sent instead, from coverage alone: candidates, the likeliest first.

W, U and E are the blocks that wanted requests, unwanted ones, and unwanted ones that the server refuses executed;
D = U - W. Three kinds: a conditional jump that leads into D on one side; an entry of a jump table that does; a function
in D that is reached through a table of pointers only. Which of them works is for a trial to find out: measured on
redis, nginx and lighttpd, the first one that does is among the first few.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from math import log2, sqrt

from dynacut.shared.binary.branches import BranchKind
from dynacut.shared.code import Code
from dynacut.shared.coverage.candidate import Candidate, CandidateKind
from dynacut.shared.coverage.flow import Flow
from dynacut.shared.coverage.live_registers import clobbers
from dynacut.shared.coverage.siblings import Siblings

__all__ = ["MAX_CANDIDATES", "Candidate", "CandidateKind", "find_candidates"]

MAX_CANDIDATES = 200
MAX_SIBLINGS = 12
"""So many functions are tried in place of one."""


def find_candidates(
    code: Code,
    wanted: Collection[int],
    unwanted: Collection[int],
    error: Collection[int] | None = None,
    *,
    total: int | None = None,
    flow: Flow | None = None,
) -> list[Candidate]:
    """Return ways to switch off in one module what only unwanted requests execute, best first, MAX_CANDIDATES at most.

    wanted, unwanted, error: blocks of code.blocks by their start, as module offsets; what is no block there is
    passed over. unwanted in the order of the first hits (a dict by insertion). total: how many blocks only
    unwanted requests executed in all modules that are compared (default: in this one). The order is the same
    in each run. DynacutError if the module is malformed.
    """
    finder = _Finder(code, flow or Flow.of(code), wanted, unwanted, error, total)
    best: dict[tuple[int, int], Candidate] = {}
    for candidate in finder.all():
        key = (candidate.entry, candidate.destination)
        if key not in best or candidate.score > best[key].score:
            best[key] = candidate
    return sorted(best.values(), key=lambda one: (-one.score, one.entry, one.destination))[:MAX_CANDIDATES]


class _Finder:
    """The coverage of one module, and what it says about each block."""

    def __init__(
        self,
        code: Code,
        flow: Flow,
        wanted: Collection[int],
        unwanted: Collection[int],
        error: Collection[int] | None,
        total: int | None,
    ) -> None:
        starts = set(flow.blocks.block_starts)
        self.code, self.flow = code, flow
        self.wanted = frozenset(wanted)
        self.unwanted = [offset for offset in unwanted if offset in starts]
        self.error = frozenset(error or ())
        self.has_error = error is not None
        only = [offset for offset in self.unwanted if offset not in self.wanted]
        self.order = {offset: at for at, offset in enumerate(dict.fromkeys(only))}
        """D, with each block's place in the order of first hits."""
        self.executed_blocks = frozenset(self.unwanted)
        self.first = next(filter(self.is_called_by_pointer, self.order), None)
        """The first function in D that is reached through a pointer: on redis it is the handler of the command."""
        self.total = max(total or 0, len(self.order), 1)
        self.reaches: dict[int, int] = {}
        self.siblings = Siblings(flow, self.wanted, self.error)

    def all(self) -> Iterator[Candidate]:
        """Yield every candidate, in no particular order, some twice."""
        if not self.order:
            return
        for block in self.unwanted:
            branch = self.flow.branch_of(block)
            if branch is None:
                continue
            if branch.kind is BranchKind.CONDITIONAL:
                yield from self.jump(block)
            elif branch.kind is BranchKind.INDIRECT_JUMP and block not in self.order:
                yield from self.cases(block)
        for entry in self.order:
            if self.is_called_by_pointer(entry):
                yield from self.function(entry)

    def is_called_by_pointer(self, entry: int) -> bool:
        """Whether a function's address is in data or taken by code, and no direct call of it was executed.

        redis's evalCommand is also called by another command's function: that does not matter where EVAL is unwanted.
        """
        if not self.flow.is_entry(entry):
            return False
        if entry in self.flow.indirect_only:
            return True
        calls = map(self.flow.blocks.block_at, self.flow.callers(entry))
        return entry in self.flow.pointers.places_of and not any(
            block is not None and block.start in self.executed_blocks for block in calls
        )

    def reach(self, start: int) -> int:
        """Return how many blocks of D control may get to from one of them, without leaving D.

        A flag on a shared path leads to a block or two and is back; the feature itself leads to most of D. A
        function in D whose address a block takes counts: it may be a callback.
        """
        if start in self.reaches:
            return self.reaches[start]
        seen = {start}
        waiting = [start]
        while waiting:
            block = waiting.pop()
            onward = list(self.flow.successors(block))
            branch = self.flow.branch_of(block)
            if branch is not None and branch.kind is BranchKind.CALL and branch.target is not None:
                onward.append(branch.target)
            found = self.flow.blocks.block_at(block)
            if found is not None:
                onward += filter(self.flow.is_entry, self.flow.data_references(found.start, found.end))
            fresh = [offset for offset in onward if offset in self.order and offset not in seen]
            seen.update(fresh)
            waiting += fresh
        self.reaches[start] = len(seen)
        return len(seen)

    def parts(self, entry: int, alternative: float) -> dict[str, float]:
        """Return what counts for every kind: how much of D lies behind entry, how early it is hit, what E says."""
        return {
            "reach": 3.0 * sqrt(self.reach(entry) / self.total),
            "order": 1.5 * (1 - self.order[entry] / len(self.order)),
            "refused": 1.0 if self.has_error and entry not in self.error else 0.0,
            "alternative": alternative,
        }

    def popularity(self, block: int) -> float:
        """Return what it costs that a block's function has many callers: a hash table's is no feature's entry."""
        function = self.flow.function_at(block)
        return max(-1.0, -0.25 * log2(1 + len(self.flow.callers(function.start)))) if function is not None else 0.0

    def executed(self, offset: int) -> float:
        """Return what it is worth that other requests go to a destination: it is known to be harmless to them."""
        return 1.0 if offset in self.error else 0.7 if offset in self.wanted else 0.0

    def by_whom(self, offset: int) -> str:
        """Say who executes a block."""
        names = [
            name
            for name, blocks in (("refused requests", self.error), ("wanted requests", self.wanted))
            if offset in blocks
        ]
        return " and ".join(names) or "none of the requests"

    def make(
        self,
        kind: CandidateKind,
        entry: int,
        destination: int,
        reason: str,
        parts: dict[str, float],
        jump: int | None = None,
    ) -> Iterator[Candidate]:
        """Yield the candidate if both ends are certain, and a redirect between them leaves the stack as it must be."""
        block = self.flow.blocks.block_at(entry)
        function = self.flow.function_at(entry)
        if block is None or block.start != entry or function is None or entry == destination:
            return
        inside = function.start <= destination < function.end
        if self.flow.blocks.is_boundary(destination) and (
            inside or (entry in self.flow.entries and destination in self.flow.entries)
        ):
            yield Candidate(kind, entry, destination, block.size, reason, parts, jump)

    def jump(self, block: int) -> Iterator[Candidate]:
        """Yield the conditional jump that ends a block, if one side is in D, and the other is not."""
        branch = self.flow.branch_of(block)
        assert branch is not None
        for entry, other in ((branch.target, branch.end), (branch.end, branch.target)):
            if entry not in self.order or other is None or other in self.order or entry == other:
                continue
            parts = self.parts(entry, self.executed(other))
            # Inside D it is a way out of the feature when it has begun: its own error path, or its end.
            parts["shared"] = 0.5 if block not in self.order else -1.0 if other not in self.error else 0.0
            parts["callers"] = self.popularity(block)
            # Other ways to entry may have other values in the registers than those that destination is used to.
            parts["sole way"] = 0.3 if self.flow.predecessors(entry) == (block,) else 0.0
            place = self.code.describe(branch.offset)
            if block not in self.order:
                start = f"The jump at {place} is shared by requests"
            else:
                start = f"The jump at {place} is the feature's own"
            reason = (
                f"{start}: only unwanted ones go on at {self.code.describe(entry)}, and {self.code.describe(other)} "
                f"beside it is executed by {self.by_whom(other)}."
            )
            yield from self.make(CandidateKind.JUMP, entry, other, reason, parts, branch.offset)

    def cases(self, block: int) -> Iterator[Candidate]:
        """Yield the cases in D of the switch whose jump ends a block, each with the other ways to go."""
        table = self.flow.jump_table(block)
        if table is None:
            return
        default = table.default
        if default is None:  # the holes of a table lead to the default
            default = max(sorted(set(table.targets)), key=table.targets.count)
        others = {offset for offset in table.targets if offset in self.wanted or offset in self.error}
        for entry in sorted(set(table.targets) & self.order.keys()):
            cases = ", ".join(str(at) for at, target in enumerate(table.targets) if target == entry)
            for other in sorted((others | {default}) - self.order.keys()):
                is_default = other == default
                parts = self.parts(entry, max(self.executed(other), 0.7 if is_default else 0.0))
                parts["shared"] = 0.5
                # Another case does another feature's work (DELETE as MKCOL), which may look like a refusal in a trial.
                parts["callers"] = self.popularity(block)
                clobbered = 0 if other in table.targets else clobbers(self.flow, block, other)
                parts["registers"] = (0.0, -0.2, -1.5)[clobbered]
                parts["default"] = 0.5 if is_default else 0.0 if other in self.error - self.wanted else -4.0
                reason = (
                    f"Only unwanted requests take case {cases} of the switch at {self.code.describe(table.jump)}, to "
                    f"{self.code.describe(entry)}; {self.code.describe(other)} is "
                    f"{'its default' if is_default else 'another case'}, executed by {self.by_whom(other)}."
                )
                yield from self.make(CandidateKind.CASE, entry, other, reason, parts)

    def function(self, entry: int) -> Iterator[Candidate]:
        """Yield a function in D that is reached through pointers only, with the best siblings in its table."""
        pointers = self.flow.pointers
        own = next((name for place in pointers.places_of.get(entry, ()) if (name := pointers.name_beside(place))), None)
        for at, sibling in enumerate(self.siblings.of(entry, self.order.keys())[:MAX_SIBLINGS]):
            parts = self.parts(entry, sibling.weight)
            parts["shared"] = 0.5
            parts["sibling"] = -0.1 * at
            # A callback may come before the handler; but nothing in its table sounds like a refusal.
            parts["first function"] = 1.5 * min(1.0, 0.5 + sibling.weight) if entry == self.first else 0.0
            instead = _called(self.code.describe(sibling.entry), sibling.name)
            reason = (
                f"{_called(self.code.describe(entry), own)} is called only through a table of {sibling.table_size} "
                f"functions, and only by unwanted requests; {instead} is another one there ({sibling.why})."
            )
            yield from self.make(CandidateKind.FUNCTION, entry, sibling.entry, reason, parts)


def _called(place: str, name: str | None) -> str:
    return f'{place} ("{name}")' if name else place
