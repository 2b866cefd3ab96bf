"""The figures of TOFU: forget quality and model utility, as published.

Source: Maini, Feng, Schwarzschild, Lipton, Kolter, "TOFU: a task of fictitious unlearning for LLMs", COLM 2024, section 2.2. The
probability of an answer is that of its tokens after the question, normalized by length: P(a|q)^(1/|a|) = exp(-loss).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from memsinks.errors import ConfigError, DataError

EXTRA = 'the figures of TOFU need rouge-score and scipy; pip install "memsinks[tofu]"'


def probability(losses: ArrayLike) -> np.ndarray:
    """exp(-loss) of answers, float64 [n], from their mean losses, nats a token."""
    return np.exp(-np.asarray(losses, np.float64))


def probability_among(losses: ArrayLike, wrong: ArrayLike) -> np.ndarray:
    """The share of the right answer in the probabilities of all choices, float64 [n] (real authors, world facts).

    Args:
        losses: [n], of the right answers. wrong: [n, wrong answers].
    """
    right, others = probability(losses), probability(wrong)
    return right / (right + others.sum(1))


def truth_ratio(paraphrased: ArrayLike, wrong: ArrayLike) -> np.ndarray:
    """Mean probability of the wrong answers over that of the right one in other words, float64 [n]: equation 1; low = it knows.

    Args:
        paraphrased: [n], losses. wrong: [n, wrong answers], losses.
    """
    return probability(wrong).mean(1) / probability(paraphrased)


def truth(ratio: ArrayLike) -> np.ndarray:
    """max(0, 1 - truth ratio), [n]: what of it counts towards utility."""
    return np.clip(1 - np.asarray(ratio, np.float64), 0, None)


def rouge_l(answers: Sequence[str], generated: Sequence[str]) -> np.ndarray:
    """ROUGE-L recall of each generated answer, float64 [n], stemmed as published.

    Raises:
        ConfigError: the package rouge-score is missing. DataError: not one generated text for each answer.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError(EXTRA) from error
    if len(answers) != len(generated):
        raise DataError(f"{len(answers)} answers have {len(generated)} generated ones")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return np.array([scorer.score(x, y)["rougeL"].recall for x, y in zip(answers, generated, strict=True)])


def model_utility(figures: Sequence[float]) -> float:
    """The harmonic mean of the nine figures: probability, ROUGE-L and truth on retained authors, real authors and world facts."""
    values = np.asarray(figures, np.float64)
    if not len(values) or not np.isfinite(values).all() or (values < 0).any():
        raise DataError(f"utility is a mean of numbers from 0 on, got {list(figures)}")
    return 0.0 if (values == 0).any() else float(len(values) / (1 / values).sum())


def forget_quality(ratios: ArrayLike, oracle: ArrayLike) -> float:
    """p of the two-sample Kolmogorov-Smirnov test between truth ratios on the forgotten and those of a model that never met them.

    1 = the same; below 0.05 a model is told from one that never met them.

    Raises:
        ConfigError: scipy is missing.
    """
    try:
        from scipy.stats import ks_2samp
    except ImportError as error:
        raise ConfigError(EXTRA) from error
    result = ks_2samp(np.asarray(ratios, np.float64), np.asarray(oracle, np.float64))
    return float(result.pvalue)  # type: ignore[union-attr]
