"""The one error that a user sees: what is wrong, what to do about it, and the exit status it ends with."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class ExitStatus(IntEnum):
    """The exit statuses of every dynacut command."""

    DONE = 0
    REFUSED = 1
    """Nothing was changed."""
    USAGE = 2
    CHECK_FAILED = 3
    """The target was changed, but the check afterwards failed."""
    UNKNOWN = 4
    """The state of the target is unknown."""


class DynacutError(Exception):
    """A failure to tell the user about; anything else that is raised is a bug and may trace back.

    problem: one line saying what is wrong. advice: one line saying what to do. details: further lines, one for each
    misfit, when a whole plan is refused.
    """

    def __init__(
        self,
        problem: str,
        advice: str = "",
        *,
        status: ExitStatus = ExitStatus.REFUSED,
        details: Sequence[str] = (),
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.advice = advice
        self.status = status
        self.details = tuple(details)
