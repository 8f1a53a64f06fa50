"""tools/completion.bash offers what the command has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_documentation import subcommands

from dynacut.cli.main import COMMANDS

SCRIPT = Path(__file__).resolve().parents[2] / "tools/completion.bash"
DYNACUT = Path(sys.executable).with_name("dynacut")


def offered(*words: str) -> list[str]:
    """What bash is told when the Tab key is pressed behind the last word."""
    lines = f'. "{SCRIPT}"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _dynacut; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(
        ["bash", "-c", lines, "bash", DYNACUT, *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_commands_are_offered() -> None:
    assert {*COMMANDS, "--version"} <= set(offered(""))
    assert offered("tri") == ["trim"]


@pytest.mark.parametrize("command", subcommands())
def test_every_option_is_offered(command: str) -> None:
    actions = subcommands()[command]._actions
    long = {name for action in actions for name in action.option_strings if name.startswith("--")}
    short = {action.option_strings[0] for action in actions if len(action.option_strings) == 1} - long
    assert set(offered(command, "-")) == long | short


def test_values_are_offered() -> None:
    assert offered("live", "--scope", "p") == ["page"]
    assert "1" in offered("live", "--pid", "")
    assert offered("trace", "--", "program", "-") == []
