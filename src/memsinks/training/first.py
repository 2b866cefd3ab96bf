"""Sinks learn first: updates of the sinks alone, on texts met before, before each step.

    for batch in batches:
        ms.sinks_first(model, optimizer, [batch])  # once a step: the list of its micro-batches
        model(**batch).loss.backward()
        ...

The shared weights then get the gradient of what the sinks still leave, so less of a repeated text is written into them, and
the sinks recite it after fewer copies. With as many updates as it takes until a text's own loss is low, next to nothing is left.
An update costs a forward and a backward of the rows that hold such texts, without the gradients of the shared weights. It runs
uncompiled, because the number of those rows differs from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from memsinks.batch import IGNORED, ISOLATION, NO_SINKS, ROW_ARGUMENTS, take_rows, target_count
from memsinks.checks import at_least, int_at_least
from memsinks.errors import ConfigError, DataError, refuse
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.gradient import frozen, opened_ids
from memsinks.sinks.sharding import is_sharded, most_of_ranks, reshard
from memsinks.sinks.state import require_sinks, shared_parameters, sink_parameters, unwrap
from memsinks.training.evaluate import gradients_aside, row_losses
from memsinks.training.exchange import add_open_blocks
from memsinks.training.optim import clip_grad_norm_
from memsinks.training.processes import process_count, sum_over

Loss = Callable[[nn.Module, dict[str, Tensor], Mapping[str, Tensor]], Tensor]
"""(model, rows of a micro-batch, the micro-batch) -> their share of the loss of the step, scaled so that the gradient of the step
is the mean over the ranks, as DDP makes it."""


def sinks_first(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    updates: int = 1,
    until: float = 0.0,
    max_norm: float | None = 1.0,
    num_items_in_batch: Tensor | int | None = None,
    loss: Loss | None = None,
) -> int:
    """Update the sinks alone, in place, on the rows of a step that hold open text; gradients in ``.grad`` stay as they are.

    Args:
        model: with sinks, in training mode; may be wrapped in DDP or sharded (FSDP2), whose ranks must all call this, those
            without rows with an empty list. Under mixed precision call it within the same ``torch.autocast`` as the step.
        optimizer: the optimizer of the step, or of the sinks.
        batches: the micro-batches of the step, as the model takes them, each with `document_ids` and `exposures`. Their
            gradients add up to those of one batch.
        updates: how many there are at most.
        until: a row takes part in one more update while the mean loss of those of its targets whose sinks are open was above
            this in the one before, nats.
        max_norm: of the sinks' gradient, see `clip_grad_norm_`; 0 or None = no clipping.
        num_items_in_batch: the divisor of the loss, targets of the whole step over all ranks; None = those of `batches` over
            all ranks.
        loss: what a step learns, if it is not the model's own loss; `num_items_in_batch` is then not looked at.

    Returns:
        The number of this rank's rows that were learned from, counted in each update; 0 on every rank = nothing moved.

    Raises:
        ConfigError: a model in evaluation mode, whose sinks do not follow the ids of a batch; `updates` below 1, `until` below 0.
        DataError: labels, ids or exposures are missing, or a batch where a list of them belongs.
        ArchitectureError: FSDP1.
    """
    config = require_sinks(model).config
    model = unwrap(model)
    if not model.training:
        raise ConfigError("sinks_first is for training, the model is in evaluation mode; call model.train() first")
    parameters = sink_parameters(model)
    sharded = is_sharded(model)
    if sharded:
        reshard(model)
        parameters = sink_parameters(model)
    if isinstance(batches, Mapping):
        raise DataError("sinks_first takes the list of a step's micro-batches; give [batch]")
    refuse(int_at_least("updates", updates, 1) + at_least("until", until, 0), "cannot update the sinks")
    chosen = [_open_rows(batch, config) for batch in batches]
    device, own_loss, learned = parameters[0].device, loss is not None, 0
    loss = loss or _model_loss(batches, num_items_in_batch, device, process_count() if sharded else 1)
    with gradients_aside(model):
        for _ in range(updates):
            rows = sum(len(x) for x in chosen)
            if not sum_over(torch.tensor(rows), device):
                break
            learned += rows
            model.zero_grad()
            forwards = sum(len(own) > 0 for own in chosen)
            without_effect = most_of_ranks(model, [forwards])[0] - forwards
            with frozen(shared_parameters(model)), torch.compiler.set_stance("force_eager"):
                left = [_learn(model, loss, batch, own, until) for batch, own in zip(batches, chosen, strict=True)]
                for _ in range(without_effect):
                    _run_without_effect(model, device)
            if process_count() > 1 and not sharded:
                _exchange_gradients(parameters, mean=own_loss)
            clip_grad_norm_(model, max_norm)
            getattr(optimizer, "optimizer", optimizer).step()
            chosen = left
    return learned


def _learn(model: nn.Module, loss: Loss, batch: Mapping[str, Tensor], own: Tensor, until: float) -> Tensor:
    """Add the gradient of some rows of a micro-batch; returns those of them whose loss was above `until`, int64."""
    if not len(own):
        return own
    part = _part(batch, own)
    if not until:
        loss(model, part, batch).backward()
        return own
    logits: list[Tensor] = []
    hook = model.register_forward_hook(lambda *seen: logits.append(seen[-1].logits.detach()))
    try:
        loss(model, dict(part), batch).backward()  # label smoothing takes the labels out
    finally:
        hook.remove()
    opens = _opens(part, require_sinks(model).config)
    wanted = part["labels"].masked_fill(~opens.expand_as(part["labels"]), IGNORED)
    return own[(row_losses(logits[-1], wanted) > until).to(own.device)]


def _run_without_effect(model: nn.Module, device: torch.device) -> None:
    """A forward and backward that change nothing, beside those of other ranks of a sharded model."""
    row = torch.zeros(1, 2, dtype=torch.int64, device=device)
    marks = {"document_ids": row + NO_SINKS, "exposures": row + 1, "position_ids": torch.arange(2, device=device)[None]}
    (
        model(input_ids=row, labels=row + IGNORED, num_items_in_batch=row[0, 0] + 1, **marks).logits.sum() * 0.0
    ).backward()


def _model_loss(
    batches: Sequence[Mapping[str, Tensor]], divisor: Tensor | int | None, device: torch.device, times: int
) -> Loss:
    """The model's own loss over the targets of the whole step, `times` that."""
    if divisor is None:
        targets = torch.tensor(sum(target_count(batch["labels"]) for batch in batches))
        divisor = sum_over(targets, device).clamp(min=1)
    return lambda model, rows, _: model(**rows, num_items_in_batch=divisor).loss * times


