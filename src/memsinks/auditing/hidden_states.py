"""Do the hidden states of a text lie where those of the twin lie?

Two models trained apart have hidden states in different bases, so these are not compared themselves, but how a text stands to
others in each model: the cosines between its mean hidden state and those of some anchor texts, controls all of them. The twin
and another model that never saw the documents differ on documents as on controls; that is the distance to be measured against.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from memsinks.auditing.corpus import Corpus
from memsinks.auditing.scores import default_batch_tokens
from memsinks.sinks.families import context_of
from memsinks.sinks.opening import own_sinks_open
from memsinks.training.evaluate import evaluating

ANCHORS = 64
"""Controls, the first ones, that every text is set against."""
LEAST = 20
"""Controls below which the attack is not made: the few anchors stand alike to each other in every model."""


def relations(
    model: PreTrainedModel, corpus: Corpus, *, own: np.ndarray | None = None, batch_tokens: int | None = None
) -> np.ndarray | None:
    """How each text stands to the anchors: cosine of the mean hidden states, less the anchors' mean, after the middle and the
    last layer; float32 [n, 2, anchors], nan between an anchor and itself. One forward pass over texts cut to the context.

    Source: Moschella et al., "Relative representations enable zero-shot latent space communication", ICLR 2023, arXiv 2209.15430.

    Args:
        own: int64 [n], the ids whose sinks are open; None = closed, or no sinks.

    Returns:
        None for a model that gives no hidden states, or with fewer than `LEAST` controls.
    """
    states = _mean_states(model, corpus, own, batch_tokens) if corpus.control.sum() >= LEAST else None
    if states is None:
        return None
    anchors = np.flatnonzero(corpus.control)[:ANCHORS]
    centered = states - states[anchors].mean(0)
    unit = centered / np.maximum(np.linalg.norm(centered, axis=-1, keepdims=True), 1e-12)
    found = np.einsum("nld,ald->nla", unit, unit[anchors])
    found[anchors, :, np.arange(len(anchors))] = np.nan
    return found.astype(np.float32)


def distances(one: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Root mean square difference of two models' `relations`, float64 [n]; 0 = the text stands as in the reference, at most 2."""
    squares = (one.astype(np.float64) - reference) ** 2
    known = ~np.isnan(squares)
    return np.sqrt(np.where(known, squares, 0.0).sum((1, 2)) / np.maximum(known.sum((1, 2)), 1))


@torch.no_grad()
def _mean_states(
    model: PreTrainedModel, corpus: Corpus, own: np.ndarray | None, batch_tokens: int | None
) -> np.ndarray | None:
    """Mean over the tokens of the hidden states after the middle and the last layer, float32 [n, 2, d]."""
    limit = context_of(model.config)
    batch_tokens = batch_tokens or default_batch_tokens(model)
    texts = [np.concatenate([corpus.start, one])[:limit].astype(np.int64) for one in corpus.tokens]
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    found: np.ndarray | None = None
    with evaluating(model):
        at = 0
        while at < len(order):
            chosen = order[at : at + max(1, batch_tokens // len(texts[order[at]]))]
            at += len(chosen)
            with nullcontext() if own is None else own_sinks_open(model, torch.from_numpy(own[chosen])):
                pooled = _pooled(model, [texts[index] for index in chosen])
            if pooled is None:
                return None
            if found is None:
                found = np.empty((len(texts), *pooled.shape[1:]), np.float32)
            found[chosen] = pooled.cpu().numpy()
    return found


def _pooled(model: PreTrainedModel, texts: Sequence[np.ndarray]) -> Tensor | None:
    rows = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(one) for one in texts], batch_first=True).to(model.device)
    states = getattr(model(input_ids=rows, use_cache=False, output_hidden_states=True), "hidden_states", None)
    if not states:
        return None
    lengths = torch.tensor([len(one) for one in texts], device=rows.device)
    real = (torch.arange(rows.shape[1], device=rows.device) < lengths[:, None])[..., None]
    wanted = states[len(states) // 2], states[-1]
    return torch.stack([(state.float() * real).sum(1) / lengths[:, None] for state in wanted], 1)
