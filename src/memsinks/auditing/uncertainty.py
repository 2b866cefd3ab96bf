"""How sure are the figures? Bootstrap over documents, Wilson intervals of shares, equivalence by two one-sided tests."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
Z = 1.959963984540054
"""Two-sided normal quantile of `LEVEL`."""
KNOWN = 0.9
"""Share of the resamples that must have a value for a test."""
STRATUM = 8
"""Documents of a group that is drawn by itself, at least: of n, the bootstrap shows (n - 1) / n of the variance."""
ENOUGH = 5
"""Documents or controls below which nothing is said from intervals."""
AT_ONCE = 100
"""Resamples computed at once, so that memory does not follow resamples x documents."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95% interval over documents."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


UNKNOWN = Estimate(math.nan, math.nan, math.nan)
"""A figure that does not exist: nothing was asked, or there was nothing to divide by."""


@dataclass(frozen=True)
class Equivalence:
    """Whether a difference lies within a margin: two one-sided tests at 5%.

    name: what is compared; other: with which model. p: the larger of the two one-sided p values; `equivalent` where it is
    below 0.05. interval: the 90% interval that belongs to it. A difference can be different from 0 and equivalent at once,
    or neither.
    """

    name: str
    other: str
    difference: float
    interval: tuple[float, float]
    margin: float
    p: float

    @property
    def equivalent(self) -> bool:
        return self.p < 0.05


def strata(levels: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """The group that each document is drawn in: its level; rare ones, that fewer than `STRATUM` have, are put together, and with
    the next larger one if they are still too few.

    Args:
        levels: int [n], the number of copies, -1 for controls.
        apart: bool [n], whether a document is no target of the summary figures; its group is its level.

    Returns:
        int [n], the least level of each group.
    """
    groups: list[list[int]] = [[]]
    known, counts = np.unique(levels[~apart], return_counts=True)
    size = dict(zip(known.tolist(), counts.tolist(), strict=True))
    for level in sorted(size, key=lambda level: (size[level], level)):
        if sum(size[x] for x in groups[-1]) >= STRATUM:
            groups.append([])
        groups[-1].append(level)
    if len(groups) > 1 and sum(size[x] for x in groups[-1]) < STRATUM:
        rest = groups.pop()
        groups[-1] += rest
    found = levels.copy()
    for group in groups:
        found[~apart & np.isin(levels, group)] = min(group, default=0)
    return found


class Resamples:
    """Bootstrap weights of documents, the same for every figure, so that figures of one resample are paired.

    Documents are drawn with replacement within each group (see `strata`), so group sizes stay.

    Args:
        groups: int [documents], the group of each.
        count: resamples.
        seed: of the draws.
    """

    def __init__(self, groups: np.ndarray, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.weights = np.zeros((count, len(groups)), np.uint16)
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group)
            for row in self.weights:
                row[members] = np.bincount(rng.integers(len(members), size=len(members)), minlength=len(members))

    def means(self, values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Mean of ``values[chosen]`` in each resample; values [documents], chosen bool [documents] -> [resamples]."""
        wanted, found = values[chosen].astype(np.float64), np.empty(len(self.weights))
        for at in range(0, len(found), AT_ONCE):
            weights = self.weights[at : at + AT_ONCE, chosen].astype(np.float64)
            with np.errstate(invalid="ignore"):  # nan where none of them was drawn
                found[at : at + AT_ONCE] = weights @ wanted / weights.sum(1)
        return found


def estimate(value: float, resampled: np.ndarray) -> Estimate:
    """A figure with its percentile interval; resampled: its value in each resample, nan where it has none."""
    known = resampled[~np.isnan(resampled)]
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(known) else (value, value)
    return Estimate(float(value), float(low), float(high))


def wilson(hits: int, asked: int) -> Estimate:
    """A share with its Wilson score interval, which does not shrink to nothing at 0 of n; nan where nothing was asked.

    Source: Wilson, JASA 22, 1927; Brown, Cai, DasGupta, Statistical Science 16, 2001, eq. 4.
    """
    if not asked:
        return UNKNOWN
    share, z2 = hits / asked, Z * Z / asked
    center = (share + z2 / 2) / (1 + z2)
    half = Z / (1 + z2) * math.sqrt(share * (1 - share) / asked + z2 / (4 * asked))
    return Estimate(share, max(0.0, center - half) if hits else 0.0, min(1.0, center + half) if hits < asked else 1.0)


def equivalence(name: str, other: str, value: float, resampled: np.ndarray, margin: float) -> Equivalence:
    """Two one-sided tests of |difference| < margin on its bootstrap distribution; not shown where that is mostly unknown (nan).

    The p value is the share of resamples at or beyond the margin, with 1 added on both sides of the fraction, so it is
    never below 1 / (resamples + 1). Source: Schuirmann, J. Pharmacokinetics and Biopharmaceutics 15, 1987.
    """
    drawn, resampled = len(resampled), resampled[~np.isnan(resampled)]
    if len(resampled) < KNOWN * drawn:
        return Equivalence(name, other, float(value), (float("nan"), float("nan")), margin, 1.0)
    beyond = max(int((resampled >= margin).sum()), int((resampled <= -margin).sum()))
    low, high = np.quantile(resampled, [0.05, 0.95])
    p = (1 + beyond) / (1 + len(resampled))
    return Equivalence(name, other, float(value), (float(low), float(high)), margin, p)
