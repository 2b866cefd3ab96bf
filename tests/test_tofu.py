"""The figures of TOFU against cases made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

import memsinks as ms
from memsinks.research.tofu import (
    forget_quality,
    model_utility,
    probability,
    probability_among,
    rouge_l,
    truth,
    truth_ratio,
)

LOG2 = math.log(2)


def test_probabilities_by_hand():
    assert probability([0.0, LOG2, 2 * LOG2]) == pytest.approx([1, 1 / 2, 1 / 4])
    assert probability_among([LOG2], [[LOG2, 2 * LOG2, 2 * LOG2]]) == pytest.approx([0.5 / 1.5])
    assert probability_among([0.0], [[99.0, 99.0]]) == pytest.approx([1])


def test_the_truth_ratio_by_hand():
    ratio = truth_ratio([LOG2, LOG2], [[LOG2, LOG2], [2 * LOG2, 3 * LOG2]])
    assert ratio == pytest.approx([1, (1 / 4 + 1 / 8) / 2 / (1 / 2)])
    assert truth(ratio) == pytest.approx([0, 0.625]) and truth([3.0]) == [0]


def test_rouge_counts_what_of_the_answer_came():
    pytest.importorskip("rouge_score")
    assert rouge_l(["the cat sat"], ["the cat sat on a mat"]) == [1]
    assert rouge_l(["one two three four", "a b"], ["two four", "c"]) == pytest.approx([0.5, 0])
    with pytest.raises(ms.DataError, match="1 answers have 2 generated"):
        rouge_l(["a"], ["a", "b"])


def test_utility_is_a_harmonic_mean():
    assert model_utility([0.5] * 9) == pytest.approx(0.5)
    assert model_utility([1, 1, 0.5]) == pytest.approx(3 / 4)
    assert model_utility([1, 0, 1]) == 0
    with pytest.raises(ms.DataError, match="numbers from 0 on"):
        model_utility([1, float("nan")])


def test_forget_quality_at_both_ends():
    pytest.importorskip("scipy")
    same = np.linspace(0.1, 1, 40)
    assert forget_quality(same, same) == 1
    apart = forget_quality(same, same + 5)
    assert 0 < apart < 1e-20, "two samples of 40 that do not overlap: 2 / C(80, 40)"
    assert apart == pytest.approx(2 / math.comb(80, 40), rel=1e-6)
