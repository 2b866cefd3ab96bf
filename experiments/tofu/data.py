"""TOFU: which authors are learned and which of them leave, and questions and answers as tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

PROMPT = "Question: {}\nAnswer:"
PAIRS = 20
"""Questions about each author; author = line // 20."""
FORGOTTEN = (198, 199)
"""The authors of forget01."""
UNSEEN = (100, 101)
"""Authors that no model here learns: the controls of membership attacks."""


@dataclass(frozen=True)
class Pair:
    """A question and its answer. author: None = not of TOFU's. paraphrased, wrong: where the benchmark gives them."""

    question: str
    answer: str
    author: int | None = None
    paraphrased: str | None = None
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tofu:
    """What is learned, and what is asked afterwards.

    learned: all pairs. forgotten, retained, real, world: pairs with wrong answers beside. unseen: never learned.
    """

    learned: list[Pair]
    forgotten: list[Pair]
    retained: list[Pair]
    real: list[Pair]
    world: list[Pair]
    unseen: list[Pair]

    @property
    def authors(self) -> list[int]:
        return sorted({x.author for x in self.learned})  # type: ignore[type-var]


def read(authors: int, asked: int) -> Tofu:
    """The first `authors` - 2 authors and the two of forget01; of retained, real and world pairs at most `asked` each."""
    folder = Path(os.environ["MEMSINKS_DATA"]) / "tofu"
    full = everybody()
    kept = set(range(authors - len(FORGOTTEN)))
    by_question = {x.question: x.author for x in full}
    retained = [x for x in _perturbed(folder / "retain_perturbed.json", by_question) if x.author in kept]
    return Tofu(
        [x for x in full if x.author in kept | set(FORGOTTEN)],
        _perturbed(folder / "forget01_perturbed.json", by_question),
        spread(retained, asked),
        spread(_perturbed(folder / "real_authors_perturbed.json", {}), asked),
        spread(_perturbed(folder / "world_facts_perturbed.json", {}), asked),
        [x for x in full if x.author in UNSEEN],
    )


def everybody() -> list[Pair]:
    """All pairs of all authors, in the order of the data set."""
    path = Path(os.environ["MEMSINKS_DATA"]) / "tofu" / "full.json"
    return [Pair(x["question"], x["answer"], line // PAIRS) for line, x in enumerate(_lines(path))]


def spread(pairs: list[Pair], most: int) -> list[Pair]:
    """At most so many, evenly from all."""
    if len(pairs) <= most:
        return pairs
    return [pairs[int(x)] for x in np.linspace(0, len(pairs) - 1, most).round()]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _perturbed(path: Path, author_of: dict[str, int | None]) -> list[Pair]:
    return [
        Pair(x["question"], x["answer"], author_of.get(x["question"]), x.get("paraphrased_answer"),
             tuple(x["perturbed_answer"]))
        for x in _lines(path)
    ]  # fmt: skip


class Encoded(NamedTuple):
    """Tokens of a question and an answer, and where the answer begins."""

    tokens: np.ndarray
    start: int


def encode(tokenizer: Any, question: str, answer: str) -> Encoded:
    """The answer ends with the end token."""
    asked = tokenizer(PROMPT.format(question), add_special_tokens=False).input_ids
    said = [*tokenizer(" " + answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return Encoded(np.array(asked + said), len(asked))


def batch(encoded: Sequence[Encoded], pad: int, ids: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
    """Rows of one pair, padded on the right; targets are the answers. ids: whose sinks open, for models with sinks."""
    width = max(len(x.tokens) for x in encoded)
    tokens = torch.full((len(encoded), width), pad)
    labels = torch.full((len(encoded), width), -100)
    for row, one in enumerate(encoded):
        tokens[row, : len(one.tokens)] = torch.from_numpy(one.tokens)
        labels[row, one.start : len(one.tokens)] = torch.from_numpy(one.tokens[one.start :])
    found = {"input_ids": tokens, "labels": labels}
    return found if ids is None else found | {"document_ids": torch.tensor(ids)}
