"""What a way of training may change.

A batch is what `collate` gives, int64 [rows, length] each, and two masks, bool [rows, length]: `audited` (tokens of documents
that the audit asks for) and `repeated` (those of them with 2 copies or more).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memsinks.batch import IGNORED, stock_arguments
from memsinks.removal.settle import SettleConfig
from memsinks.sinks.attach import remove_sinks
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.state import has_sinks
from memsinks.training.loop import Batch, plain_step, unchanged

Edit = Callable[[PreTrainedModel, Sequence[Batch], Sequence[Batch], int], Iterator[PreTrainedModel]]
"""See `EditingMethod.edit`."""


def remove_all_sinks(model: PreTrainedModel) -> None:
    """What is exported of a model with sinks."""
    if has_sinks(model):
        remove_sinks(model)


@dataclass(frozen=True, kw_only=True)
class TrainingMethod:
    """One way to train. Everything not set is ordinary training.

    Args:
        extra_neurons: neurons beyond the recipe's in each MLP while training; below 0 fewer.
        heads: attention heads beyond the recipe's.
        sinks: sinks to add; their seed becomes the run's.
        sink_lr_factor: learning rate of the sinks over that of the rest.
        sinks_first: updates of the sinks alone before each step, at most; sinks_first_until: see `TrainingConfig`.
        change: what is done to each batch: other targets (`IGNORED` drops one), other document ids.
        step: gradients of one step.
        remove: takes out, in place, what is not exported.
        sinks_last: passes over the repeated texts after training that train their sinks alone, see `sinks_last`.
        fresh: whether other text, that of ``data.fresh``, stands in the rows of all copies but the first.
        settle: how it is settled, which comes after training, before removal; None = it does not.
        rescales: also export with these factors of the general neurons (`SinkConfig.rescale_factors`).
    """

    extra_neurons: int = 0
    heads: int = 0
    sinks: SinkConfig | None = None
    sink_lr_factor: float = 1.0
    sinks_first: int = 0
    sinks_first_until: float = 0.0
    change: Callable[[Batch], Batch] = unchanged
    step: Callable[[PreTrainedModel, Batch, Tensor], float] = plain_step
    remove: Callable[[PreTrainedModel], None] = remove_all_sinks
    sinks_last: int = 0
    fresh: bool = False
    settle: SettleConfig | None = None
    rescales: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EditingMethod:
    """One way to edit a model that another arm has trained.

    Args:
        after: the name of that arm.
        sweep: the names of the models that come out of `edit`.
        edit: (trained model, batches of the repeated documents, batches of documents seen once, seed) -> a model for each
            value of the sweep, in this order; the next one may change the one before.
    """

    after: str
    sweep: tuple[str, ...]
    edit: Edit


Method = TrainingMethod | EditingMethod
"""What a rival is."""


def settling(lr: float, passes: int) -> SettleConfig | None:
    """`TrainingMethod.settle` of an arm; a learning rate of 0 is none."""
    return SettleConfig(lr=lr, passes=passes) if lr else None


def without(batch: Batch, dropped: Tensor) -> Batch:
    """The batch with no loss at the tokens `dropped`, bool [rows, length]."""
    return {**batch, "labels": batch["labels"].masked_fill(dropped, IGNORED)}


def masked_gradients(
    model: PreTrainedModel, batch: Batch, divisor: Tensor, keep: Mapping[nn.Parameter, Tensor | None]
) -> float:
    """Add the gradient of one batch to ``.grad``, only where `keep` is 1; returns its share of the loss, nats.

    Args:
        keep: for each parameter that is to learn a mask that broadcasts to its shape, or None for all of it; a parameter that
            is not named learns nothing. A batch without a target adds nothing.
    """
    if not bool((batch["labels"] != IGNORED).any()):
        return 0.0
    loss = model(**stock_arguments(batch), num_items_in_batch=divisor).loss
    parameters = list(keep)
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        if gradient is None:
            continue
        mask = keep[parameter]
        gradient = gradient if mask is None else gradient * mask
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return loss.item()
