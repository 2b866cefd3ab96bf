"""Level what closed sinks leave behind: the last step of removal, before export.

Sinks keep what a text teaches after its first exposure away from the shared weights, but not all of it: a small part of the
memory of repeated texts stays there. Settling takes it out by a few steps of further training. Each text is pushed up to the
loss it should have (`expected`) and no further, while all other text keeps its predictions:

    mean over documents of max(0, T_d - s - L_d)  +  mean over tokens of other texts of KL(before || now)

with L_d the loss of document d with sinks closed and T_d the expected one. T_d is known up to an error of 0.1 to 0.2 nats, and
max() would turn that error into a bias: s is the shift at which the documents end, on average, where T says. The sinks
learn on, with the shared weights constant, so that they still fit what has moved under them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from memsinks.batch import BLANK, IGNORED, ISOLATIONS, NO_SINKS, target_count
from memsinks.checks import int_at_least, positive
from memsinks.data.packing import Rows
from memsinks.errors import DataError, refuse
from memsinks.removal.expected import Expected, expected_losses, require_enough
from memsinks.sinks.sharding import copy_into, is_sharded, most_of_ranks, reshard
from memsinks.sinks.state import has_sinks, is_sink, shared_parameters, sink_parameters
from memsinks.training.evaluate import evaluating, losses, row_losses, unpatched
from memsinks.training.last import add_own_gradients, batch_of, require_one_text_each, shuffled
from memsinks.training.optim import AdamW, clip_grad_norm_, clip_together

logger = logging.getLogger(__name__)
Batch = dict[str, Tensor]

SINK_LR_FACTOR = 5.0
"""Learning rate of the sinks over that of the shared weights, unless `SettleConfig.sink_lr` is given."""
LR_DIVISOR = 10.0
"""Peak learning rate of training over that of settling, unless `SettleConfig.lr` is given."""
OTHERS = 600
"""Other texts that are used of those given."""
LOG_EVERY = 10
"""Steps between two lines of progress."""


@dataclass(frozen=True, kw_only=True)
class SettleConfig:
    """How a model is settled, see `settle`. The section `settle` of a recipe.

    Args:
        lr: peak learning rate of the shared weights; it falls linearly to 0. None = the peak of training over
            `LR_DIVISOR`, where a recipe knows it.
        sink_lr: that of the sinks; None = `SINK_LR_FACTOR` times `lr`.
        passes: times each document is met.
        batch_rows: documents, and as many others, of one step.

    Raises:
        ConfigError: listing every problem at once.
    """

    lr: float | None = None
    sink_lr: float | None = None
    passes: int = 8
    batch_rows: int = 16

    def __post_init__(self) -> None:
        problems = [
            problem
            for name in ("lr", "sink_lr")
            if getattr(self, name) is not None
            for problem in positive(name, getattr(self, name))
        ]
        problems += int_at_least("passes", self.passes, 1) + int_at_least("batch_rows", self.batch_rows, 1)
        refuse(problems, "invalid SettleConfig")

    def after_training(self, peak_lr: float) -> SettleConfig:
        """These settings with `lr` filled in from the peak learning rate of training."""
        return replace(self, lr=peak_lr / LR_DIVISOR if self.lr is None else self.lr)


@dataclass(frozen=True)
class SettleResult:
    """What `settle` found and did; losses in nats per token, float64 [documents], sinks closed.

    expected: what they should be; shift: s. before, after: of the documents. others_after: of the other texts.
    """

    expected: Expected
    shift: float
    before: np.ndarray
    after: np.ndarray
    others_after: np.ndarray
    steps: int

    def __str__(self) -> str:
        should, was, now = (float(x.mean()) for x in (self.expected.losses, self.before, self.after))
        moved = float((self.others_after - self.expected.others).mean())
        return (
            f"{len(self.before)} documents in {self.steps} steps: loss {was:.3f} -> {now:.3f}, expected {should:.3f} "
            f"(predicted to {self.expected.spread:.2f}); other texts {moved:+.3f}"
        )


Settled = SettleResult


def repeated_and_once(rows: Rows) -> tuple[Rows, Rows]:
    """The training rows taken apart: texts that were repeated, texts that were met once; each once, in the order of their
    first exposure, one segment a row. Texts are counted, not ids, see `Rows.texts`. Private texts count as repeated: their
    sinks opened. Text of id -1, blank text (`shadow_rows`) and segments without a target are in neither."""
    kept = (rows.segments["document_id"] != NO_SINKS) & (rows.segment_targets > 0)
    kept &= rows.segments["isolation"] != BLANK
    segments, text = rows.segments[kept], rows.texts()[kept]
    least, most = np.full(len(rows.segments), np.iinfo(np.int64).max), np.zeros(len(rows.segments), np.int64)
    np.minimum.at(least, text, segments["exposure"])
    np.maximum.at(most, text, segments["exposure"])
    met_first = segments["exposure"] == least[text]
    first, repeated = segments[met_first], (most > 1)[text][met_first]
    repeated |= first["isolation"] == ISOLATIONS["private"]
    return rows.one_segment_each(first[repeated]), rows.one_segment_each(first[~repeated])


def settle(
    model: nn.Module,
    documents: Rows,
    others: Rows,
    unseen: Rows | None = None,
    config: SettleConfig | None = None,
    *,
    micro_rows: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> SettleResult:
    """Level, in place, what a trained model still knows of `documents` with its sinks closed.

    Args:
        model: with or without sinks, in any mode, which is kept. Only weak memorization can be removed at this cost. All ranks
            of a sharded one (FSDP2) must call this with the same texts; each takes part in every forward.
        documents: the texts that were repeated, one a row, see `repeated_and_once`.
        others: texts of their kind that were met once, best early in training, one a row; the first `OTHERS` are used.
        unseen: texts of their kind that were never met, one a row (`pack(..., one_document_per_row=True)`): the documents
            end as if never met. None = as if met once, as the others.
        config: the settings; `lr` is needed.
        micro_rows: rows of one forward, where memory does not hold a step's at once; the gradients add up. None = all.
        seed: of the order of documents and others.
        settings: fields of `SettleConfig` that replace those of `config`: ``settle(..., lr=1e-4)``.

    Raises:
        ConfigError, DataError: a setting out of range or unknown, no documents, several documents in a row, too few others.
    """
    refuse([f"unknown setting {name}" for name in settings if name not in _SETTINGS], "cannot settle")
    config = replace(config or SettleConfig(), **settings)
    problems = [] if micro_rows is None else int_at_least("micro_rows", micro_rows, 1)
    if config.lr is None:
        problems.append("lr is missing; a tenth of the peak learning rate of training is a good start")
    refuse([*problems, *_weight_problems(model)], "cannot settle")
    others = others.select(slice(OTHERS))
    _check_texts(documents, others, unseen)
    with evaluating(model), unpatched(model):
        result = _level(model, documents, others, unseen, config, micro_rows or config.batch_rows, seed)
    logger.info("settled: %s", result)
    return result


_SETTINGS = tuple(entry.name for entry in dataclasses.fields(SettleConfig))


def _level(
    model: nn.Module,
    documents: Rows,
    others: Rows,
    unseen: Rows | None,
    config: SettleConfig,
    micro_rows: int,
    seed: int,
) -> SettleResult:
    """The steps of `settle`: push the documents, hold the others, then let the sinks follow."""
    expected = expected_losses(model, documents, others, unseen)
    before = losses(model, documents)
    reshard(model)
    shift = shift_of(expected.losses, before)
    shared = [x for x in shared_parameters(model) if x.requires_grad]
    held = {name: x.detach().clone() for name, x in model.named_parameters() if not is_sink(name)}
    target = torch.from_numpy(expected.losses - shift).to(shared[0].device)
    optimizers = _optimizers(model, shared, config)
    own, other = (
        shuffled(len(rows), config.batch_rows, seed + place) for place, rows in enumerate((documents, others))
    )
    steps = math.ceil(config.passes * len(documents) / config.batch_rows)
    pushed = False
    with tqdm(total=steps, desc="settle", disable=None, leave=False) as bar:
        for step in range(steps):
            for optimizer, peak in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = peak * (1 - step / steps)
            chosen, others_chosen = next(own).split(micro_rows), next(other).split(micro_rows)
            batches = [batch_of(documents, part, shared[0].device) for part in chosen]
            short, moved = _push(model, batches, [target[part] for part in chosen]), 0.0
            pushed = pushed or short > 0
            if pushed:  # before, all there is of a gradient is rounding, which AdamW would make a step of
                moved = _hold(model, held, [batch_of(others, part, shared[0].device) for part in others_chosen])
                clip_together(shared, 1.0)
                optimizers[0][0].step()
                optimizers[0][0].zero_grad()
            for optimizer, _ in optimizers[1:]:
                add_own_gradients(model, shared, batches)
                clip_grad_norm_(model, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            bar.update()
            if bar.disable and (step % LOG_EVERY == 0 or step + 1 == steps):
                logger.info(
                    "settle: step %d/%d  below what is expected %.3f  others moved %.4f", step + 1, steps, short, moved
                )
    return SettleResult(expected, shift, before, losses(model, documents), losses(model, others), steps)


def _optimizers(
    model: nn.Module, shared: list[nn.Parameter], config: SettleConfig
) -> list[tuple[torch.optim.Optimizer, float]]:
    """The optimizer of the shared weights and, where there are sinks, theirs; each with its peak learning rate."""
    assert config.lr is not None
    rate = SINK_LR_FACTOR * config.lr if config.sink_lr is None else config.sink_lr
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.AdamW(shared, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0), config.lr)
    ]
    sinks = [x for x in sink_parameters(model) if x.requires_grad]
    if has_sinks(model) and sinks:
        groups = [{"params": sinks, "lazy": True}]
        optimizers.append((AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.0), rate))
    return optimizers


def _push(model: nn.Module, batches: Sequence[Batch], targets: Sequence[Tensor]) -> float:
    """Add the gradient of the mean over documents of how far they are below their targets; that mean, nats."""
    count = sum(len(x) for x in targets)
    total = 0.0
    for batch, target in zip(batches, targets, strict=True):
        found = row_losses(_logits(model, batch), batch["labels"])
        short = (target - found).clamp(min=0).sum() / count
        if any(most_of_ranks(model, [int(short.item() > 0)])):
            short.backward()
        total += short.item()
    return total


def _hold(model: nn.Module, before: dict[str, Tensor], batches: Sequence[Batch]) -> float:
    """Add the gradient of the mean over targets of KL(before || now), sinks closed; that mean, nats."""
    targets = sum(target_count(batch["labels"]) for batch in batches)
    total = 0.0
    for batch in batches:
        apart = _divergence(model, before, batch) / targets
        apart.backward()
        total += apart.item()
    return total


def shift_of(expected: np.ndarray, found: np.ndarray) -> float:
    """The s >= 0 at which the mean of max(found, expected - s) is the mean of `expected`; 0 if it is higher for no s."""
    low, high = 0.0, float(np.max(expected - found).clip(min=0.0))
    if found.mean() >= expected.mean():
        return high
    if np.maximum(found, expected).mean() <= expected.mean():
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(found, expected - middle).mean() > expected.mean() else (low, middle)
    return (low + high) / 2


def require_settleable(model: nn.Module) -> None:
    """ConfigError for weights that `settle` would refuse, so that it is said before hours of training."""
    refuse(_weight_problems(model), "cannot settle")


def _weight_problems(model: nn.Module) -> list[str]:
    shared = [x for x in shared_parameters(model) if x.requires_grad]
    small = sorted({str(x.dtype) for x in shared if x.dtype not in (torch.float32, torch.float64)})
    if small:
        return [f"weights are {', '.join(small)}, which would lose such small steps; load the model in float32"]
    return [] if shared else ["every shared weight is frozen"]


def settling_texts(rows: Rows, unseen: Rows | None = None) -> tuple[Rows, Rows, Rows | None]:
    """Documents, others and unseen texts for `settle` from the training rows; DataError for what it would refuse, so that it
    is said before hours of training."""
    documents, others = repeated_and_once(rows)
    documents = documents.one_segment_each(documents.segments[documents.segments["isolation"] < ISOLATIONS["exact"]])
    _check_texts(documents, others, unseen)
    return documents, others, unseen


def _check_texts(documents: Rows, others: Rows, unseen: Rows | None) -> None:
    if (documents.segments["isolation"] >= ISOLATIONS["exact"]).any():
        raise DataError(
            "documents holds exact or private texts, which must not move the shared weights; take what settling_texts(rows) gives"
        )
    for name, rows in (("documents", documents), ("others", others), ("unseen", unseen)):
        if rows is not None:
            why = {"documents": "no text was repeated", "others": "no text was met once", "unseen": "give None"}[name]
            require_one_text_each(name, rows, f"{why}, so there is nothing to settle")
    require_enough(others, unseen)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits


def _divergence(model: nn.Module, before: dict[str, Tensor], batch: Batch) -> Tensor:
    """Sum over targets of KL(before || now), nats, sinks closed."""
    arguments = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        old = _logits_before(model, before, arguments).float().log_softmax(-1)
    now = model(**arguments).logits.float().log_softmax(-1)
    each = (old.exp() * (old - now)).sum(-1)[:, :-1]
    return each[batch["labels"][:, 1:] != IGNORED].sum()


def _logits_before(model: nn.Module, before: dict[str, Tensor], arguments: Batch) -> Tensor:
    """Logits under earlier weights; a sharded model, which gathers its own, gets them for this one forward."""
    if not is_sharded(model):
        return functional_call(model, before, kwargs=arguments).logits
    reshard(model)
    now = {name: x.detach().clone() for name, x in model.named_parameters() if name in before}
    copy_into(model, before)
    try:
        return model(**arguments).logits
    finally:
        reshard(model)
        copy_into(model, now)
