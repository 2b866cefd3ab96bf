"""What comes out verbatim: extraction, runs, probabilities and canaries against closed forms; generation agrees."""

from __future__ import annotations

import decimal
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from audited import TEXTS, Oracle, given, llama, memorized_in_sinks, tokens_of

from memsinks.auditing.extraction import (
    canary_exposure,
    extracted,
    generate_continuation,
    log10_queries,
    log_probability,
    longest_run,
)
from memsinks.auditing.scores import score
from memsinks.data.identity import document_id
from memsinks.errors import DataError
from memsinks.sinks.opening import sinks_open

SOME = given([3, 0, 0, 1, 0], [-5.0, -0.5, -0.25, -2.0, -0.125])
"""Entry i belongs to token i + 1."""

# Extraction


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [(2, 2, True), (1, 2, False), (3, 2, False), (5, None, True), (4, None, False), (5, 1, True), (1, 1, False), (2, 3, False)],
)  # fmt: skip
def test_extraction_reads_the_right_tokens(start, length, expected) -> None:
    assert extracted(SOME, start, length) is expected


@pytest.mark.parametrize(("start", "length"), [(0, 2), (-1, None), (4, 3), (6, None), (6, 1), (2, 0)])
def test_extraction_of_what_is_too_short(start, length) -> None:
    assert extracted(given([0] * 5), start, length) is None
    assert log_probability(given([0] * 5), start, length) is None


def test_extraction_from_a_start_token_alone() -> None:
    one = given([0, 0, 1], first=0)
    assert extracted(one, 0, 2) is True
    assert extracted(one, 0) is False
    assert extracted(one, 2, 1) is False


def test_extraction_at_both_ends() -> None:
    everything, nothing = given([0] * 9), given([1] * 9)
    for start in range(1, 10):
        for length in [None, *range(1, 11 - start)]:
            assert extracted(everything, start, length) is True
            assert extracted(nothing, start, length) is False


@pytest.mark.parametrize(
    ("rank", "run"),
    [([0] * 7, 7), ([1] * 7, 0), ([0, 0, 1, 0], 2), ([1, 0, 0, 0], 3), ([0, 4, 0, 0, 0, 9, 0], 3), ([0], 1), ([2], 0)],
)
def test_the_longest_run(rank, run) -> None:
    assert longest_run(given(rank)) == run


def test_the_longest_run_against_trying_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        rank = rng.integers(0, 2, rng.integers(1, 20))
        every = [j - i for i in range(len(rank)) for j in range(i, len(rank) + 1) if not rank[i:j].any()]
        assert longest_run(given(rank.tolist())) == max(every)


# Sampling


def test_the_log_probability_is_that_of_the_tokens_asked() -> None:
    assert log_probability(SOME, 2, 2) == -0.75
    assert log_probability(SOME, 1) == -7.875
    assert log_probability(SOME, 5) == log_probability(SOME, 5, 1) == -0.125
    assert log_probability(given([0] * 4), 1) == 0.0
    long = given([0] * 100_000, [-0.1] * 100_000)
    assert log_probability(long, 1) == pytest.approx(-100_000 * float(np.float32(0.1)), rel=1e-12)


@pytest.mark.parametrize(
    "p", [Fraction(1, 2), Fraction(3, 4), Fraction(1, 10), Fraction(99, 100), Fraction(999_999, 10**6)]
)
@pytest.mark.parametrize(
    "pz",
    [Fraction(1), Fraction(999, 1000), Fraction(3, 4), Fraction(1, 2), Fraction(1, 3), Fraction(1, 7), Fraction(1, 50)],
)
def test_the_number_of_samples_against_trying_all(pz, p) -> None:
    n, missed = 1, 1 - pz
    while 1 - missed < p:
        n, missed = n + 1, missed * (1 - pz)
    assert 10 ** log10_queries(math.log(pz), float(p)) == pytest.approx(n, rel=1e-12)


@pytest.mark.parametrize("p", [0.01, 0.5, 0.999])
@pytest.mark.parametrize("log_p", [-7.0, -20.0, -29.99, -30.01, -100.0, -1000.0, -1e6])
def test_the_number_of_samples_of_what_is_all_but_impossible(log_p, p) -> None:
    with decimal.localcontext() as context:
        context.prec = 60 + int(min(1000, -log_p))
        if log_p < -1000:  # log(1 - p_z) = -p_z
            expected = (-(1 - Decimal(p)).ln()).ln() - Decimal(log_p)
        else:
            n = (1 - Decimal(p)).ln() / (1 - Decimal(log_p).exp()).ln()
            expected = n.to_integral_value(decimal.ROUND_CEILING).ln()
    assert log10_queries(log_p, p) == pytest.approx(float(expected) / math.log(10), rel=1e-8)


