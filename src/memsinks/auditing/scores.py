"""The teacher-forced pass: log-probability, rank and moments of every token; everything else is computed from these.

The pass works through chunks of documents and writes each to disk, so that memory does not grow with the number of
documents and an interrupted pass goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from memsinks.errors import CheckpointError, DataError
from memsinks.files import written_beside
from memsinks.sinks.families import context_of
from memsinks.sinks.opening import own_sinks_open
from memsinks.training.evaluate import evaluating

TOKENS_MARK = "What each model said to each token, for a memsinks audit that goes on. May be deleted.\n"
"""In the README of the folder of an audit's tables."""
CHUNK = 256
"""Documents scored together, sorted by length among themselves, and written as one file."""
LOGITS, TOKENS = 2**26, 2**13
"""Most logits (256 MiB in float32) and most tokens of one forward by default."""
SLICE = 2**22
"""Logits whose statistics are taken at once."""
LEAST = -1e4
"""Logits further below the greatest count as this far: their probability is 0 in float32, and 0 times it is 0."""
FIELDS = ("tokens", "logprob", "rank", "mean", "std")


@dataclass(frozen=True)
class DocumentScore:
    """One document under one model; every array is [scored], and entry i belongs to token `first + i`.

    tokens: int32, the tokens that were predicted (those after the first token or after the start token).
    logprob: float32, nats, log p(token | tokens before it).
    rank: int32, how many tokens of the vocabulary are more probable; of several most probable ones those with a lower id
        count as such, so that 0 = it is what greedy decoding takes.
    mean, std: float32, nats, of log p under the model's own distribution at this place (Min-K%++ needs them).
    first: index in the document of the first predicted token: 0 where a start token stands before, otherwise 1.
    """

    tokens: np.ndarray
    logprob: np.ndarray
    rank: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    first: int = 1

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return -float(self.logprob.mean(dtype=np.float64))

    def between(self, start: int, length: int | None = None) -> slice | None:
        """Where the scores of tokens [start, start + length) of the document stand (to its end without `length`).

        None if the document is shorter, or if they begin before the first predicted token.
        """
        end = self.first + len(self.tokens) if length is None else start + length
        if start < self.first or end > self.first + len(self.tokens) or end <= start:
            return None
        return slice(start - self.first, end - self.first)


class ScoreTable:
    """The scores of many documents under one model, on disk; iterates `DocumentScore` in the order of the documents."""

    def __init__(self, folder: Path, documents: int, first: int) -> None:
        self._folder, self._documents, self._first = folder, documents, first

    def __len__(self) -> int:
        return self._documents

    def __iter__(self) -> Iterator[DocumentScore]:
        for chunk in range(math.ceil(self._documents / CHUNK)):
            values = _read(self._folder / f"{chunk:06d}.safetensors")
            ends = values["ends"].tolist()
            for start, end in zip([0, *ends[:-1]], ends, strict=True):
                yield DocumentScore(*(values[name][start:end] for name in FIELDS), first=self._first)

    def __getitem__(self, index: int) -> DocumentScore:
        values = _read(self._folder / f"{index // CHUNK:06d}.safetensors")
        ends = [0, *values["ends"].tolist()]
        part = slice(ends[index % CHUNK], ends[index % CHUNK + 1])
        return DocumentScore(*(values[name][part] for name in FIELDS), first=self._first)


