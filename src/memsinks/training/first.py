"""Sinks learn first: one update of the sinks alone, on texts met before, before each step.

    for batch in batches:
        ms.sinks_first(model, optimizer, [batch])
        model(**batch).loss.backward()
        ...

The shared weights then get the gradient of what the sinks still leave, so less of a repeated text is written into them, and
the sinks recite it after fewer copies. It costs a forward and a backward of the rows that hold such texts, without the
gradients of the shared weights. It runs uncompiled, because the number of those rows differs from step to step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from memsinks.batch import NO_SINKS, ROW_ARGUMENTS, take_rows
from memsinks.errors import ArchitectureError, ConfigError, DataError
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.gradient import frozen
from memsinks.sinks.state import require_sinks, shared_parameters, sink_parameters, unwrap
from memsinks.training.optim import clip_grad_norm_


def sinks_first(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Mapping[str, Tensor]], *, max_norm: float = 1.0,
    num_items_in_batch: Tensor | int | None = None,
) -> int:  # fmt: skip
    """Update the sinks alone, in place, on the rows of a step that hold open text; gradients in ``.grad`` stay as they are.

    Args:
        model: with sinks, in training mode; may be wrapped in DDP, whose ranks must all call this. Under mixed precision call
            it within the same ``torch.autocast`` as the step.
        optimizer: the optimizer of the step, or of the sinks.
        batches: the micro-batches of the step, as the model takes them, each with `document_ids` and `exposures`.
        max_norm: of the sinks' gradient; 0 = no clipping.
        num_items_in_batch: the divisor of the loss, targets of the whole step over all ranks; None = the targets of the rows
            of each micro-batch.

    Returns:
        The number of this rank's rows that were learnt from; 0 on every rank = nothing moved.

    Raises:
        ConfigError: a model in evaluation mode, whose sinks do not follow the ids of a batch.
        DataError: labels, ids or exposures are missing, or a batch where a list of them belongs.
        ArchitectureError: FSDP, where no rank holds whole parameters.
    """
    config = require_sinks(model).config
    model = unwrap(model)
    if not model.training:
        raise ConfigError("sinks_first is for training, the model is in evaluation mode; call model.train() first")
    parameters = sink_parameters(model)
    if any(isinstance(x, DTensor) for x in parameters):
        raise ArchitectureError("sinks_first needs whole parameters on each rank; use DDP or one process, not FSDP")
    if isinstance(batches, Mapping):
        raise DataError("sinks_first takes the list of a step's micro-batches; give [batch]")
    chosen = [_open_rows(batch, config) for batch in batches]
    rows = sum(len(x) for x in chosen)
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if not _anywhere(rows, ranks, parameters[0].device):
        return 0
    held = [(x, x.grad) for x in model.parameters()]
    try:
        for parameter, _ in held:
            parameter.grad = None
        with frozen(shared_parameters(model)), torch.compiler.set_stance("force_eager"):
            for batch, own in zip(batches, chosen, strict=True):
                if len(own):
                    known = {name: batch[name] for name in ROW_ARGUMENTS if batch.get(name) is not None}
                    part = take_rows(known, own, len(batch["labels"]))
                    if num_items_in_batch is not None:
                        part["num_items_in_batch"] = num_items_in_batch
                    model(**part).loss.backward()
        if ranks > 1:
            _over_ranks(parameters, ranks if num_items_in_batch is None else 1)
        if max_norm:
            clip_grad_norm_(model, max_norm)
        getattr(optimizer, "optimizer", optimizer).step()
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient
    return rows


def _open_rows(batch: Mapping[str, Tensor], config: SinkConfig) -> Tensor:
    """The rows with a token whose sinks are open, int64."""
    wanted = ("labels", "document_ids", *(("exposures",) if config.needs_exposures else ()))
    missing = [name for name in wanted if batch.get(name) is None]
    if missing:
        raise DataError(f"sinks_first needs {' and '.join(missing)} in each batch")
    opens = _columns(batch["document_ids"]) != NO_SINKS
    if config.needs_exposures:
        opens = opens & (_columns(batch["exposures"]) >= config.open_from)
    return opens.any(1).nonzero()[:, 0]


def _columns(marks: Tensor) -> Tensor:
    return marks if marks.dim() > 1 else marks[:, None]


def _anywhere(rows: int, ranks: int, device: torch.device) -> bool:
    """Whether any rank has rows."""
    if ranks == 1:
        return rows > 0
    count = torch.tensor(rows, device=device)
    torch.distributed.all_reduce(count)
    return bool(count > 0)


def _over_ranks(parameters: Sequence[nn.Parameter], divisor: int) -> None:
    """Gradients to their sum over the ranks, divided."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= divisor