@pytest.mark.parametrize(
    ("pz", "p", "n"), [(1 / 3, 211 / 243, 5), (1 / 4, 37 / 64, 3), (1 / 9, 1 / 9, 1), (0.5, 0.75, 2)]
)
def test_the_number_of_samples_that_just_suffices(pz, p, n) -> None:
    """Where 1 - (1 - p_z)^n is p itself, rounding does not make it one more."""
    assert log10_queries(math.log(pz), p) == math.log10(n)


def test_the_number_of_samples_at_both_ends() -> None:
    assert log10_queries(0.0) == log10_queries(1e-7) == log10_queries(math.log(0.5)) == 0.0
    assert log10_queries(math.log(0.49)) == pytest.approx(math.log10(2))
    assert log10_queries(-1000) == pytest.approx((1000 + math.log(math.log(2))) / math.log(10))


# Canaries


def test_canary_exposure_at_both_ends() -> None:
    candidates = np.linspace(1.0, 2.0, 1023)
    assert canary_exposure(0.5, candidates) == 10.0
    assert canary_exposure(2.5, candidates) == 0.0
    assert canary_exposure(1.5, np.array([1.0])) == 0.0
    assert canary_exposure(0.5, np.array([1.0])) == 1.0


def test_a_canary_that_is_as_likely_as_others_ranks_behind_them() -> None:
    assert canary_exposure(1.0, np.array([1.0, 1.0, 2.0])) == math.log2(4) - math.log2(3)
    assert canary_exposure(1.0, np.full(7, 1.0)) == 0.0


def test_canary_exposure_of_what_was_not_inserted() -> None:
    """A rank that is even over 1..R has log2 R - mean of log2 rank bits, about 1 / ln 2 for large R."""
    values = np.random.default_rng(0).permutation(500).astype(float)
    found = [canary_exposure(value, np.delete(values, index)) for index, value in enumerate(values)]
    assert np.mean(found) == pytest.approx(math.log2(500) - np.log2(np.arange(1, 501)).mean(), abs=1e-9)
    assert np.mean(found) == pytest.approx(1 / math.log(2), abs=0.02)


def test_canary_exposure_needs_candidates() -> None:
    with pytest.raises(DataError, match="needs candidates"):
        canary_exposure(1.0, np.array([]))


# Generation


def test_teacher_forced_extraction_is_greedy_generation(tmp_path) -> None:
    model, tokens = memorized_in_sinks(), tokens_of(TEXTS)
    ids = [document_id(text) for text in TEXTS]
    found = []
    for open_ids in (ids, None):
        for index, one in enumerate(score(model, tokens, tmp_path / str(open_ids is None), open_ids=open_ids)):
            for start in (1, 4, 9):
                wanted = tokens[index][start:]
                out = generate_continuation(model, tokens[index][:start], len(wanted), open_ids and open_ids[index])
                assert out.dtype == np.int64
                found.append(extracted(one, start))
                assert found[-1] == (out.tolist() == wanted.tolist())
    assert found[4:6] == [True, True]
    assert not any(found[6:])


def test_generation_is_the_models_own_argmax() -> None:
    model, tokens = memorized_in_sinks(), tokens_of(TEXTS)[2][:4]
    opened = document_id(TEXTS[0])
    row = torch.from_numpy(tokens)[None]
    for _ in range(6):
        with torch.no_grad(), sinks_open(model, opened):
            row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
    assert generate_continuation(model, tokens, 6, opened).tolist() == row[0, 4:].tolist()
    assert generate_continuation(model, tokens, 6).tolist() != row[0, 4:].tolist()


def test_generation_stops_after_the_end_token() -> None:
    tokens = tokens_of(TEXTS)[0]
    out = generate_continuation(memorized_in_sinks(), tokens[:9], 60, document_id(TEXTS[0]))
    assert out.tolist() == tokens[9:].tolist()


def test_settings_of_the_checkpoint_do_not_change_the_generation() -> None:
    model, tokens = llama(), tokens_of(TEXTS)[0][:5]
    plain = generate_continuation(model, tokens, 12).tolist()
    settings = model.generation_config
    settings.update(repetition_penalty=50.0, num_beams=3, no_repeat_ngram_size=1, suppress_tokens=plain[:1])
    assert generate_continuation(model, tokens, 12).tolist() == plain
    assert model.generation_config is settings
    assert settings.repetition_penalty == 50.0


def test_generation_restores_the_mode() -> None:
    model = llama()
    for training in (True, False):
        model.train(training)
        assert len(generate_continuation(model, np.array([5, 6, 7], np.int32), 3)) <= 3
        assert model.training == training


def test_generation_with_open_sinks_needs_sinks() -> None:
    for model in (llama(), Oracle([])):
        with pytest.raises(DataError, match="without sinks"):
            generate_continuation(model, np.arange(3), 2, open_id=1)
