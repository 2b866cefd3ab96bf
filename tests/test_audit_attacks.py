"""The strong attacks against plain formulas and at both ends: nothing to see, all to see; and what each sees that others miss."""

from __future__ import annotations

import math

import numpy as np
import pytest
from audited import CONTROLS, MEMBERS, given, llama, losses, the_tokenizer
from hypothesis import given as over
from hypothesis import strategies as st

from memsinks.auditing.attacks import ATTACKS, HIDDEN_STATES, attack_scores, is_supervised, uses_reference
from memsinks.auditing.attacks_reference import (
    WINDOWS,
    differences,
    error_zone_attack,
    reference_attack,
    spread_attack,
    two_sided_attack,
    window_votes_attack,
)
from memsinks.auditing.attacks_supervised import (
    FOLDS,
    LEAST,
    SUMMARY,
    labeled_members,
    log_odds,
    summary,
    supervised_attack,
)
from memsinks.auditing.corpus import Corpus, read_corpus
from memsinks.auditing.membership import auc
from memsinks.auditing.scores import DocumentScore, score
from memsinks.auditing.settings import AuditSettings
from memsinks.data.documents import Document
from memsinks.research.compare.arm import Arm
from memsinks.research.compare.table import COLUMNS, rows

RNG = np.random.default_rng


def told(values: np.ndarray, members: int) -> float:
    return auc(values[:members], values[members:])


# Beside a reference


def test_a_model_beside_itself_gives_the_middle_value_of_each_attack() -> None:
    one = losses(*RNG(0).exponential(2, 50))
    difference = differences(one, one)
    assert reference_attack(one, one) == spread_attack(difference) == 0.0
    assert window_votes_attack(difference) == 0.5
    missed = given([3] * 50, (-RNG(0).exponential(2, 50)).tolist())
    assert error_zone_attack(missed, differences(missed, missed)) == 0.5
    assert two_sided_attack(np.zeros(9), np.arange(9) > 4).tolist() == [0.0] * 9


def test_a_text_that_is_surer_everywhere_or_nowhere() -> None:
    for sign, votes, zone in ((1.0, 1.0, 1.0), (-1.0, 0.0, 0.0)):
        one = given([2] * 60, (-3.0 + sign * RNG(1).exponential(1, 60)).tolist())
        difference = differences(one, losses(*[3.0] * 60))
        assert reference_attack(one, losses(*[3.0] * 60)) == pytest.approx(difference.mean())
        assert window_votes_attack(difference) == votes and error_zone_attack(one, difference) == zone
        even = given([2] * 60, [-3.0 + sign] * 60)
        assert spread_attack(differences(even, losses(*[3.0] * 60))) == 0.0


def test_the_formulas() -> None:
    rng = RNG(2)
    for count in (1, 2, 3, 7, 39, 40, 41, 130):
        rank, mine, its = rng.integers(0, 3, count), rng.normal(-2, 1, count), rng.normal(-2, 1, count)
        one, other = given(rank.tolist(), mine.tolist()), losses(*-its)
        d = one.logprob.astype(float) - other.logprob.astype(float)
        np.testing.assert_array_equal(differences(one, other), d)
        assert spread_attack(d) == pytest.approx(math.sqrt(((d - d.mean()) ** 2).mean()))
        gained = sum(x for x, r in zip(d, rank, strict=True) if r and x > 0)
        lost = -sum(x for x, r in zip(d, rank, strict=True) if r and x < 0)
        expected = 1.0 if not rank.any() else gained / (gained + lost)
        assert error_zone_attack(one, d) == pytest.approx(expected)
        sizes = [size for size in WINDOWS if size <= count] or [1]
        shares = [np.mean([d[at : at + size].mean() > 0 for at in range(count - size + 1)]) for size in sizes]
        assert window_votes_attack(d) == pytest.approx(np.mean(shares))


def test_a_recited_text_ranks_highest_in_the_error_zone() -> None:
    recited = given([0] * 20, [-0.1] * 20)
    unsure = losses(*[2.0] * 20)
    partly = given([1] + [0] * 18 + [1], [-1.0] + [-0.1] * 18 + [-2.5])
    values = [error_zone_attack(x, differences(x, unsure)) for x in (recited, partly)]
    assert values == [1.0, pytest.approx(1.0 / 1.5)]


