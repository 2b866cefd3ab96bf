"""Numbers in range: each check gives a list of problems, empty where there is none, for `refuse` to raise at once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np


def is_int(value: Any) -> bool:
    """Whether `value` is an integer of Python or numpy; a bool is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether `value` is a real number of Python or numpy other than nan; a bool is none."""
    return (is_int(value) or isinstance(value, float | np.floating)) and not math.isnan(value)


def int_at_least(name: str, value: Any, least: int) -> list[str]:
    """An integer of at least `least`."""
    return [] if is_int(value) and value >= least else [f"{name} must be an int of at least {least}, got {value!r}"]


def at_least(name: str, value: Any, least: float) -> list[str]:
    """A finite number of at least `least`."""
    good = is_number(value) and least <= value < math.inf
    return [] if good else [f"{name} must be a finite number of at least {least:g}, got {value!r}"]


def positive(name: str, value: Any) -> list[str]:
    """A finite number above 0."""
    good = is_number(value) and 0 < value < math.inf
    return [] if good else [f"{name} must be positive and finite, got {value!r}"]


def share(name: str, value: Any) -> list[str]:
    """A number in [0, 1]."""
    return [] if is_number(value) and 0 <= value <= 1 else [f"{name} must lie in [0, 1], got {value!r}"]


def one_of(name: str, value: Any, known: Iterable[Any]) -> list[str]:
    """One of the known values."""
    known = list(known)
    return [] if value in known else [f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}"]
