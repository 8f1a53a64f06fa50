"""The refusals that a checkpoint gets around: what stands in the way is the stopping of threads, not the change."""

from __future__ import annotations

from dynacut.shared.errors import DynacutError

_WAY = "use `dynacut live --fallback checkpoint`, or `dynacut offline` on a checkpoint of it"


class NeedsCheckpointError(DynacutError):
    """The process cannot be changed while it runs, but an image of it can be.

    Only as long as its status is REFUSED has nothing been changed, so that the other way may be gone.
    """

    def __init__(self, problem: str, otherwise: str = "") -> None:
        """otherwise: what can be done instead of a checkpoint; the advice names both."""
        super().__init__(problem, f"{otherwise}, or {_WAY}" if otherwise else _WAY)
