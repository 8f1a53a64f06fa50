"""The one error that a user sees: what is wrong, what to do about it, and the exit status it ends with."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

AS_ROOT = "run dynacut as root, by sudo"
"""The advice where only the right to do it is missing."""


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
        self.problem = printable(problem)
        self.advice = printable(advice)
        self.status = status
        self.details = tuple(printable(detail) for detail in details)


def shortened(text: str) -> str:
    """A text from elsewhere, for a message: not more of it than helps."""
    return text if len(text) <= 100 else text[:97] + "…"


def printable(text: str) -> str:
    """The text on one line and without control characters or undecodable bytes: these are escaped.

    Paths, process names and what stands in plans come from others; on a terminal they must not be able to do anything.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
