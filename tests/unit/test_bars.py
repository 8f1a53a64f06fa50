"""Charts of bars, and quantities as people read them."""

from __future__ import annotations

from typing import Any

import pytest

from dynacut.cli.bars import Bar, Chart, Group
from dynacut.cli.quantities import counted, shown, times


def drawn(unit: str, *values: float) -> dict[str, Any]:
    bars = [Bar(f"bar {index}", "look", [value]) for index, value in enumerate(values)]
    return Chart("title", "about", unit, [Group("", bars)]).drawn()


def test_a_bar_ends_at_the_logarithm_of_its_median() -> None:
    chart = Chart("t", "", "µs", [Group("", [Bar("a", "x", [100.0, 10_000.0, 1_000.0])])]).drawn()
    (group,) = chart["groups"]
    (row,) = group["rows"]
    assert (row["at"], row["text"]) == (50.0, "1.00 ms")
    assert [dot.at for dot in row["dots"]] == [0.0, 100.0, 50.0]
    assert [dot.text for dot in row["dots"]] == ["100 µs", "10.0 ms", "1.00 ms"]


@pytest.mark.parametrize(
    ("unit", "values", "ticks"),
    [
        ("µs", (20.0, 5_000_000.0), ["10 µs", "", "1 ms", "", "100 ms", "", "10 s"]),
        ("ms", (20.0, 90.0), ["10 ms", "100 ms"]),
        ("ns", (1.5, 700.0), ["1 ns", "10 ns", "100 ns", "1 µs"]),
        ("µs", (20.0, 500_000.0), ["10 µs", "", "1 ms", "", "100 ms", ""]),
        ("", (3.0, 150_000.0), ["1", "", "100", "", "10,000", "", "1,000,000"]),
        ("µs", (0.0,), ["1 µs", "10 µs"]),
        ("B", (5000.0, 2e8), ["1 kB", "", "100 kB", "", "10 MB", "", "1 GB"]),
    ],
)
def test_a_scale_has_the_powers_of_ten_around_the_values(
    unit: str, values: tuple[float, ...], ticks: list[str]
) -> None:
    assert [tick.text for tick in drawn(unit, *values)["ticks"]] == ticks


def test_a_value_of_zero_lies_at_the_edge() -> None:
    rows = drawn("µs", 0.0, 50.0)["groups"][0]["rows"]
    assert rows[0]["at"] == 0.0
    assert rows[0]["text"] == "0 µs"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0, "µs", "0 µs"),
        (163.4, "µs", "163 µs"),
        (4.2, "µs", "4.20 µs"),
        (4100.0, "µs", "4.10 ms"),
        (999_600.0, "µs", "1.00 s"),
        (1_240_000.0, "µs", "1.24 s"),
        (0.5, "µs", "500 ns"),
        (2_798, "ns", "2.80 µs"),
        (1.52, "ns", "1.52 ns"),
        (95.03, "ms", "95.0 ms"),
        (0, "B", "0"),
        (300, "B", "300 B"),
        (-8192, "B", "-8.00 KiB"),
        (1 << 30, "B", "1.00 GiB"),
        (3, "", "3"),
        (2.5, "", "2.5"),
        (138_000, "", "138,000"),
    ],
)
def test_numbers_for_people(value: float, unit: str, text: str) -> None:
    assert shown(value, unit) == text


def test_ratios_and_counts_for_people() -> None:
    assert [times(each) for each in (0.96, 1.52, 12.4, 996.0, 1234.0)] == ["1.0×", "1.5×", "12×", "1,000×", "1,200×"]
    assert [counted(1, "process", "processes"), counted(2_000, "thread")] == ["1 process", "2,000 threads"]