def _part(batch: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The rows of a batch, without their places in the training order: the step itself meets them there."""
    known = {name: batch[name] for name in ROW_ARGUMENTS if name != "places" and batch.get(name) is not None}
    return take_rows(known, rows, len(batch["labels"]))


def _open_rows(batch: Mapping[str, Tensor], config: SinkConfig) -> Tensor:
    """The rows with a token whose sinks are open, int64."""
    wanted = ("labels", "document_ids", *(("exposures",) if config.needs_exposures else ()))
    missing = [name for name in wanted if batch.get(name) is None]
    if missing:
        raise DataError(f"sinks_first needs {' and '.join(missing)} in each batch")
    return _opens(batch, config).any(1).nonzero()[:, 0]


def _opens(batch: Mapping[str, Tensor], config: SinkConfig) -> Tensor:
    """Whose sinks are open, bool [rows, length or 1]."""
    ids = _columns(batch["document_ids"])
    if not config.needs_exposures:
        return ids != NO_SINKS
    flags = batch.get(ISOLATION)
    return opened_ids(config, ids, _columns(batch["exposures"]), None if flags is None else _columns(flags)) != NO_SINKS


def _columns(marks: Tensor) -> Tensor:
    return marks if marks.dim() > 1 else marks[:, None]


def _exchange_gradients(parameters: Sequence[nn.Parameter], *, mean: bool) -> None:
    """Gradients to their sum over the processes, or their mean."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [x.grad for x in parameters if x.grad is not None]
    add_open_blocks(gradients)
    if mean:
        for gradient in gradients:
            gradient /= process_count()
