"""One run of the stock forward under a routing plan, which is dropped at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from memsinks.batch import NO_SINKS
from memsinks.errors import ArchitectureError, ConfigError
from memsinks.sinks.kernels import choose_path
from memsinks.sinks.plan import RoutingPlan, closed_plan, plan
from memsinks.sinks.state import SinkState


def run(
    model: Any, stock: Any, arguments: dict[str, Any], ids: Tensor, weight: Tensor | None, zero_gradient: bool = True
) -> Any:
    """The stock forward with the sinks of `ids` open.

    Args:
        ids: int64 [B, T] or [B, T, union]; -1 opens nothing.
        weight: float64 [B, T], above 0, of each token's gradient in the shared weights; None = 1.
        zero_gradient: where no token opens anything, the sinks get a gradient of zeros.
    """
    state: SinkState = model.sink_state
    if not torch.compiler.is_compiling() and not bool((ids != NO_SINKS).any()):
        with planned(state, closed_plan(state.layers, zero_gradient), weight):
            return stock(**arguments)
    scale = None if weight is None else 1.0 / weight.reshape(-1)
    path = state.path or choose_path(state.config, model.dtype, ids.device)
    flat = ids.reshape(-1) if ids.dim() == 2 else ids.reshape(-1, ids.shape[-1])
    with planned(state, plan(flat, state.layers, state.config, state.table, path=path, weight_scale=scale), weight):
        return stock(**arguments)


def run_weighted(
    model: Any, stock: Any, arguments: dict[str, Any], ids: Tensor, weight: Tensor | None, zero_gradient: bool = True
) -> Any:
    """`run`, and a ConfigError where the weight was not used: no logits, or a loss that couples the batch."""
    if weight is not None and not hasattr(type(model.get_output_embeddings()), "stock_class"):
        raise ArchitectureError(
            "shared_decay scales the gradient at the output embedding, which something has wrapped since add_sinks (an adapter "
            "of PEFT?), so part of the logits would pass by; leave it out of target_modules and modules_to_save, or use "
            'SinkConfig(shared="none")'
        )
    out = run(model, stock, arguments, ids, weight, zero_gradient)
    if weight is None:
        return out
    if not model.sink_state.running.weight_used:
        raise ConfigError(
            "shared_decay scales the gradient at the logits, but this forward computed none (a fused loss?); "
            "turn the fused loss off, or use SinkConfig(shared_decay=0)"
        )
    if getattr(out, "aux_loss", None) is not None:
        raise ConfigError("shared_decay cannot be combined with a loss that couples the batch (aux_loss); turn it off")
    return out


@contextmanager
def planned(state: SinkState, routing: RoutingPlan, weight: Tensor | None) -> Iterator[None]:
    """Within the block the layers of this thread's forward see the plan."""
    running = state.running
    running.plan, running.weight, running.weight_used = routing, weight, False
    try:
        yield
    finally:
        running.plan, running.weight = None, None
