"""Attacks against plain formulas, AUC and rates against their definitions, and the attack that sees the texts alone."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
from audited import given, losses

from memsinks.auditing.membership import (
    auc,
    blind_scores,
    loss_attack,
    min_k_attack,
    min_k_plus_attack,
    roc,
    tokenizer_attack,
    tpr_at_fpr,
    weighted_auc,
    word_numbers,
    zlib_attack,
)
from memsinks.errors import DataError

RNG = np.random.default_rng


def sides(seed: int, ties: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Scores of members and of controls, with ties or without."""
    rng = RNG(seed)
    members, controls = rng.normal(0.5, 1, rng.integers(1, 40)), rng.normal(0, 1, rng.integers(1, 40))
    return (members.round(1), controls.round(1)) if ties else (members, controls)


# Attacks


def test_attacks_are_their_formulas() -> None:
    rng = RNG(0)
    for count in (1, 3, 4, 5, 7, 50):
        logprob, mean, std = -rng.exponential(2, count), -rng.exponential(2, count), 0.1 + rng.random(count)
        one, text = given([0] * count, logprob, mean, std), "a text, a text, a text" * count
        assert loss_attack(one) == pytest.approx(logprob.mean(), rel=1e-6)
        assert zlib_attack(one, text) == pytest.approx(logprob.sum() / len(zlib.compress(text.encode())), rel=1e-6)
        for share in (0.01, 0.2, 0.5, 0.99):
            least = max(1, math.floor(share * count))
            assert min_k_attack(one, share) == pytest.approx(np.sort(logprob)[:least].mean(), rel=1e-6)
            z = np.sort((logprob - mean) / std)[:least]
            assert min_k_plus_attack(one, share) == pytest.approx(z.mean(), rel=1e-5)


def test_attacks_at_both_ends() -> None:
    """Of a model that knows all for certain, and of one that knows nothing and so is surprised as it expects."""
    known, unknown = given([0] * 10, std=[0.0] * 10), given([9] * 10, [-5.0] * 10, [-5.0] * 10, [0.0] * 10)
    for attack in (loss_attack, min_k_attack, lambda one: zlib_attack(one, "text")):
        assert attack(known) == 0.0
        assert attack(unknown) < -0.5
    assert loss_attack(unknown) == min_k_attack(unknown) == -5.0
    assert min_k_plus_attack(known) == min_k_plus_attack(unknown) == 0.0


def test_min_k_counts_nothing_where_the_model_is_certain() -> None:
    one = given([0] * 5, [-3.0, -1e-3, 0.0, -1e-3, 0.0], [-1.0, 0.0, 0.0, 0.0, -4.0], [0.5, 1e-9, 0.0, 1e-7, 2.0])
    assert min_k_plus_attack(one, 0.2) == -4.0
    assert min_k_plus_attack(one, 0.99) == -1.0


def test_zlib_weighs_by_the_bytes_of_the_text() -> None:
    assert zlib_attack(losses(2.0, 1.0), "ü" * 7) == pytest.approx(-3.0 / len(zlib.compress(("ü" * 7).encode("utf-8"))))


# AUC


@pytest.mark.parametrize("seed", range(8))
def test_auc_is_the_share_of_pairs(seed) -> None:
    members, controls = sides(seed)
    pairs = [(a > b) + 0.5 * (a == b) for a in members for b in controls]
    assert auc(members, controls) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auc(controls, members) == pytest.approx(1 - np.mean(pairs), abs=1e-12)


def test_auc_at_both_ends() -> None:
    assert auc(np.array([3.0, 4.0]), np.array([1.0, 2.0, 2.5])) == 1.0
    assert auc(np.array([1.0, 2.0]), np.array([3.0])) == 0.0
    assert auc(np.ones(4), np.ones(3)) == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_weighted_auc_is_the_auc_of_the_repeated_sample(seed) -> None:
    rng, (members, controls) = RNG(seed + 100), sides(seed)
    weights = [rng.integers(0, 4, (20, len(side))).astype(np.uint16) for side in (members, controls)]
    for weight in weights:
        weight[:, 0] += 1
    found = weighted_auc(members, controls, *weights)
    assert found.shape == (20,)
    for row in range(20):
        repeated = [np.repeat(side, weight[row]) for side, weight in zip((members, controls), weights, strict=True)]
        assert found[row] == pytest.approx(auc(*repeated), abs=1e-12)


# Rates


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ties", [True, False])
def test_rate_is_the_best_of_all_thresholds(seed, ties) -> None:
    members, controls = sides(seed, ties)
    for fpr in (0.05, 0.1, 0.25, 0.5, 1.0):
        if fpr * len(controls) < 1:
            assert math.isnan(tpr_at_fpr(members, controls, fpr))
            continue
        every = [-np.inf, *members, *controls]
        best = max((members > t).mean() for t in every if (controls > t).mean() <= fpr + 1e-12)
        assert tpr_at_fpr(members, controls, fpr) == pytest.approx(best)


def test_rates_at_both_ends() -> None:
    low, high = np.zeros(100), np.ones(50)
    assert tpr_at_fpr(high, low, 0.01) == 1.0
    assert tpr_at_fpr(low, high, 0.02) == 0.0
    assert tpr_at_fpr(low, low, 0.01) == 0.0  # all are equal: none above a threshold that few controls exceed
    assert tpr_at_fpr(low, low, 1.0) == 1.0


