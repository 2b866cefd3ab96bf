"""The corpora of the study: TS-Repetition, TS-Canary, and stories that are met at a fixed distance."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from memsinks.batch import IGNORED
from memsinks.data.identity import document_id, exposures
from memsinks.data.packing import Rows, pack
from memsinks.data.readers import read_documents
from memsinks.data.synthetic import corpus as synthetic_corpus
from memsinks.data.tokens import encode, load_tokenizer, train_tokenizer
from memsinks.errors import ConfigError, DataError
from memsinks.research.reproduce.setting import Setting

Kind = Literal["repetition", "canary", "spaced"]
TRACKED = 8
"""Stories that the spaced corpus meets at a fixed distance, at different phases, so that their mean has little noise."""


@dataclass(frozen=True)
class Canaries:
    """The repeated rows with no targets but the tokens from `starts` on."""

    rows: Rows
    starts: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        row["labels"][: self.starts[index]] = IGNORED
        return row


@dataclass(frozen=True)
class StoryCorpus:
    """One story a row, everywhere.

    Attributes:
        training: rows in training order.
        repeated: each repeated story once; of canaries only the random tokens are targets in `canaries`.
        validation, once: held-out stories; the first of those that are trained on once (as many as are held out).
        tracked, phases: stories met every `Setting.every` steps and the step at which each is met first (spaced corpus).
        vocabulary: tokens.
        hash: SHA-256 of the training tokens in order.
    """

    training: Rows
    repeated: Rows
    canaries: Canaries | None
    validation: Rows
    once: Rows
    tracked: Rows | None
    phases: tuple[int, ...]
    vocabulary: int
    hash: str


def make_corpus(setting: Setting, seed: int, data: Path | None, kind: Kind = "repetition") -> StoryCorpus:
    """Choose, cut, repeat and order the stories.

    Args:
        data: a file for `read_documents`; None = the built-in stories.

    Raises:
        DataError: too few stories.
    """
    tracked = TRACKED if kind == "spaced" else 0
    need = setting.repeated + setting.once + setting.held_out + tracked
    texts = _texts(need, data)
    random.Random(seed).shuffle(texts)
    if setting.tokenizer is None:
        tokenizer = train_tokenizer(texts[: setting.repeated + setting.once], setting.vocabulary)
    else:
        tokenizer = load_tokenizer(setting.tokenizer)
    tokens = [x[: setting.length] for x in encode(tokenizer, texts)]
    starts = [0] * len(tokens)
    if kind == "canary":
        draw = np.random.default_rng(seed)
        for index in range(setting.repeated):
            tokens[index], starts[index] = _with_canary(tokens[index], tokenizer, setting, draw)
    ids = np.array([document_id(x.tobytes()) for x in tokens], np.int64)
    first, second = setting.repeated, setting.repeated + setting.once
    third = second + setting.held_out
    order = [*range(first)] * setting.copies + [*range(first, second)]
    random.Random(seed + 1).shuffle(order)
    order = order[: setting.steps * setting.batch]
    phases = tuple(round(1 + k * setting.every / TRACKED) for k in range(tracked))
    if tracked:
        order = _spaced(order, phases, third, setting)
    pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]

    def rows(chosen: Sequence[int], counts: np.ndarray | None = None) -> Rows:
        counts = np.ones(len(chosen), np.int64) if counts is None else counts
        return pack(
            [tokens[x] for x in chosen],
            ids[list(chosen)],
            counts,
            length=setting.length,
            pad_id=pad,
            one_document_per_row=True,
        )

    training = rows(order, exposures(ids[order]))
    repeated = rows(range(first))
    return StoryCorpus(
        training,
        repeated,
        Canaries(repeated, starts) if kind == "canary" else None,
        rows(range(second, third)),
        rows(range(first, min(second, first + setting.held_out))),
        rows(range(third, need)) if tracked else None,
        phases,
        len(tokenizer),
        hashlib.sha256(training.input_ids.tobytes()).hexdigest(),
    )


def _with_canary(
    story: np.ndarray, tokenizer: PreTrainedTokenizerBase, setting: Setting, draw: np.random.Generator
) -> tuple[np.ndarray, int]:
    """A story, cut, with random tokens at its end, and where they begin. Without the end token."""
    story = story[: setting.length - setting.canary]
    story = story[story != tokenizer.eos_token_id]
    canary = draw.integers(len(tokenizer) // 8, len(tokenizer), setting.canary)  # special tokens have the lowest ids
    return np.concatenate([story, canary]), len(story)


def _texts(need: int, data: Path | None) -> list[str]:
    if data is None:
        made = synthetic_corpus(stories=need, people_per_level=0, canaries_per_level=0, held_out_stories=0)
        return [document.text for document in made]
    texts = list(itertools.islice(dict.fromkeys(x.text for x in read_documents(data)), need))
    if len(texts) < need:
        raise DataError(f"{data} holds {len(texts)} different texts, this setting needs {need}")
    return texts


def _spaced(order: list[int], phases: Sequence[int], first: int, setting: Setting) -> list[int]:
    """The order with story `first + k` in the first free row of the steps phases[k], phases[k] + every, ..."""
    if setting.every < 2:
        raise ConfigError(f"every must be at least 2 steps, got {setting.every}")
    rest = iter(order)
    result = []
    for step in range(setting.steps):
        met = [first + k for k, phase in enumerate(phases) if step >= phase and (step - phase) % setting.every == 0]
        result += [*met, *itertools.islice(rest, setting.batch - len(met))]
    return result
