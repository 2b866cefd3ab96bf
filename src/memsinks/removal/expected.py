"""What the loss of a text should be: predicted from texts of its kind that were met at most once.

Some of those texts count words: the mean surprise of a text's tokens under their frequencies, alone and after the one and the
two tokens before (interpolated), says how hard it is. Others say, by least squares, what loss the model has on a text so hard.
Nothing has to be recorded in training, and no other model is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from memsinks.batch import IGNORED
from memsinks.errors import DataError
from memsinks.training.evaluate import AnyRows, batches, losses

LEAST = 40
"""Texts below which nothing is predicted: five numbers are fitted to half of them or more."""
PRIOR = 0.5, 10.0, 5.0
"""Weight of the coarser estimate beside the counts of single tokens, pairs and triples."""


@dataclass(frozen=True)
class Expected:
    """Predicted losses.

    losses: float64 [documents], nats. others: measured loss of the other texts, float64. spread: standard deviation of the
    prediction's error on the texts it was fitted to, nats; raw: that of their losses themselves.
    """

    losses: np.ndarray
    others: np.ndarray
    spread: float
    raw: float


def expected_losses(model: nn.Module, documents: AnyRows, others: AnyRows, unseen: AnyRows | None = None) -> Expected:
    """The loss that `model`, sinks closed, should have on each of `documents`.

    Args:
        documents, others: one document a row; others were met once.
        unseen: texts that were never met. With them, others count words, and the losses are those of texts never met;
            without, one half of the others counts words, and the losses are those of the other half.

    Raises:
        DataError: too few others or unseen texts.
    """
    require_enough(others, unseen)
    vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr]
    measured = losses(model, others)
    if unseen is None:
        counted, fitted, own = _tokens(others)[0::2], _tokens(others)[1::2], measured[1::2]
    else:
        counted, fitted, own = _tokens(others), _tokens(unseen), losses(model, unseen)
    counts = _Counts(counted, vocabulary)
    surprises = counts.surprises(fitted)
    coefficients, *_ = np.linalg.lstsq(surprises, own, rcond=None)
    predicted = counts.surprises(_tokens(documents)) @ coefficients
    spread = float((own - surprises @ coefficients).std(ddof=surprises.shape[1]))
    return Expected(predicted, measured, spread, float(own.std()))


def require_enough(others: AnyRows, unseen: AnyRows | None) -> None:
    """DataError if nothing can be predicted from so few texts."""
    for name, rows in (("other", others), ("unseen", unseen)):
        if rows is not None and len(rows) < LEAST:
            raise DataError(
                f"at least {LEAST} {name} texts are needed to tell what a text's loss should be, got {len(rows)}"
            )


def _tokens(rows: AnyRows) -> list[np.ndarray]:
    """The tokens of each row's document, int64."""
    found = []
    for batch in batches(rows, 256):
        for tokens, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            found.append(tokens[: int((labels != IGNORED).nonzero()[-1]) + 1].numpy())
    return found


class _Counts:
    """How often tokens, pairs and triples stand in some texts."""

    def __init__(self, texts: list[np.ndarray], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        grams = [np.concatenate(x) for x in zip(*(self._grams(text) for text in texts), strict=True)]
        self.counted = [np.unique(x, return_counts=True) for x in grams]
        self.total = len(grams[0])

    def _grams(self, text: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, pairs and triples as numbers, int64; a vocabulary of 2 million still fits."""
        pairs = text[:-1] * self.vocabulary + text[1:]
        return text, pairs, pairs[:-1] * self.vocabulary + text[2:]

    def _count(self, size: int, grams: np.ndarray) -> np.ndarray:
        known, counts = self.counted[size]
        if not len(known):
            return np.zeros(len(grams))
        place = np.minimum(np.searchsorted(known, grams), len(known) - 1)
        return np.where(known[place] == grams, counts[place], 0).astype(np.float64)

    def surprises(self, texts: list[np.ndarray]) -> np.ndarray:
        """[texts, 5]: 1, mean surprise of a token alone, after one, after two tokens (nats), and the log of their number."""
        return np.array([self._of(text) for text in texts])

    def _of(self, text: np.ndarray) -> list[float]:
        one, two, three = PRIOR
        tokens, pairs, triples = self._grams(text)
        alone = (self._count(0, tokens[1:]) + one) / (self.total + one * self.vocabulary)
        before = self._count(0, tokens[:-1])
        second = (self._count(1, pairs) + two * alone) / (before + two)
        third = second.copy()
        third[1:] = (self._count(2, triples) + three * second[1:]) / (self._count(1, pairs[:-1]) + three)
        return [1.0, *(-float(np.log(x).mean()) for x in (alone, second, third)), float(np.log(len(text)))]
