"""Rounds of the workload: when they end, and what they have seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dynacut.jobs.trim.rounds import Patience, Round, run_round

PATIENT = Patience(passes=10, quiet=2, linger=0.0)


def counting(*counts: int) -> Callable[[], int]:
    """A poll that gives these, then the last one for ever."""
    left = list(counts)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def a_round(patience: Patience, counts: Iterable[int]) -> tuple[Round, list[str]]:
    told: list[str] = []
    return run_round(patience, lambda: None, counting(*counts), told.append, "learning"), told


def test_a_round_ends_when_enough_passes_bring_nothing() -> None:
    done, told = a_round(PATIENT, [5, 5, 7, 7, 7])
    assert (done.passes, done.blocks, done.is_quiet) == (5, 7, True)
    assert 0 < done.last_new <= done.seconds
    assert told == [
        f"learning, pass {number}: {blocks} blocks so far" for number, blocks in enumerate((0, 5, 5, 7, 7), 1)
    ]


def test_nothing_new_at_all() -> None:
    done, _ = a_round(PATIENT, [0])
    assert (done.passes, done.blocks, done.last_new, done.is_quiet) == (2, 0, 0.0, True)


def test_passes_that_go_on_bringing_something_are_given_up() -> None:
    done, _ = a_round(PATIENT, range(1, 12))
    assert (done.passes, done.quiet_passes, done.is_quiet) == (10, False, False)
    assert done.as_json()["quiet"] is False


def test_the_service_is_left_to_itself_again_while_that_brings_something() -> None:
    patience = Patience(passes=1, quiet=1, linger=0.0, lingers=3)
    once, _ = a_round(patience, [0, 1, 1])
    assert (once.quiet_passes, once.quiet_linger, once.blocks) == (True, True, 1)
    always, _ = a_round(patience, [0, 1, 2, 3])
    assert (always.quiet_passes, always.quiet_linger, always.blocks) == (True, False, 3)


def test_what_comes_while_it_is_left_to_itself_is_noticed() -> None:
    done, told = a_round(Patience(passes=1, quiet=1, linger=0.01), [0, 1, 1])
    assert (done.blocks, done.quiet_linger) == (1, False)
    assert "left to itself for 0 s: 0 blocks so far" in told


def test_a_round_takes_its_time_however_quiet_it_is() -> None:
    done, _ = a_round(Patience(passes=1, quiet=1, linger=0.0, least=0.02), [0])
    assert done.passes > 1
    assert done.seconds >= 0.02
