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


MANY = 8
"""Different ids that must all look alike before they are taken for rounded."""


def rounded_ids(name: str, ids: np.ndarray) -> list[str]:
    """Ids (int64, any shape) that went through float64, which keeps 53 of their 63 bits.

    Found where at least `MANY` different ids are above 2^56, all are values of float64, and some need its last bit: of ids
    that hash texts one in a thousand is such a value, and ids made by hand (a source shifted left, a number added) do not
    need the last bit.
    """
    large = ids[ids >= 2**56]
    if large.size < MANY or (large & 15).any():
        return []
    floats = ids.astype(np.float64)
    with np.errstate(invalid="ignore"):  # 2^63 - 1 becomes 2^63
        exact = floats.astype(np.int64) == ids
    last_bit = np.frexp(large.astype(np.float64))[0] * 2.0**53 % 2 == 1
    if not exact.all() or not last_bit.any() or len(np.unique(large)) < MANY:
        return []
    return [
        f"{name} have all been rounded to 53 bits, e.g. {large.flat[0]}: they went through floats (pandas makes floats of "
        "integers in a column with gaps) and would open other sinks; read them as int64"
    ]
