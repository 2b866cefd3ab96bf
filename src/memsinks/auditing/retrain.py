"""Copies of a model that an attacker may change: without its sinks, trained further, or rounded to few bits."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from memsinks.batch import IGNORED
from memsinks.sinks.attach import PATCHED, remove_sinks
from memsinks.sinks.families import context_of
from memsinks.sinks.state import has_sinks

Seen = TypeVar("Seen")


def bare_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy without sinks in float32, in evaluation mode; the model itself is left alone."""
    copied = copy.deepcopy(model)
    if has_sinks(copied):
        remove_sinks(copied)
    for patch in PATCHED:  # it may still call the model that was copied
        vars(copied).pop(patch, None)
    return copied.float().eval().requires_grad_(True)


@torch.no_grad()
def round_weights(model: PreTrainedModel, bits: int) -> None:
    """Round every matrix, in place, to the nearest of 2^bits - 1 values, evenly spaced and symmetric, each row by itself.

    Source: Zhang et al., "Catastrophic failure of LLM unlearning via quantization", ICLR 2025, arXiv 2410.16454: removal that
    moves weights little is undone where rounding moves them back.
    """
    most = 2 ** (bits - 1) - 1
    for parameter in model.parameters():
        if parameter.dim() < 2:
            continue
        rows = parameter.flatten(1)
        scale = (rows.abs().amax(1, keepdim=True) / most).clamp(min=torch.finfo(rows.dtype).tiny)
        parameter.copy_(((rows / scale).round() * scale).view_as(parameter))


def train_further(
    model: PreTrainedModel,
    texts: Sequence[np.ndarray],
    steps: Sequence[int],
    look: Callable[[], Seen],
    *,
    lr: float,
    batch_rows: int,
    batch_tokens: int,
    seed: int,
    label: str,
) -> list[Seen]:
    """Train a model, in place, on some texts; after each number of `steps` look at it.

    AdamW without weight decay at a constant learning rate, gradients clipped to norm 1; each pass over the texts is in an
    order of its own. The random states of Python, numpy and torch are not touched.

    Args:
        texts: integer [tokens] each, as the model is to read them.
        steps: increasing; a look at 0 steps is before the first.
        batch_tokens: of one forward, padding included; the gradients of a step add up.

    Returns:
        What `look` gave, for each of `steps`.
    """
    rng, queue, seen = np.random.default_rng(seed), [], []
    rows = min(batch_rows, len(texts))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in tqdm(range(max(steps) + 1), desc=label, unit=" steps", disable=None, leave=False):
            if step in steps:
                seen.append(look())
            if step == max(steps):
                break
            while len(queue) < rows:
                queue += rng.permutation(len(texts)).tolist()
            chosen, queue = queue[:rows], queue[rows:]
            model.train()
            _gradients(model, [texts[index] for index in chosen], batch_tokens)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
    return seen


def seconds_of_a_step(model: PreTrainedModel, texts: Sequence[np.ndarray], batch_rows: int, batch_tokens: int) -> float:
    """How long forward and backward of a step take; the model learns nothing."""
    began = time.perf_counter()
    with torch.random.fork_rng(), torch.enable_grad():
        _gradients(model, texts[:batch_rows], batch_tokens)
    model.zero_grad()
    return time.perf_counter() - began


def _gradients(model: PreTrainedModel, texts: Sequence[np.ndarray], batch_tokens: int) -> None:
    """Add the gradient of the mean loss over all targets of some texts, cut to the context."""
    limit = context_of(model.config)
    rows = sorted((torch.from_numpy(one[:limit].astype(np.int64)) for one in texts), key=len, reverse=True)
    targets, at = sum(len(row) - 1 for row in rows), 0
    while at < len(rows):
        part = rows[at : at + max(1, batch_tokens // len(rows[at]))]
        at += len(part)
        tokens, labels = _padded(part, model.device)
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        (loss * (sum(len(row) - 1 for row in part) / targets)).backward()


def _padded(texts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded rows and labels; padding is not looked at by a causal model and has no loss."""
    rows = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=IGNORED)
    return rows.to(device), labels.to(device)
