"""Coverage of a process with its descendants: a master and the workers that it had before the trace began."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack

from dynacut.live.admission import admit, is_there
from dynacut.live.lock import locked
from dynacut.live.process import Process
from dynacut.live.tracing.trace import Trace, has_trace
from dynacut.live.tree import descendants
from dynacut.shared.coverage.coverage import Coverage
from dynacut.shared.errors import DynacutError
from dynacut.shared.target import Module

_MAX_ROUNDS = 20


class TreeTrace(Trace):
    """The trace of a process, and one more for each descendant that runs the same program; their coverage is one.

    What they fork from then on inherits their traces, a worker that is started anew that of the master. Use as a
    context manager: the descendants stay locked until its end.
    """

    def __init__(self, process: Process, modules: Sequence[Module], *, timeout: float = 60.0) -> None:
        """As Trace; the descendants are found when it is armed."""
        super().__init__(process, modules, timeout=timeout)
        self._paths = [module.path for module in modules]
        self._others: list[Trace] = []
        self._stack = ExitStack()

    def __enter__(self) -> TreeTrace:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def is_running(self) -> bool:
        """Whether any of them, or what they have forked, still runs."""
        return super().is_running or any(trace.is_running for trace in self._others)

    @property
    def armed(self) -> int:
        """How many blocks are traced, in the process that has most."""
        return max(super().armed, *(trace.armed for trace in self._others), 0)

    def arm(self) -> None:
        """Arms the process, then each of its descendants that has not inherited that.

        Raises:
            DynacutError: one of them cannot be traced; none is then.
        """
        super().arm()
        seen = {self._process.pid}
        try:
            for _ in range(_MAX_ROUNDS):
                new = [pid for pid in descendants(self._process.pid) if pid not in seen]
                if not new:
                    break
                seen.update(new)
                for pid in new:
                    self._add(pid)
        except BaseException:
            self.disarm()
            raise

    def _add(self, pid: int) -> None:
        with ExitStack() as opened:
            try:
                process = opened.enter_context(Process(pid))
                if process.exe != self._process.exe or has_trace(process):
                    return  # another program; or forked since, with the trace of its parent
                admit(pid, changing=True)
                opened.enter_context(locked(pid))
                trace = Trace(process, [module for module in process.modules if module.path in self._paths])
                trace.arm()
            except DynacutError:
                if is_there(pid):
                    raise
                return
            self._others.append(trace)
            self._stack.enter_context(opened.pop_all())

    def poll(self) -> int:
        """How many blocks were hit in this phase so far; once for each process that hit them."""
        return super().poll() + sum(trace.poll() for trace in self._others)

    def poll_modules(self) -> dict[str, int]:
        """The same by module, by its path."""
        total = Counter(super().poll_modules())
        for trace in self._others:
            total.update(trace.poll_modules())
        return dict(total)

    def coverage(self) -> Coverage:
        """The blocks that any process hit in this phase."""
        return super().coverage().union(*(trace.coverage() for trace in self._others))

    def next_phase(self) -> Coverage:
        """Closes the phase: its coverage; and arms all blocks again, everywhere, for the next one."""
        return super().next_phase().union(*[trace.next_phase() for trace in self._others])

    def disarm(self) -> None:
        """Puts everything back, in all processes.

        Raises:
            DynacutError: a process could not be put back; blocks that are left armed heal themselves.
        """
        super().disarm()
        for trace in self._others:
            trace.disarm()
