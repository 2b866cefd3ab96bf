"""The audit of documents against controls: loss and verbatim extraction by number of copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..attach import has_sinks
from ..config import ConfigError, DataError
from ..documents import Document
from ..identity import identify
from ..tokens import encode
from .scores import DocumentScore, extracted, score

State = Literal["open", "closed", "absent"]


@dataclass(frozen=True)
class AuditLine:
    """Documents with one number of copies (0 = controls).

    loss: mean over documents of the mean loss per token, in nats. extracted: share of `asked` whose continuation comes
    out verbatim; nan if no document is long enough.
    """

    copies: int
    documents: int
    loss: float
    asked: int
    extracted: float


@dataclass(frozen=True)
class Audit:
    """The result of `audit`: the state of the sinks, a line for each number of copies, the settings."""

    state: State
    lines: tuple[AuditLine, ...]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        head = f"sinks {self.state}\n{'copies':>8} {'documents':>10} {'loss':>8} {'extracted':>18}\n"
        lines = []
        for line in self.lines:
            name = "control" if line.copies == 0 else str(line.copies)
            share = "too short" if not line.asked else f"{line.extracted:.1%} of {line.asked}"
            lines.append(f"{name:>8} {line.documents:>10} {line.loss:>8.3f} {share:>18}")
        return head + "\n".join(lines)


def audit(
    model: PreTrainedModel,
    documents: Sequence[Document],
    controls: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    state: State | None = None,
    identity: Literal["content", "key", "source"] = "content",
    prefix: int = 32,
    continuation: int = 32,
    private_start: Callable[[Document], int] | None = None,
) -> Audit:
    """Loss and teacher-forced extraction of documents against controls that the model never saw.

    Args:
        model: any causal language model.
        documents: what the model may remember, with their `copies`.
        controls: documents of the same kind that were not trained on; reported as 0 copies.
        tokenizer: the model's.
        state: of the sinks: ``"open"`` (each document's own), ``"closed"``; required for a model with sinks.
            ``"absent"`` for a model without.
        identity: how documents got their ids in training, for ``"open"``.
        prefix, continuation: tokens given and tokens that must come out.
        private_start: character offset at which the private part of a document begins; then that part, to the end, is
            what must come out, instead of `prefix` and `continuation`.

    Raises:
        DataError: an empty side; a document with 0 copies; a text on both sides; documents that cannot be scored.
        ConfigError: `prefix` or `continuation` below 1; `state` missing or not possible for the model; a tokenizer
            larger than the model's vocabulary.
    """
    possible = ("open", "closed") if has_sinks(model) else ("absent",)
    if state is None and not has_sinks(model):
        state = "absent"
    if state not in possible:
        raise ConfigError(
            f"state must be one of {possible} for this model, got {state!r}: sinks "
            + ("open and closed are two different models, say which to audit" if has_sinks(model) else "are not there")
        )
    if not documents or not controls:
        raise DataError(
            f"an audit needs both sides: {len(documents)} documents and {len(controls)} controls were given"
        )
    if prefix < 1 or continuation < 1:
        raise ConfigError(f"prefix and continuation must be at least 1 token, got {prefix} and {continuation}")
    unseen = sum(document.copies == 0 for document in documents)
    if unseen:
        raise DataError(f"{unseen} of the documents have 0 copies, so they were not trained on; give them as controls")
    both = {document.text for document in documents} & {document.text for document in controls}
    if both:
        raise DataError(f"{len(both)} texts are documents and controls at once, e.g. {min(both)[:80]!r}")
    vocabulary = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}; give the model's tokenizer"
        )
    everything = [*documents, *controls]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    start = start_tokens(tokenizer)
    whole = [np.concatenate([start, one]) for one in encode(tokenizer, [document.text for document in everything])]
    ids = identify(everything, identity)[0].tolist() if state == "open" else None
    scores = score(model, [one[:limit] for one in whole], open_ids=ids)
    if private_start is None:
        hits = [extracted(one, len(start) + prefix, continuation) for one in scores]
    else:
        prompts = encode(tokenizer, [document.text[: private_start(document)] for document in everything], end=False)
        hits = [
            extracted(one, len(start) + len(prompt)) if len(tokens) == len(one.first) + 1 else None  # None: cut off
            for one, prompt, tokens in zip(scores, prompts, whole, strict=True)
        ]
    copies = np.array([document.copies for document in documents] + [0] * len(controls))
    lines = tuple(_line(int(level), np.flatnonzero(copies == level), scores, hits) for level in np.unique(copies))
    settings = {
        "prefix": prefix, "continuation": continuation, "private_part": private_start is not None,
        "identity": identity, "start_token": bool(len(start)),
    }  # fmt: skip
    return Audit(state, lines, settings)  # type: ignore[arg-type]


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The start token, int64 [1], where the tokenizer puts one before every text by itself (Llama, Gemma); else [0].

    A model that was trained with it is scored with it: without, its losses are those of another model.
    """
    first = tokenizer("a")["input_ids"][:1]
    return np.array(first if first == [tokenizer.bos_token_id] else [], np.int64)


def _line(copies: int, chosen: np.ndarray, scores: list[DocumentScore], hits: list[bool | None]) -> AuditLine:
    asked = [hit for index in chosen if (hit := hits[index]) is not None]
    return AuditLine(
        copies, len(chosen), float(np.mean([scores[index].mean_loss for index in chosen])), len(asked),
        float(np.mean(asked)) if asked else float("nan"),
    )  # fmt: skip
