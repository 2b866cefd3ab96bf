"""Intervals: known values, coverage, pairing; equivalence that needs both a small difference and a narrow interval."""

from __future__ import annotations

import math

import numpy as np
import pytest

from memsinks.auditing.uncertainty import Equivalence, Estimate, Resamples, Z, equivalence, estimate, strata, wilson

# Wilson


def test_wilson_of_known_cases() -> None:
    """2 of 10, 9 of 27 and 0 of 20, worked out by hand from the formula of Wilson (1927)."""
    for hits, asked, low, high in ((2, 10, 0.0567, 0.5098), (9, 27, 0.1864, 0.5218), (0, 20, 0.0, 0.1611)):
        found = wilson(hits, asked)
        assert found.value == hits / asked
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("hits", "asked"), [(0, 5), (1, 7), (3, 7), (50, 100), (99, 100), (7, 7)])
def test_the_ends_of_wilson_are_where_the_normal_test_turns(hits, asked) -> None:
    found = wilson(hits, asked)
    assert found.low <= found.value <= found.high
    for end in {found.low, found.high} - {0.0, 1.0}:
        assert abs(hits / asked - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / asked), rel=1e-9)


def test_wilson_at_both_ends() -> None:
    for asked in range(1, 60):  # exactly, also where rounding leaves something
        assert (wilson(0, asked).low, wilson(asked, asked).high) == (0.0, 1.0)
    none, all_of_them = wilson(0, 8), wilson(8, 8)
    assert (none.value, none.low) == (0.0, 0.0)
    assert (all_of_them.value, all_of_them.high) == (1.0, 1.0)
    assert none.high == pytest.approx(1 - all_of_them.low) == pytest.approx(Z**2 / (8 + Z**2))
    assert all(math.isnan(x) for x in (wilson(0, 0).value, wilson(0, 0).low, wilson(0, 0).high))


# Bootstrap


def test_resamples_keep_the_size_of_each_group() -> None:
    groups = np.array([-1] * 7 + [1] * 20 + [4] + [16] * 3)
    resamples = Resamples(groups, 200, 0)
    assert resamples.weights.shape == (200, 31)
    for group in np.unique(groups):
        assert (resamples.weights[:, groups == group].sum(1) == (groups == group).sum()).all()
    assert (resamples.weights[:, groups == 4] == 1).all()
    assert len({row.tobytes() for row in resamples.weights}) == 200
    assert resamples.weights[:, groups == 1].mean(0) == pytest.approx(np.ones(20), abs=0.35)


def test_resamples_follow_the_seed() -> None:
    groups = np.repeat([1, 2], 10)
    a, b, c = (Resamples(groups, 50, seed).weights for seed in (3, 3, 4))
    assert (a == b).all()
    assert (a != c).any()


def test_means_are_those_of_the_repeated_documents() -> None:
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=12), np.repeat([0, 5, 9], 4)
    resamples = Resamples(groups, 30, 1)
    chosen = groups > 0
    found = resamples.means(values, chosen)
    assert found.shape == (30,)
    for row in range(30):
        assert found[row] == pytest.approx(np.repeat(values[chosen], resamples.weights[row, chosen]).mean())


def test_figures_of_one_resample_are_paired() -> None:
    """A constant shift has no interval, however far the documents lie apart."""
    resamples, chosen = Resamples(np.zeros(50, int), 100, 0), np.ones(50, bool)
    values = np.random.default_rng(0).normal(0, 100, 50)
    difference = resamples.means(values + 0.25, chosen) - resamples.means(values, chosen)
    assert difference == pytest.approx(np.full(100, 0.25))
    assert resamples.means(values, chosen).std() > 5


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng, covered, chosen = np.random.default_rng(0), 0, np.ones(40, bool)
    resamples = Resamples(np.zeros(40, int), 400, 0)
    for _ in range(300):
        values = rng.normal(2.0, 1.0, 40)
        found = estimate(values.mean(), resamples.means(values, chosen))
        covered += found.low <= 2.0 <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def test_the_interval_is_the_middle_95_percent() -> None:
    found = estimate(7.0, np.arange(1001.0))
    assert (found.value, found.low, found.high) == pytest.approx((7.0, 25.0, 975.0))
    assert estimate(0.5, np.array([np.nan, 0.0, 1.0, np.nan])).high == pytest.approx(0.975)
    assert estimate(3.0, np.array([])) == Estimate(3.0, 3.0, 3.0)
    none = estimate(math.nan, np.full(5, np.nan))
    assert all(math.isnan(x) for x in (none.value, none.low, none.high))
    assert str(Estimate(0.5, 0.25, 1.0)) == "0.500 [0.250, 1.000]"