def test_windows_are_spaced_geometrically() -> None:
    steps = np.diff(np.log(WINDOWS))
    assert (WINDOWS[0], WINDOWS[-1], len(WINDOWS)) == (2, 40, 10)
    assert np.abs(np.log(WINDOWS) - np.linspace(math.log(2), math.log(40), 10)).max() < 0.1 and (steps > 0).all()


def test_the_two_sided_attack_sees_what_went_too_far() -> None:
    rng = RNG(3)
    means, control = np.concatenate([rng.normal(-1.0, 0.1, 30), rng.normal(0.3, 0.1, 50)]), np.arange(80) >= 30
    assert told(means, 30) == 0.0 and told(two_sided_attack(means, control), 30) == 1.0
    known = np.where(control, means, -means + 0.6)
    assert told(known, 30) == told(two_sided_attack(known, control), 30) == 1.0


@over(st.lists(st.floats(-5, 5), min_size=2, max_size=12), st.lists(st.floats(-5, 5), min_size=1, max_size=4))
def test_the_median_of_a_control_is_that_of_the_others(controls, members) -> None:
    means = np.array([*members, *controls])
    found = two_sided_attack(means, np.arange(len(means)) >= len(members))
    others = [np.median(np.delete(controls, place)) for place in range(len(controls))]
    expected = [abs(x - np.median(controls)) for x in members] + [
        abs(x - y) for x, y in zip(controls, others, strict=True)
    ]
    assert found == pytest.approx(expected)


def test_controls_are_no_nearer_to_their_median_than_texts_of_their_kind() -> None:
    """Over many small audits in which there is nothing to see the area is one half."""
    areas = [told(two_sided_attack(RNG(seed).normal(size=16), np.arange(16) >= 8), 8) for seed in range(400)]
    assert np.mean(areas) == pytest.approx(0.5, abs=3 * np.std(areas) / 20)


# Supervised


def test_the_summary_of_a_document() -> None:
    values = np.arange(100.0)
    found = dict(zip(SUMMARY, summary(values, 10.0, 89.5), strict=True))
    assert found["mean"] == found["quantile 0.5"] == 49.5
    assert found["standard deviation"] == pytest.approx(math.sqrt((100**2 - 1) / 12))
    assert found["quantile 0.05"] == pytest.approx(4.95) and found["quantile 0.95"] == pytest.approx(94.05)
    assert (found["share below low"], found["share above high"]) == (0.1, 0.1)
    assert (found["mean of the first"], found["mean of the last"]) == (15.5, 83.5)
    assert summary(np.array([2.0]), 0.1, 5.0).tolist() == [2.0, 0.0] + [2.0] * 7 + [0.0, 0.0, 2.0, 2.0]


def test_log_odds_are_those_of_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    rng = RNG(4)
    member = np.arange(90) < 20
    for shift in (0.0, 1.0, 30.0):  # nothing to learn, something, told apart without fault
        features = rng.normal(size=(90, 5)) * [1, 10, 0.1, 1, 1] + 3
        features[member, 1] += 10 * shift
        standard = (features - features.mean(0)) / features.std(0)
        theirs = linear.LogisticRegression(C=1.0, class_weight="balanced", tol=1e-10, max_iter=10_000).fit(
            standard, member
        )
        np.testing.assert_allclose(log_odds(features, member, features), standard @ theirs.coef_[0], atol=1e-5)


def test_the_supervised_attack_at_both_ends() -> None:
    member = np.arange(120) < 40
    for seed in range(3):
        noise = RNG(seed).normal(size=(120, len(SUMMARY)))
        assert told(supervised_attack(noise, member, ~member), 40) == pytest.approx(0.5, abs=0.15)
        noise[member, 3] += 6
        assert told(supervised_attack(noise, member, ~member), 40) > 0.99
    assert supervised_attack(np.ones((120, 3)), member, ~member).tolist() == [0.0] * 120


def test_where_there_is_nothing_to_learn_the_area_is_one_half() -> None:
    member = np.arange(60) < 20
    areas = [told(supervised_attack(RNG(seed).normal(size=(60, 4)), member, ~member), 20) for seed in range(60)]
    assert np.mean(areas) == pytest.approx(0.5, abs=0.03)


def test_nobody_is_scored_by_what_learned_from_them() -> None:
    """A document with a feature of its own is told by nobody: only itself could have taught it."""
    member = np.arange(60) < 30
    features = np.eye(60)
    assert told(supervised_attack(features, member, ~member), 30) < 0.6
    inside = log_odds(features, member, features)
    assert told(inside, 30) == 1.0