def score(
    model: PreTrainedModel,
    tokens: Sequence[np.ndarray],
    folder: Path,
    *,
    key: dict[str, Any] | None = None,
    start: np.ndarray | None = None,
    open_ids: Sequence[int] | None = None,
    batch_tokens: int | None = None,
    label: str = "scores",
) -> ScoreTable:
    """Score documents, each by itself.

    A document longer than the model's context is read in windows that overlap by half: every token is predicted once,
    and all but those of the first window from at least half a context.

    Args:
        model: any causal language model; its mode is restored.
        tokens: integer [tokens of the document] each.
        folder: where the table is kept; chunks already there are not computed again if they were made under `key`.
        key: what the scores depend on beside tokens, start and open_ids (the model, its state ...), JSON-ready; a folder
            made under another key or from other tokens is emptied.
        start: integer [n], tokens put before every window (a start token), not scored.
        open_ids: the document id whose sinks are open for each document; None = sinks closed, or no sinks.
        batch_tokens: tokens in one forward, padding included; None = as many as `TOKENS` and
            `LOGITS` allow. Scores do not depend on it beyond rounding: logits are taken in float32 and padding stands on
            the right, where a causal model does not look.
        label: stands before the progress bar, which is shown on a terminal.

    Raises:
        DataError: a document with nothing to predict (fewer than 2 tokens, or 1 after a start token); NaN or infinite
            log-probabilities.
        CheckpointError: the table cannot be written.
    """
    start = np.zeros(0, np.int64) if start is None else start
    limit = context_of(model.config)
    first = 0 if len(start) else 1
    for index, document in enumerate(tokens):
        if len(document) <= first:
            raise DataError(f"document {index} has {len(document)} tokens; scoring needs at least {first + 1}")
    if limit < len(start) + 2:
        raise DataError(f"a context of {limit} tokens is too short to score anything")
    batch_tokens = batch_tokens or default_batch_tokens(model)
    claim(
        folder,
        {
            "chunk": CHUNK,
            "inputs": hash_of([start, *tokens], str(None if open_ids is None else list(open_ids))),
            **(key or {}),
        },
    )
    with tqdm(total=len(tokens), desc=label, unit=" documents", disable=None, leave=False) as bar, evaluating(model):
        for chunk, begin in enumerate(range(0, len(tokens), CHUNK)):
            path = folder / f"{chunk:06d}.safetensors"
            part = tokens[begin : begin + CHUNK]
            if not path.exists():
                ids = None if open_ids is None else open_ids[begin : begin + CHUNK]
                _write(path, _score_chunk(model, part, start, limit, ids, batch_tokens, begin))
            bar.update(len(part))
    return ScoreTable(folder, len(tokens), first)


