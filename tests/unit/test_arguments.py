"""Values of options that make no sense are refused as wrong usage, whatever the command."""

from __future__ import annotations

import pytest

from dynacut.cli.main import main

NUMBERS = (
    *(("live", "--pid", "4711", "--timeout"), ("checkpoint", "--pid", "4711", "image", "--timeout")),
    *(("restore", "image", "--timeout"), ("trace", "--pid", "4711", "-o", "log", "--for")),
    *(
        ("trace", "--pid", "4711", "-o", "log", "--until-quiet"),
        ("trace", "--pid", "4711", "-o", "log", "--ready-port"),
    ),
    *(("plan", "--wanted", "w", "--unwanted", "u", "--probe-timeout"), ("plan", "--wanted", "w", "--trials")),
    *(("trim", "-o", "trim", "--ready-port"), ("trim", "-o", "trim", "--passes"), ("trim", "-o", "trim", "--timeout")),
    *(("trim", "-o", "trim", "--idle"), ("compare", "--plan", "plan", "--repeat")),
)


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "1e400", "x", "", "99999999999", "٣"])
@pytest.mark.parametrize("options", NUMBERS)
def test_a_number_that_makes_no_sense(options: tuple[str, ...], value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*options[:-1], f"{options[-1]}={value}"]) == 2
    said, advice = capsys.readouterr().err.splitlines()
    assert advice == f"dynacut: see dynacut {options[0]} --help"
    assert f"argument {options[-1]}: " in said
    assert "_" not in said.partition(options[-1])[2], "a name of the source"


@pytest.mark.parametrize(
    "options", [options for options in NUMBERS if options[-1] not in ("--idle", "--for", "--until-quiet")]
)
def test_none_at_all(options: tuple[str, ...]) -> None:
    assert main([*options[:-1], f"{options[-1]}=0"]) == 2
