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
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .attach import require_sinks, unwrap
from .config import ArchitectureError, ConfigError, DataError
from .hosts import shared_parameters, sink_parameters
from .identity import NO_SINKS
from .objective import frozen
from .optim import clip_grad_norm_
from .packing import FIELDS


def sinks_first(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Mapping[str, Tensor]], *, max_norm: float = 1.0,
    num_items_in_batch: Tensor | int | None = None,
) -> int:  # fmt: skip
    """Update the sinks alone, in place, on the rows of a step that hold open text; gradients in ``.grad`` stay as they are.

    Args:
        model: with sinks, in training mode; may be wrapped in DDP, whose ranks must all call this.
        optimizer: the optimizer of the step, or of the sinks.
        batches: the micro-batches of the step, as the model takes them, each with `document_ids` and `exposures`.
        max_norm: of the sinks' gradient; 0 = no clipping.
        num_items_in_batch: the divisor of the loss, targets of the whole step over all ranks; None = the targets of the rows
            of each micro-batch.

    Returns:
        The number of rows that were learnt from on this rank; 0 = nothing moved here.

    Raises:
        ConfigError: a model in evaluation mode, whose sinks do not follow the ids of a batch.
        DataError: ids or exposures are missing.
        ArchitectureError: FSDP, where no rank holds whole parameters.
    """
    config = require_sinks(model).config
    model = unwrap(model)
    if not model.training:
        raise ConfigError("sinks_first is for training, the model is in evaluation mode; call model.train() first")
    parameters = sink_parameters(model)
    if any(isinstance(x, DTensor) for x in parameters):
        raise ArchitectureError("sinks_first needs whole parameters on each rank; use DDP or one process, not FSDP")
    held = [(x, x.grad) for x in model.parameters()]
    rows = 0
    try:
        for parameter, _ in held:
            parameter.grad = None
        with frozen(shared_parameters(model)), torch.compiler.set_stance("force_eager"):
            for batch in batches:
                chosen = _open_rows(batch, config.open_from)
                if not len(chosen):
                    continue
                rows += len(chosen)
                part: dict[str, Any] = {
                    name: batch[name][chosen] for name in (*FIELDS, "attention_mask") if batch.get(name) is not None
                }
                if num_items_in_batch is not None:
                    part["num_items_in_batch"] = num_items_in_batch
                model(**part).loss.backward()
        if _over_ranks(parameters, mean=num_items_in_batch is None) or rows:
            if max_norm:
                clip_grad_norm_(model, max_norm)
            getattr(optimizer, "optimizer", optimizer).step()
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient
    return rows


def _open_rows(batch: Mapping[str, Tensor], open_from: int) -> Tensor:
    """The rows with a token whose sinks are open, int64."""
    missing = [name for name in ("document_ids", "exposures") if batch.get(name) is None]
    if missing:
        raise DataError(f"sinks_first needs {' and '.join(missing)} in each batch")
    opens = (batch["document_ids"] != NO_SINKS) & (batch["exposures"] >= open_from)
    return (opens if opens.dim() == 1 else opens.any(1)).nonzero()[:, 0]


def _over_ranks(parameters: Sequence[nn.Parameter], mean: bool) -> bool:
    """Gradients to their mean or sum over the ranks; whether there are several."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    ranks = torch.distributed.get_world_size()
    if ranks == 1:
        return False
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)
        if mean:
            parameter.grad /= ranks
    return True
