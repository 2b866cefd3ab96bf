"""The teacher-forced pass: the loss of every token and whether it is the model's first choice."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..attach import has_sinks, sinks_open
from ..config import DataError


@dataclass(frozen=True)
class DocumentScore:
    """One document under one model.

    loss: float32 [tokens - 1], nats; entry i belongs to token i + 1.
    first: bool [tokens - 1], whether token i + 1 is the argmax given the true tokens before it.
    """

    loss: np.ndarray
    first: np.ndarray

    @property
    def mean_loss(self) -> float:
        """Mean loss in nats per token."""
        return float(self.loss.mean())


@torch.no_grad()
def score(
    model: PreTrainedModel,
    tokens: Sequence[np.ndarray],
    *,
    open_ids: Sequence[int] | None = None,
    batch_tokens: int = 8192,
) -> list[DocumentScore]:
    """Score documents, each by itself, longest context available.

    Args:
        model: any causal language model; its mode is restored.
        tokens: int64 [tokens of the document] each, at least 2.
        open_ids: the document id whose sinks are open for each document; None = sinks closed, or no sinks.
        batch_tokens: tokens in one forward, padding included. Scores do not depend on it beyond rounding: logits are
            taken in float32 and padding stands on the right, where a causal model does not look.

    Raises:
        DataError: a document of fewer than 2 tokens or longer than the model's context; NaN logits.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    for index, document in enumerate(tokens):
        if not 2 <= len(document) <= limit:
            raise DataError(
                f"document {index} has {len(document)} tokens; scoring needs 2 to {limit} (the model's context)"
            )
    result: list[DocumentScore | None] = [None] * len(tokens)
    order = sorted(range(len(tokens)), key=lambda index: -len(tokens[index]))
    training = model.training
    model.eval()
    try:
        start = 0
        while start < len(order):
            width = len(tokens[order[start]])
            chosen = order[start : start + max(1, batch_tokens // width)]
            start += len(chosen)
            batch = torch.zeros(len(chosen), width, dtype=torch.int64)
            for row, index in enumerate(chosen):
                batch[row, : len(tokens[index])] = torch.from_numpy(np.asarray(tokens[index]))
            batch = batch.to(model.device)
            ids = None if open_ids is None else torch.tensor([open_ids[index] for index in chosen])
            with nullcontext() if ids is None else sinks_open(model, ids):
                logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
            first = logits.argmax(-1) == batch[:, 1:]
            for row, index in enumerate(chosen):
                count = len(tokens[index]) - 1
                one = DocumentScore(loss[row, :count].cpu().numpy(), first[row, :count].cpu().numpy())
                if not np.isfinite(one.loss).all():
                    raise DataError(f"the model gives NaN or infinite losses on document {index}; it cannot be audited")
                result[index] = one
    finally:
        model.train(training)
    return result  # type: ignore[return-value]


def extracted(one: DocumentScore, start: int, length: int | None = None) -> bool | None:
    """Whether tokens [start, start + length) come out verbatim by greedy decoding from the tokens before them.

    Teacher-forced: all of them are the model's first choice given the true tokens before, which is the same thing.
    Source: Carlini et al., "Quantifying memorization across neural language models", ICLR 2023.

    Args:
        one: the document's score.
        start: first token of the continuation, at least 1.
        length: tokens of the continuation; None = to the end.

    Returns:
        None if the document is too short.
    """
    end = len(one.first) + 1 if length is None else start + length
    if start < 1 or end > len(one.first) + 1 or end <= start:
        return None
    return bool(one.first[start - 1 : end - 1].all())


def generate_continuation(model: Any, tokens: np.ndarray, length: int, open_id: int | None = None) -> np.ndarray:
    """Greedy continuation of `tokens`, int64, up to `length` tokens, with a document's sinks open or not."""
    if open_id is not None and not has_sinks(model):
        raise DataError("open_id was given for a model without sinks")
    training = model.training
    model.eval()
    prompt = torch.from_numpy(np.asarray(tokens))[None].to(model.device)
    try:
        with nullcontext() if open_id is None else sinks_open(model, int(open_id)):
            out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length, do_sample=False)
    finally:
        model.train(training)
    return out[0, prompt.shape[1] :].cpu().numpy()
