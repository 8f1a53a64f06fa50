"""Actions as they are written in plans and options."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynacut.handlers.table import Action
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.on_hit import DIE_BY_SIGTRAP, OnHit

ACTIONS = st.one_of(
    st.just(OnHit(Action.TERMINATE, DIE_BY_SIGTRAP)),
    st.integers(0, 255).map(lambda code: OnHit(Action.TERMINATE, code)),
    st.text(min_size=1).filter(lambda text: text == text.strip()).map(lambda text: OnHit(Action.REDIRECT, 0, text)),
    st.integers(0, (1 << 64) - 1).map(lambda value: OnHit(Action.RETURN, value)),
    st.integers(1, 1 << 16).map(lambda count: OnHit(Action.SKIP, count)),
    st.sampled_from([OnHit(Action.LEARN), OnHit(Action.HANDLER)]),
)


@given(ACTIONS)
def test_what_is_written_is_read_back(on_hit: OnHit) -> None:
    assert OnHit.parse(str(on_hit)) == on_hit


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("terminate", OnHit(Action.TERMINATE, DIE_BY_SIGTRAP)),
        (" terminate=0 ", OnHit(Action.TERMINATE, 0)),
        ("terminate=0xff", OnHit(Action.TERMINATE, 255)),
        ("redirect=redis-server+0xab1f0", OnHit(Action.REDIRECT, 0, "redis-server+0xab1f0")),
        ("redirect=operator==", OnHit(Action.REDIRECT, 0, "operator==")),
        ("return=0", OnHit(Action.RETURN, 0)),
        ("return=-1", OnHit(Action.RETURN, (1 << 64) - 1)),
        ("return=18446744073709551615", OnHit(Action.RETURN, (1 << 64) - 1)),
        ("return=-0x8000000000000000", OnHit(Action.RETURN, 1 << 63)),
        ("skip=5", OnHit(Action.SKIP, 5)),
        ("learn", OnHit(Action.LEARN)),
        ("handler", OnHit(Action.HANDLER)),
    ],
)
def test_each_form_is_read(text: str, expected: OnHit) -> None:
    assert OnHit.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "=",
        "die",
        "TERMINATE",
        "terminate=",
        "terminate=256",
        "terminate=-1",
        "terminate=x",
        "redirect",
        "redirect=",
        "return",
        "return=",
        "return=1.5",
        "return=18446744073709551616",
        "return=-9223372036854775809",
        "return=" + "9" * 5000,
        "return=0x" + "f" * 5000,
        "skip",
        "skip=0",
        "skip=-1",
        "skip=65537",
        "skip=010",
        "learn=1",
        "handler=x",
        "terminate\n=1",
        "lea\nrn",
        "edit",
    ],
)
def test_anything_else_is_wrong_usage_and_said_in_one_line(text: str) -> None:
    with pytest.raises(DynacutError) as caught:
        OnHit.parse(text)
    assert caught.value.status is ExitStatus.USAGE
    assert "\n" not in caught.value.problem + caught.value.advice
    assert "redirect=SITE" in caught.value.advice


def test_the_problem_names_what_was_written_and_the_range() -> None:
    with pytest.raises(DynacutError, match="'terminate=256': not a number from 0 to 255"):
        OnHit.parse("terminate=256")
    with pytest.raises(DynacutError, match="'die' is no action"):
        OnHit.parse("die")


@given(st.text(max_size=30))
def test_any_text_is_an_action_or_refused(text: str) -> None:
    try:
        on_hit = OnHit.parse(text)
    except DynacutError:
        return
    assert OnHit.parse(str(on_hit)) == on_hit
