"""Can members be told from controls? Attacks on the loss, how well they do, and what the texts alone give away."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from memsinks.auditing.scores import DocumentScore
from memsinks.errors import DataError

WORD = re.compile(r"\w+|[^\w\s]")


def loss_attack(one: DocumentScore) -> float:
    """Mean log-probability per token, nats. Source: Yeom et al., "Privacy risk in machine learning", CSF 2018."""
    return -one.loss


def zlib_attack(one: DocumentScore, text: str) -> float:
    """Log-probability of the text over the bytes it compresses to, nats per byte.

    Source: Carlini et al., "Extracting training data from large language models", USENIX Security 2021, section 5.2.
    """
    return float(one.logprob.sum(dtype=np.float64)) / len(zlib.compress(text.encode()))


def min_k_attack(one: DocumentScore, share: float = 0.2) -> float:
    """Mean log-probability of the `share` least likely tokens (at least one), nats.

    Source: Shi et al., "Detecting pretraining data from large language models", ICLR 2024, eq. 1.
    """
    return _lowest(one.logprob, share)


def min_k_plus_attack(one: DocumentScore, share: float = 0.2) -> float:
    """As Min-K%, of (log p - mean) / std over the vocabulary at each place.

    Where the model is certain (std below 1e-6) the value is 0, as for a token of average surprise. Source: Zhang et al.,
    "Min-K%++", arXiv 2404.02936, eq. 3.
    """
    z = np.where(one.std > 1e-6, (one.logprob - one.mean) / np.maximum(one.std, 1e-6), 0.0)
    return _lowest(z, share)


def tokenizer_attack(tokens: int, text: str) -> float:
    """How well the tokenizer alone fits the text: less tokens per character.

    A vocabulary that was trained on a corpus with its copies has tokens for what is repeated; no weights needed.
    """
    return -tokens / len(text)


def _lowest(values: np.ndarray, share: float) -> float:
    count = max(1, int(share * len(values)))
    return float(np.partition(values, count - 1)[:count].mean(dtype=np.float64))


def auc(members: np.ndarray, controls: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a member scores above a control, ties counting half.

    1 = told apart without fault, 0.5 = not at all. The Mann-Whitney statistic over its maximum.
    """
    weights = np.ones((1, len(members) + len(controls)))
    return float(weighted_auc(members, controls, weights[:, : len(members)], weights[:, len(members) :])[0])


def weighted_auc(
    members: np.ndarray, controls: np.ndarray, member_weights: np.ndarray, control_weights: np.ndarray
) -> np.ndarray:
    """`auc` under many weightings of the documents at once (a bootstrap): weights [resamples, documents] -> [resamples]."""
    _both(members, controls)
    values, place = np.unique(np.concatenate([members, controls]), return_inverse=True)
    own, other = place[: len(members)], place[len(members) :]
    order = np.argsort(other, kind="stable")
    below = np.searchsorted(other[order], np.arange(len(values)))
    until = np.searchsorted(other[order], np.arange(len(values)), side="right")
    running = np.cumsum(control_weights[:, order], axis=1, dtype=np.float64)
    running = np.concatenate([np.zeros((len(running), 1)), running], axis=1)
    beaten = (running[:, below[own]] + running[:, until[own]]) / 2
    return (beaten * member_weights).sum(1) / (member_weights.sum(1, dtype=np.float64) * running[:, -1])


def tpr_at_fpr(members: np.ndarray, controls: np.ndarray, fpr: float) -> float:
    """Share of members above the lowest threshold that at most `fpr` of the controls exceed.

    Source: Carlini et al., "Membership inference attacks from first principles", S&P 2022.

    Returns:
        nan with fewer than 1 / fpr controls, of which none could be allowed.
    """
    _both(members, controls)
    allowed = int(fpr * len(controls) + 1e-9)
    if not allowed:
        return float("nan")
    if allowed >= len(controls):
        return 1.0
    threshold = np.sort(controls)[len(controls) - allowed - 1]
    return float((members > threshold).mean())


def roc(members: np.ndarray, controls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every threshold, [thresholds + 1] each, from (0, 0) to (1, 1)."""
    _both(members, controls)
    thresholds = np.unique(np.concatenate([members, controls]))[::-1]
    rates = [1 - np.searchsorted(np.sort(side), thresholds, side="left") / len(side) for side in (controls, members)]
    return tuple(np.concatenate([[0.0], rate]) for rate in rates)  # type: ignore


def word_numbers(texts: Iterable[str]) -> list[np.ndarray]:
    """Each text as the numbers of its words and punctuation marks, case ignored; int64 [words], at least one."""
    known: dict[str, int] = {}
    return [
        np.array([known.setdefault(word, len(known)) for word in WORD.findall(text.lower()) or [""]]) for text in texts
    ]


def blind_scores(
    members: Sequence[np.ndarray], controls: Sequence[np.ndarray], folds: int = 5, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Membership scores from the texts alone, no model asked: what an attack must beat to say anything about a model.

    Naive Bayes on words (Laplace smoothing, log-odds per word), each document scored by the folds it is not in. Words and
    not the model's tokens: a tokenizer that was trained on copies knows their words, see `tokenizer_attack`. After
    Das et al., "Blind baselines beat membership inference attacks for foundation models", arXiv 2406.16201.

    Args:
        members, controls: integer [words of the document] each; at least `folds` of both.

    Returns:
        Scores of the members and of the controls, float64.
    """
    if min(len(members), len(controls)) < folds:
        raise DataError(f"{folds} folds need as many documents on both sides, got {len(members)} and {len(controls)}")
    rng = np.random.default_rng(seed)
    sides = (members, controls)
    size = 1 + max(int(document.max()) for side in sides for document in side)
    fold = [rng.permutation(len(side)) % folds for side in sides]
    counts = np.zeros((2, folds, size))
    for label, side in enumerate(sides):
        for document, part in zip(side, fold[label], strict=True):
            counts[label, part] += np.bincount(document, minlength=size)
    others = 1 + counts.sum(1, keepdims=True) - counts
    log_odds = np.diff(np.log(others / others.sum(2, keepdims=True))[::-1], axis=0)[0]
    return tuple(
        np.array([log_odds[part][document].mean() for document, part in zip(side, fold[label], strict=True)])
        for label, side in enumerate(sides)
    )  # type: ignore


def _both(members: np.ndarray, controls: np.ndarray) -> None:
    if not len(members) or not len(controls):
        raise DataError(f"both sides are needed, got {len(members)} members and {len(controls)} controls")
