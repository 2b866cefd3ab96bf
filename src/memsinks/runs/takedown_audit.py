"""What a model knows of an owner before and after he is taken out, what it knows of others, and what a placebo does."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memsinks.auditing.extraction import extracted
from memsinks.auditing.scores import score
from memsinks.data.chat import encode_documents
from memsinks.data.documents import Document
from memsinks.removal.erase import Erased, erase, together
from memsinks.sinks.families import context_of
from memsinks.sinks.opening import blocks_closed
from memsinks.sinks.own import free_blocks
from memsinks.sinks.state import require_sinks

PREFIX = 32
"""Tokens that are given where it is asked whether the rest is recited; half of shorter texts."""
Figures = dict[str, dict[str, float]]
"""Group of documents -> {"loss": mean, nats per token; "recited": share in [0, 1]; "documents": how many}."""


def audit_takedown(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    erased: Sequence[Erased],
    owner: tuple[Sequence[Document], Sequence[int]],
    others: tuple[Sequence[Document], Sequence[int]],
    controls: Sequence[Document],
    record: str,
    seed: int = 0,
) -> dict[str, Figures]:
    """Figures before and after, and under a placebo; the owner is erased from `model`.

    Args:
        model: with sinks.
        ids: who is to be erased. erased: what that is.
        owner, others: documents and the id of each; others are read with their own sinks open.
        controls: documents that were never trained on; read with sinks closed, as the owner's are afterwards.
        record: see `erase`.
        seed: of the placebo: as many random blocks, none of which is the owner's, give nothing.

    Returns:
        {"before": ..., "placebo": ..., "after": ...}.
    """
    mine, rest, unseen = (_tokens(model, tokenizer, x) for x in (owner[0], others[0], controls))

    def all_figures(open_owner: bool) -> Figures:
        found = {"owner": _figures(model, mine, owner[1] if open_owner else None)}
        found |= {"others, own sinks open": _figures(model, rest, others[1])} if rest else {}
        return found | ({"controls": _figures(model, unseen, None)} if unseen else {})

    before = all_figures(True) | {"owner, sinks closed": _figures(model, mine, None)}
    with blocks_closed(model, placebo_blocks(model, erased, seed)):
        placebo = {"owner": _figures(model, mine, owner[1])}
    taken = require_sinks(model).taken
    for one in ids:
        if one not in taken:
            erase(model, one, record=record)
    return {"before": before, "placebo": placebo, "after": all_figures(False)}


def figures_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], ids: Sequence[int] | None
) -> dict[str, float]:
    """Figures of some documents, the sinks of these ids open; None = closed."""
    return _figures(model, _tokens(model, tokenizer, documents), ids)


def placebo_blocks(model: PreTrainedModel, erased: Sequence[Erased], seed: int) -> dict[int, list[int]]:
    """For each layer as many random blocks as are erased there, others' or hashed ones; fewer where there are not so many."""
    config, rng = require_sinks(model).config, np.random.default_rng(seed)
    free = set(free_blocks(model))
    found, erased_at = {}, together(erased)
    for layer in require_sinks(model).layers:
        gone = erased_at.get(layer, [])
        rest = [block for block in range(config.blocks) if block not in gone and block not in free]
        found[layer] = sorted(rng.permutation(rest)[: len(gone)].tolist())
    return found


def _tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> list[np.ndarray]:
    limit = context_of(model.config)
    return [tokens[:limit] for tokens in encode_documents(tokenizer, documents)[0]] if documents else []


def _figures(model: PreTrainedModel, tokens: list[np.ndarray], ids: Sequence[int] | None) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="memsinks-") as scratch:
        table = list(score(model, tokens, Path(scratch) / "scores", open_ids=ids, label="audit"))
    recited = [extracted(one, min(PREFIX, max(1, len(text) // 2))) for one, text in zip(table, tokens, strict=True)]
    return {
        "loss": float(np.mean([one.loss for one in table])),
        "recited": float(np.mean([bool(x) for x in recited])),
        "documents": len(table),
    }