# Equivalence


def test_the_same_is_equivalent() -> None:
    found = equivalence("loss", "twin", 0.0, np.zeros(100), 0.03)
    assert found.equivalent
    assert found.p == pytest.approx(1 / 101)
    assert found.interval == (0.0, 0.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_far_apart_is_not_equivalent(sign) -> None:
    found = equivalence("loss", "twin", sign * 0.5, np.full(100, sign * 0.5), 0.03)
    assert not found.equivalent
    assert found.p == 1.0
    assert not equivalence("loss", "twin", 0.03, np.full(100, sign * 0.03), 0.03).equivalent  # at the margin


def test_a_wide_interval_around_nothing_is_not_equivalent() -> None:
    found = equivalence("loss", "twin", 0.0, np.random.default_rng(0).normal(0, 0.1, 1000), 0.03)
    assert not found.equivalent
    assert 0.3 < found.p < 0.5


def test_different_from_nothing_and_equivalent_at_once() -> None:
    found = equivalence("loss", "twin", 0.01, np.random.default_rng(0).normal(0.01, 0.002, 1000), 0.03)
    assert found.interval[0] > 0
    assert found.equivalent


@pytest.mark.parametrize("shift", np.linspace(-0.04, 0.04, 9))
@pytest.mark.parametrize("width", [0.001, 0.01, 0.02])
def test_equivalent_where_the_90_percent_interval_lies_within_the_margin(shift, width) -> None:
    resampled = np.random.default_rng(1).normal(shift, width, 2000)
    found = equivalence("loss", "twin", shift, resampled, 0.03)
    assert found.interval == pytest.approx(tuple(np.quantile(resampled, [0.05, 0.95])))
    assert found.equivalent == (found.interval[0] > -0.03 and found.interval[1] < 0.03)


def test_one_side_beyond_the_margin_decides() -> None:
    resampled = np.concatenate([np.zeros(94), np.full(6, 1.0)])
    for values in (resampled, -resampled):
        found = equivalence("loss", "twin", 0.0, values, 0.5)
        assert found.p == pytest.approx(7 / 101)
        assert not found.equivalent
    both = np.concatenate([np.zeros(94), np.full(3, 1.0), np.full(3, -1.0)])
    assert equivalence("loss", "twin", 0.0, both, 0.5).equivalent


def test_equivalence_is_below_five_percent() -> None:
    assert not Equivalence("x", "twin", 0.0, (0.0, 0.0), 0.1, 0.05).equivalent
    assert Equivalence("x", "twin", 0.0, (0.0, 0.0), 0.1, 0.0499).equivalent


# Groups that are drawn


def test_rare_numbers_of_copies_are_drawn_together() -> None:
    controls = [-1] * 4
    for copies, expected in (
        ([4] * 12 + [16] * 8, [4] * 12 + [16] * 8),  # each often enough
        ([2, 3, 5, 9], [2] * 4),
        ([4] * 12 + [16] * 3 + [64] * 2, [4] * 17),  # too few for a group of their own join the next
        ([4] * 12 + [16] * 4 + [64] * 6, [4] * 12 + [16] * 10),
        ([4] * 4 + [16] * 5 + [64] * 6, [4] * 15),  # and what is left over the one before
        ([7], [7]),
    ):
        levels = np.array(controls + copies)
        assert strata(levels, levels < 0).tolist() == controls + expected
    once = np.array([-1, -1, 1, 1, 8, 8])
    assert strata(once, once < 2).tolist() == once.tolist()  # texts met once are no targets


@pytest.mark.parametrize(
    "copies", [np.arange(2, 32), np.repeat(np.arange(2, 17), 2), np.minimum(40, 60 // np.arange(1, 31)) + 1]
)
def test_intervals_cover_the_mean_whatever_the_numbers_of_copies(copies) -> None:
    """Where each document has its own number of copies the bootstrap by number shows no variance at all."""
    rng, covered = np.random.default_rng(0), 0
    weights = Resamples(strata(copies, copies < 0), 400, 0)
    for _ in range(200):
        values = rng.normal(size=len(copies))
        found = estimate(values.mean(), weights.means(values, copies > 0))
        covered += found.low <= 0.0 <= found.high
    assert covered / 200 > 0.88
