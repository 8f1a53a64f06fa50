"""What a hit of a site does, as it is written in plans and options."""

from __future__ import annotations

from dataclasses import dataclass

from dynacut.handlers.table import Action
from dynacut.shared.errors import DynacutError, ExitStatus, shortened

DIE_BY_SIGTRAP = (1 << 64) - 1
"""The argument of TERMINATE in the table for ending by SIGTRAP at the site, rather than with an exit status."""

SYNTAX = "terminate, terminate=CODE, redirect=SITE, return=VALUE, skip=N, learn or handler"


@dataclass(frozen=True)
class OnHit:
    """An action with its argument; destination is the SITE of a redirect."""

    action: Action
    argument: int = 0
    destination: str = ""

    @classmethod
    def parse(cls, text: str) -> OnHit:
        """Reads the written form.

        Raises:
            DynacutError: (usage) it is none.
        """
        name, has_argument, argument = text.strip().partition("=")
        match name, bool(has_argument):
            case "terminate", False:
                return cls(Action.TERMINATE, DIE_BY_SIGTRAP)
            case "terminate", True:
                return cls(Action.TERMINATE, _number(text, argument, 0, 255))
            case "redirect", True if argument:
                return cls(Action.REDIRECT, destination=argument)
            case "return", True:
                return cls(Action.RETURN, _number(text, argument, -(1 << 63), (1 << 64) - 1) % (1 << 64))
            case "skip", True:
                return cls(Action.SKIP, _number(text, argument, 1, 1 << 16))
            case "learn", False:
                return cls(Action.LEARN)
            case "handler", False:
                return cls(Action.HANDLER)
        raise DynacutError(
            f"{shortened(text)!r} is no action for a hit", f"an action is {SYNTAX}", status=ExitStatus.USAGE
        )

    def __str__(self) -> str:
        match self.action:
            case Action.REDIRECT:
                return f"redirect={self.destination}"
            case Action.TERMINATE if self.argument == DIE_BY_SIGTRAP:
                return "terminate"
            case Action.TERMINATE | Action.SKIP:
                return f"{self.action.name.lower()}={self.argument}"
            case Action.RETURN:
                return f"return={self.argument if self.argument < 1 << 63 else self.argument - (1 << 64)}"
        return self.action.name.lower()


def _number(text: str, digits: str, low: int, high: int) -> int:
    try:
        number = int(digits, 0)
    except ValueError:
        number = None
    if number is None or not low <= number <= high:
        raise DynacutError(
            f"{shortened(text)!r}: not a number from {low} to {high}", f"an action is {SYNTAX}", status=ExitStatus.USAGE
        )
    return number