def test_rates_need_enough_controls() -> None:
    members = np.arange(5.0)
    assert math.isnan(tpr_at_fpr(members, np.arange(99.0), 0.01))
    assert not math.isnan(tpr_at_fpr(members, np.arange(100.0), 0.01))
    assert math.isnan(tpr_at_fpr(members, np.arange(999.0), 0.001))
    assert not math.isnan(tpr_at_fpr(members, np.arange(1000.0), 0.001))


@pytest.mark.parametrize("seed", range(5))
def test_roc_runs_from_corner_to_corner_over_the_auc(seed) -> None:
    members, controls = sides(seed)
    false, true = roc(members, controls)
    assert (false[0], true[0], false[-1], true[-1]) == (0.0, 0.0, 1.0, 1.0)
    assert (np.diff(false) >= 0).all() and (np.diff(true) >= 0).all()
    assert ((true[1:] + true[:-1]) / 2 * np.diff(false)).sum() == pytest.approx(auc(members, controls), abs=1e-12)
    for threshold, x, y in zip(np.unique([*members, *controls])[::-1], false[1:], true[1:], strict=True):
        assert x == pytest.approx((controls >= threshold).mean())
        assert y == pytest.approx((members >= threshold).mean())


@pytest.mark.parametrize("measure", [auc, roc, lambda a, b: tpr_at_fpr(a, b, 0.1)])
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)])
def test_both_sides_are_needed(measure, sizes) -> None:
    with pytest.raises(DataError, match=f"got {sizes[0]} members and {sizes[1]} controls"):
        measure(*(np.ones(size) for size in sizes))


# The texts alone


def test_words_are_numbered_whatever_their_case() -> None:
    found = word_numbers(["The cat, the dog.", "A dog's (cat) 12", "", "  \n", "Öl öl"])
    assert [x.tolist() for x in found[:2]] == [[0, 1, 2, 0, 3, 4], [5, 3, 6, 7, 8, 1, 9, 10]]
    assert found[2].tolist() == found[3].tolist() == [11]
    assert found[4].tolist() == [12, 12]
    assert {x.dtype for x in found} == {np.dtype(np.int64)}


def test_a_tokenizer_that_fits_needs_fewer_tokens() -> None:
    assert tokenizer_attack(5, "a" * 20) == -0.25
    assert tokenizer_attack(1, "a" * 20) > tokenizer_attack(20, "a" * 20) == -1.0
    assert tokenizer_attack(4, "é漢") == -2.0


def texts(count: int, seed: int, extra: int | None = None) -> list[np.ndarray]:
    rng = RNG(seed)
    found = [rng.integers(0, 300, rng.integers(20, 60)).astype(np.int32) for _ in range(count)]
    return found if extra is None else [np.append(one, np.int32(extra)) for one in found]


def test_texts_of_one_kind_give_nothing_away() -> None:
    assert auc(*blind_scores(texts(400, 1), texts(400, 2))) == pytest.approx(0.5, abs=0.06)


def test_a_word_gives_the_members_away() -> None:
    members, controls = blind_scores(texts(200, 1, extra=300), texts(150, 2, extra=301))
    assert (len(members), len(controls)) == (200, 150)
    assert auc(members, controls) > 0.97
    assert auc(*blind_scores(texts(200, 1, extra=301), texts(150, 2, extra=300))) > 0.97


def test_a_document_is_not_judged_by_itself() -> None:
    """Each holds one word of its own, which tells nothing about the side of another."""
    count = 60
    members, controls = ([np.array([1, 2, 3, 10 + side * count + x]) for x in range(count)] for side in (0, 1))
    assert auc(*blind_scores(members, controls)) == pytest.approx(0.5, abs=0.15)


def test_blind_scores_against_a_plain_naive_bayes() -> None:
    """With as many folds as documents on a side, each is judged by all others but one of the other side."""
    rng = RNG(3)
    members, controls = ([rng.integers(low, 12, 6) for _ in range(4)] for low in (0, 4))
    found = blind_scores(members, controls, folds=4, seed=5)
    draw = RNG(5)
    fold = [draw.permutation(4), draw.permutation(4)]
    size = 1 + max(int(x.max()) for x in (*members, *controls))
    for label, side in enumerate((members, controls)):
        for index, document in enumerate(side):
            logs = []
            for other, its in enumerate((members, controls)):
                kept = np.concatenate([x for x, f in zip(its, fold[other], strict=True) if f != fold[label][index]])
                counts = 1 + np.array([(kept == token).sum() for token in range(size)])
                logs.append(np.log(counts / counts.sum()))
            assert found[label][index] == pytest.approx((logs[0] - logs[1])[document].mean(), abs=1e-12)


def test_blind_scores_follow_the_seed_alone() -> None:
    sides = texts(30, 1), texts(30, 2)
    a, b, c = (blind_scores(*sides, seed=seed)[0].tolist() for seed in (0, 0, 1))
    assert a == b != c


@pytest.mark.parametrize("sizes", [(4, 9), (9, 4), (0, 9)])
def test_blind_scores_need_a_document_for_each_fold(sizes) -> None:
    with pytest.raises(DataError, match=f"5 folds need as many documents on both sides, got {sizes[0]} and {sizes[1]}"):
        blind_scores(*(texts(size, 0) for size in sizes))