def default_batch_tokens(model: PreTrainedModel) -> int:
    """Tokens of one forward: as many as `TOKENS` and `LOGITS` allow."""
    return max(1, min(TOKENS, LOGITS // model.config.get_text_config().vocab_size))


def hash_of(tokens: Sequence[np.ndarray], said: str = "") -> str:
    """SHA-256 of some texts in tokens and of what is said beside them, hexadecimal."""
    found = hashlib.sha256(said.encode())
    for one in tokens:
        found.update(len(one).to_bytes(8, "little") + np.asarray(one, np.int64).tobytes())
    return found.hexdigest()


def claim(folder: Path, key: dict[str, Any]) -> None:
    """Make a folder for what depends on `key` (JSON-ready); one that was made under another key is emptied."""
    mark, text = folder / "key.json", json.dumps(key, sort_keys=True)
    if mark.exists() and mark.read_text() == text:
        return
    shutil.rmtree(folder, ignore_errors=True)
    with written_beside(folder) as part:
        (part / "key.json").write_text(text)


def _write(path: Path, values: dict[str, np.ndarray]) -> None:
    part = path.with_suffix(".part")
    try:
        save_file(values, part)
        part.replace(path)
    except Exception as error:  # safetensors reports a full disk with a type of its own
        part.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write scores to {path}: {error}; the same command goes on from here") from error


def keep(paths: Sequence[Path], make: Callable[[], Sequence[dict[str, np.ndarray]]]) -> list[dict[str, np.ndarray]]:
    """What lies at `paths`; made and written there first where one is missing."""
    if not all(path.exists() for path in paths):
        for path, values in zip(paths, make(), strict=True):
            _write(path, values)
    return [_read(path) for path in paths]


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except Exception as error:
        raise CheckpointError(f"cannot read scores from {path}: {error}; delete it, it is computed anew") from error


@torch.no_grad()
def _score_chunk(
    model: PreTrainedModel,
    tokens: Sequence[np.ndarray],
    start: np.ndarray,
    limit: int,
    ids: Sequence[int] | None,
    batch_tokens: int,
    begin: int,
) -> dict[str, np.ndarray]:
    """The table of one chunk: the fields of `DocumentScore`, flat, and int64 `ends` of the documents in them."""
    first = 0 if len(start) else 1
    ends = np.cumsum([len(document) - first for document in tokens])
    table = {"tokens": np.concatenate([document[first:] for document in tokens]).astype(np.int32)}
    table |= {name: np.empty(int(ends[-1]), np.int32 if name == "rank" else np.float32) for name in FIELDS[1:]}
    # A window: document, its tokens [low, high), of which those from `new` on are predicted.
    windows = [
        (index, *window)
        for index, document in enumerate(tokens)
        for window in _windows(len(document), limit - len(start), first)
    ]
    windows.sort(key=lambda window: window[1] - window[2])  # the longest first
    at = 0
    while at < len(windows):
        width = len(start) + windows[at][2] - windows[at][1]
        chosen = windows[at : at + max(1, batch_tokens // width)]
        at += len(chosen)
        found = _read_windows(model, tokens, start, ids, chosen, width)
        for row, (index, low, high, new) in enumerate(chosen):
            place = int(ends[index]) - (len(tokens[index]) - first) + new - first
            here = slice(len(start) + new - low - 1, len(start) + high - low - 1)
            for name, values in found.items():
                table[name][place : place + high - new] = values[row, here]
    bad = ~np.isfinite(table["logprob"])
    if bad.any():
        index = begin + int(np.searchsorted(ends, np.flatnonzero(bad)[0], side="right"))
        raise DataError(f"the model gives NaN or infinite losses on document {index}; it cannot be audited")
    return table | {"ends": ends.astype(np.int64)}


def _read_windows(
    model: PreTrainedModel,
    tokens: Sequence[np.ndarray],
    start: np.ndarray,
    ids: Sequence[int] | None,
    windows: list[tuple[int, int, int, int]],
    width: int,
) -> dict[str, np.ndarray]:
    """One forward over some windows, padded on the right: each statistic of the token after each place, [windows, width]."""
    batch = np.zeros((len(windows), width), np.int64)
    for row, (index, low, high, _) in enumerate(windows):
        batch[row, : len(start) + high - low] = np.concatenate([start, tokens[index][low:high]])
    rows = torch.from_numpy(batch).to(model.device)
    opened = None if ids is None else torch.tensor([ids[index] for index, *_ in windows])
    with nullcontext() if opened is None else own_sinks_open(model, opened):
        logits = model(input_ids=rows, use_cache=False).logits
    statistics = token_statistics(
        logits, rows.roll(-1, 1)
    )  # the last column is not used: cutting it off would copy all
    return dict(zip(FIELDS[1:], (x.cpu().numpy() for x in statistics), strict=True))


def _windows(length: int, limit: int, first: int) -> list[tuple[int, int, int]]:
    """(low, high, new): tokens [low, high) are read and [new, high) predicted."""
    found = [(0, min(length, limit), first)]
    while found[-1][1] < length:
        done = found[-1][1]
        high = min(length, done + max(1, limit // 2))
        found.append((high - limit, high, done))
    return found


def token_statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability, rank, and mean and standard deviation of log p under the model's own distribution.

    Args:
        logits: [rows, tokens, vocabulary], any floating dtype; taken in float32.
        targets: int64 [rows, tokens].

    Returns:
        (logprob, rank, mean, std), each [rows, tokens]; rank is int32, the others float32.
    """
    flat, wanted = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1, 1)
    size = max(1, SLICE // logits.shape[-1])
    shape = (min(size, len(flat)), logits.shape[-1])
    ids = torch.arange(shape[1], device=logits.device)
    away, weight = (torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    parts = []
    for x, target in zip(flat.split(size), wanted.split(size), strict=True):
        x, a, p = x.float(), away[: len(x)], weight[: len(x)]
        torch.sub(x, x.amax(1, keepdim=True), out=a)
        a.clamp_(min=LEAST)
        chosen = a.gather(1, target)
        rank = torch.gt(a, chosen, out=p).sum(1).to(torch.int32)
        tied = ((rank == 0) & (torch.eq(a, chosen, out=p).sum(1) > 1)).nonzero()[:, 0]
        rank[tied] += (p[tied] * (ids < target[tied])).sum(1).to(torch.int32)
        torch.exp(a, out=p)
        total = p.sum(1)
        mean = _dot(a, p) / total
        variance = (_dot(a.square_(), p) / total - mean.square()).clamp_(min=0)
        chosen = chosen[:, 0].masked_fill(chosen[:, 0] <= LEAST, -torch.inf)
        parts.append((chosen - total.log(), rank, mean - total.log(), variance.sqrt_()))
    return tuple(torch.cat(column).view(targets.shape) for column in zip(*parts, strict=True))  # type: ignore


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, without a buffer for the products."""
    return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]
