"""Attacks that set the audited model against a reference, a model that never saw the documents: the twin.

All are computed from the token differences d_t = log p_model(t) - log p_reference(t), nats, which the scores of both models
hold: no forward pass beyond them. Higher = more like a member; where both models say the same, each gives its middle value.
"""

from __future__ import annotations

import numpy as np

from memsinks.auditing.scores import DocumentScore

WINDOWS = (2, 3, 4, 5, 8, 11, 15, 21, 29, 40)
"""Sizes of the windows that vote, tokens: spaced geometrically from 2 to 40."""


def differences(one: DocumentScore, reference: DocumentScore) -> np.ndarray:
    """d_t of a document, float64 [tokens], nats."""
    return one.logprob.astype(np.float64) - reference.logprob


def reference_attack(one: DocumentScore, reference: DocumentScore) -> float:
    """Mean of d_t: how much more likely the text is than under a model that never saw it, nats per token.

    Source: Carlini et al., USENIX Security 2021, section 5.2; Mireshghallah et al., EMNLP 2022.
    """
    return reference.loss - one.loss


def two_sided_attack(means: np.ndarray, control: np.ndarray) -> np.ndarray:
    """Distance of each document's mean difference from the median of the controls', nats per token; 0 = as a control.

    A text that was pushed too far away stands out as much as one that is still known: removal that overshoots is seen here
    and not by the one-sided attack. The median of a control is over the other controls, so that controls are no nearer to
    it than texts that had no part in it. Costs one sort.

    Args:
        means: [n], `reference_attack` of each document.
        control: bool [n], which are controls, at least 2.
    """
    middle = np.full(len(means), np.median(means[control]))
    middle[control] = _medians_of_the_others(means[control])
    return np.abs(means - middle)


def _medians_of_the_others(values: np.ndarray) -> np.ndarray:
    """For each value the median of all others, [n]."""
    order = np.argsort(values, kind="stable")
    ordered, place = values[order], np.empty(len(values), np.int64)
    place[order] = np.arange(len(values))
    low, high = (len(values) - 2) // 2, (len(values) - 1) // 2  # the middle one or two of the others, in order
    return (ordered[low + (place <= low)] + ordered[high + (place <= high)]) / 2


def spread_attack(difference: np.ndarray) -> float:
    """Standard deviation of d_t over the document, nats; 0 = all tokens moved alike.

    A push that restores the mean leaves tokens that are still known beside others that went too far.
    """
    return float(difference.std())


def error_zone_attack(one: DocumentScore, difference: np.ndarray) -> float:
    """P / (P + N) over the tokens that are not the model's first choice: P the sum of positive d_t, N of negative, in [0, 1].

    In the order of P / N. 1 = where the model errs, it errs less than the reference; so also where it errs nowhere, in a
    text that it recites. 1/2 = as the reference. Source: Ilic et al., "Powerful training-free membership inference against
    autoregressive language models" (EZ-MIA), arXiv 2601.12104.
    """
    missed = difference[one.rank > 0]
    gained, lost = float(missed.clip(min=0).sum()), float((-missed).clip(min=0).sum())
    if not len(missed):
        return 1.0
    return gained / (gained + lost) if gained + lost else 0.5


def window_votes_attack(difference: np.ndarray) -> float:
    """Share of the windows in which the model is surer than the reference (mean of d_t above 0; 0 counts half), in [0, 1].

    Windows of each size of `WINDOWS` that fits, at every place; the mean over the sizes of their shares. A text shorter
    than the smallest window is one window. Source: Chen et al., "Window-based membership inference attacks against
    fine-tuned large language models", arXiv 2601.02751.
    """
    sums = np.concatenate([[0.0], np.cumsum(difference)])
    sizes = [size for size in WINDOWS if size <= len(difference)] or [len(difference)]
    return float(np.mean([(1 + np.sign(sums[size:] - sums[:-size]).mean()) / 2 for size in sizes]))
