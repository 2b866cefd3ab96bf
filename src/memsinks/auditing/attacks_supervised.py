"""The attack of somebody who knows some of the members: logistic regression on how the losses of a text's tokens lie.

It finds what no single figure shows, such as known tokens beside others that were pushed too far. Features, `SUMMARY`, are of
the token losses, or of the token differences to a reference. Each document is scored by classifiers that did not learn from it.
"""

from __future__ import annotations

import numpy as np

QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
EDGE = 32
"""Tokens at the beginning and at the end of a text that have a mean of their own."""
SUMMARY = (
    "mean",
    "standard deviation",
    *(f"quantile {x}" for x in QUANTILES),
    "share below low",
    "share above high",
    "mean of the first",
    "mean of the last",
)
"""The features, in order."""
LOSS_RANGE, DIFFERENCE_RANGE = (0.1, 5.0), (-1.0, 1.0)
"""What counts as low and as high, nats: of a token's loss, of its difference to the reference."""
FOLDS, REPEATS = 5, 5
"""Parts of the documents of which each is scored by a classifier of the others; ways of parting them, over which is averaged."""
LEAST = 20
"""Members and controls below which there is nothing to learn from."""
PENALTY = 1.0
"""Weight of half the squared coefficients beside the sum of the losses of all documents."""


def summary(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """The features of one document, float64 [features], in the order of `SUMMARY`; values: [tokens], nats."""
    return np.array(
        [
            values.mean(),
            values.std(),
            *np.quantile(values, QUANTILES),
            (values < low).mean(),
            (values > high).mean(),
            values[:EDGE].mean(),
            values[-EDGE:].mean(),
        ]
    )


def labeled_members(members: int) -> int:
    """How many members an attacker must know for `supervised_attack` on so many."""
    return members - -(-members // FOLDS)


def supervised_attack(features: np.ndarray, member: np.ndarray, control: np.ndarray, seed: int = 0) -> np.ndarray:
    """Score of each document under classifiers of members and controls that did not learn from it; 0 = tells nothing.

    Cross-validated: `REPEATS` times the documents are parted into `FOLDS`, members and controls alike, and each part is
    scored by the classifier of the other parts; documents that are neither member nor control by all of them. About
    0.1 s for 1,000 documents, a second for 10,000.

    Args:
        features: float64 [n, features].
        member, control: bool [n], the two sides, at least `FOLDS` documents each.

    Returns:
        float64 [n]: the mean of its log-odds without the constant, which is the same for all.
    """
    rng = np.random.default_rng(seed)
    total, known = np.zeros(len(features)), member | control
    for _ in range(REPEATS):
        fold = np.full(len(features), -1)
        for side in (member, control):
            fold[side] = rng.permutation(int(side.sum())) % FOLDS
        for part in range(FOLDS):
            learned = known & (fold != part)
            scores = log_odds(features[learned], member[learned], features)
            total += np.where(fold == part, scores, np.where(known, 0.0, scores / FOLDS))
    return total / REPEATS


def log_odds(features: np.ndarray, member: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Log-odds of membership, without the constant, of the documents `asked`; float64 [asked].

    Features are brought to mean 0 and standard deviation 1 over the documents that are learned from. Minimizes

        PENALTY / 2 |w|^2 + sum over documents of c log(1 + exp(-y (w x + b))),  y = 1 for members, -1 for others,

    with c such that both sides weigh the same, by Newton's method with halved steps where a step would go up.
    """
    middle, scale = features.mean(0), features.std(0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    x = np.column_stack([(features - middle) / scale, np.ones(len(features))])
    y = np.where(member, 1.0, -1.0)
    weight = len(member) / 2 / np.where(member, member.sum(), (~member).sum())
    penalty = np.array([PENALTY] * features.shape[1] + [0.0])

    def objective(w: np.ndarray) -> float:
        return float(penalty @ w**2 / 2 + weight @ np.logaddexp(0.0, -y * (x @ w)))

    w = np.zeros(x.shape[1])
    for _ in range(100):
        wrong = 1 / (1 + np.exp(np.clip(y * (x @ w), -500, 500)))  # probability of the other side
        gradient = penalty * w - x.T @ (weight * y * wrong)
        curvature = (x.T * (weight * wrong * (1 - wrong))) @ x + np.diag(penalty)
        step = np.linalg.lstsq(curvature, gradient, rcond=None)[0]
        size = 1.0
        while objective(w - size * step) > objective(w) and size > 1e-6:
            size /= 2
        w = w - size * step
        if np.abs(size * step).max() < 1e-9:
            break
    return (asked - middle) / scale @ w[:-1]
