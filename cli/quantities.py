"""Quantities as people read them: times, sizes of memory, numbers of things."""

from __future__ import annotations

_TO_US = {"ns": 1e-3, "us": 1.0, "µs": 1.0, "ms": 1e3, "s": 1e6}
_TIMES = ((1e6, "s"), (1e3, "ms"), (1.0, "µs"), (1e-3, "ns"))
_ROUNDED_UP = 0.9995
"""Shown as 1.00: what would be 1000 of the smaller unit."""
_SIZES = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def is_time(unit: str) -> bool:
    """Whether this is a unit of time."""
    return unit in _TO_US


def in_us(value: float, unit: str) -> float:
    """A time in µs."""
    return value * _TO_US[unit]


def shown(value: float, unit: str) -> str:
    """A number with the unit that suits its size: times in ns, µs, ms or s; bytes ("B") in binary multiples.

    unit: that of the value; of others than times and bytes nothing is shown.
    """
    if unit == "B":
        return _scaled(value, _SIZES) or (f"{value:.0f} B" if value else "0")
    if is_time(unit):
        return _scaled(in_us(value, unit), _TIMES) or "0 µs"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def counted(number: int, one: str, several: str = "") -> str:
    """A number of things, in words."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def times(ratio: float) -> str:
    """How many times as much, in two digits: 1.5×, 12×, 1,200×."""
    if ratio < 10:
        return f"{ratio:.1f}×"
    digits = len(f"{ratio:.0f}") - 2
    return f"{round(ratio, -digits):,.0f}×"


def _scaled(value: float, scales: tuple[tuple[float, str], ...]) -> str:
    """In the largest unit that it has one of; empty if it is less than one of the smallest."""
    for factor, name in scales:
        scaled = value / factor
        if abs(scaled) >= _ROUNDED_UP:
            whole = name in ("ns", "µs") and abs(scaled) >= 10
            digits = 0 if whole or abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
            return f"{scaled:.{digits}f} {name}"
    return ""