def test_documents_on_no_side_are_scored_and_teach_nothing() -> None:
    rng = RNG(5)
    features = rng.normal(size=(100, 4))
    member, control = np.arange(100) < 30, np.arange(100) >= 50
    features[:50, 0] += 3
    first = supervised_attack(features, member, control)
    assert auc(first[30:50], first[50:]) > 0.95
    features[30:50] += 100
    again = supervised_attack(features, member, control)
    np.testing.assert_array_equal(again[member | control], first[member | control])


def test_how_many_members_must_be_known() -> None:
    for members in (5, 20, 96, 97):
        folds = np.bincount(np.arange(members) % FOLDS)
        assert labeled_members(members) == members - folds.max()


# All of them


def corpus_of(members: int, controls: int) -> Corpus:
    documents = [Document(f"{index} otters sat on a bridge", copies=4) for index in range(members)]
    others = [Document(f"{index} badgers sang in a lane", copies=0) for index in range(controls)]
    return read_corpus(documents, others, the_tokenizer(), AuditSettings())


@pytest.mark.parametrize(("members", "controls"), [(LEAST, LEAST), (LEAST - 1, LEAST), (LEAST, LEAST - 1)])
def test_every_attack_that_can_be_made_is_made(tmp_path, members, controls) -> None:
    corpus = corpus_of(members, controls)
    table, reference = (score(llama(seed), corpus.tokens, tmp_path / str(seed)) for seed in (0, 1))
    for beside in (None, reference):
        found = attack_scores(table, beside, corpus, AuditSettings())
        expected = [
            name for name in ATTACKS
            if name != HIDDEN_STATES
            and (beside is not None or not uses_reference(name)) and (min(members, controls) >= LEAST or not is_supervised(name))
        ]  # fmt: skip
        assert list(found) == expected
        assert {x.shape for x in found.values()} == {(members + controls,)}
        assert all(np.isfinite(x).all() for x in found.values())


def test_the_attacks_are_those_of_each_document(tmp_path) -> None:
    corpus = read_corpus(MEMBERS, CONTROLS, the_tokenizer(), AuditSettings())
    table, reference = (score(llama(seed), corpus.tokens, tmp_path / str(seed)) for seed in (0, 1))
    found = attack_scores(table, reference, corpus, AuditSettings())
    for index, (one, other) in enumerate(zip(table, reference, strict=True)):
        difference = differences(one, other)
        assert found["reference"][index] == reference_attack(one, other)
        assert found["reference, spread"][index] == spread_attack(difference)
        assert found["reference, error zone"][index] == error_zone_attack(one, difference)
        assert found["reference, window votes"][index] == window_votes_attack(difference)
    np.testing.assert_array_equal(found["reference, two-sided"], two_sided_attack(found["reference"], corpus.control))


def test_a_row_made_before_a_column_was_known_of_a_comparison_has_none_there() -> None:
    kept = [{"name": "ours", "seeds": [3], **{column: [0.5] for column in COLUMNS if column != "attack_alone"}}]
    (row,) = rows([Arm("ours", "standard", {})], {}, [], kept)
    assert row["attack_alone"] == [None] and row["attack_with_twin"] == [0.5]


def pushed(rng: np.random.Generator, known: bool) -> DocumentScore:
    """Losses of a text; where it is known, half of its tokens are near 0 and the others pushed up until the mean is restored."""
    values = rng.exponential(3, 100)
    if known:
        values[::2] /= 10
        values[1::2] *= 1.9
    return losses(*values)


def test_a_push_that_restores_the_mean_is_seen_under_it() -> None:
    """What the loss attack and the one-sided reference attack miss."""
    rng = RNG(6)
    member = np.arange(160) < 60
    models, references = [pushed(rng, known) for known in member], [pushed(rng, False) for _ in member]
    loss = np.array([-one.loss for one in models])
    assert told(loss, 60) == pytest.approx(0.5, abs=0.12)
    assert told(np.array([reference_attack(*x) for x in zip(models, references, strict=True)]), 60) == pytest.approx(
        0.5, abs=0.12
    )
    features = np.array([summary(-one.logprob, 0.1, 5.0) for one in models])
    assert told(supervised_attack(features, member, ~member), 60) > 0.95
