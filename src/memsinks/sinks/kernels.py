"""What a sink layer computes, and by which path: masked (every sink, then a mask), tiled or grouped (only what is open).

All give, for each token t with open blocks O(t),

    y_t = sum over b in O(t) of  down_b^T ( act(gate_b x_t) * (up_b x_t) )        (without gate: act(up_b x_t))

and all multiply the *weight* gradient of token t by ``weight_scale[t]``, while the gradient to x is the true one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from memsinks.sinks.config import SinkConfig
from memsinks.sinks.grouped import ALIGNED, grouped
from memsinks.sinks.plan import ComputePath, LayerPlan, Mask, Pairs
from memsinks.sinks.tiled import tiled

Activation = Callable[[Tensor], Tensor]


def choose_path(config: SinkConfig, dtype: torch.dtype, device: torch.device) -> ComputePath:
    """The compute path, from the settings and the kind of tensors alone, never from data.

    Masked for single neurons, odd blocks, small pools to which ids are hashed (S <= 2a, where computing all is cheapest) and, as
    the plainest path, in float64. Otherwise tiled on a CPU, where a matrix product can start at any time, and grouped elsewhere.
    Where all blocks are owners' own, tiled and grouped compute none that is closed, so no nan in it reaches another owner.
    """
    odd = config.routing != "blocks" or config.block_size % ALIGNED != 0
    small = bool(config.hashed_blocks) and config.neurons <= 2 * config.active
    if odd or small or dtype == torch.float64:
        return "masked"
    return "tiled" if device.type == "cpu" else "grouped"


def sink_forward(
    x: Tensor, up: Tensor, gate: Tensor | None, down: Tensor, act: Activation, plan: LayerPlan, scale: Tensor | None
) -> Tensor:
    """The sinks' contribution to the MLP output.

    Args:
        x: [tokens, d].
        up, gate, down: [blocks, block_size, d]; gate None for an MLP without gate. Their dtype may differ from that of x, as
            float32 sinks beside a bfloat16 host do; the products are taken in that of x.
        act: the host's activation.
        plan: what each token opens.
        scale: [tokens] factor of each token's weight gradient, or None for 1.

    Returns:
        [tokens, d], in the dtype of x, or in the autocast dtype where autocast is on.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    x, up, down = x.to(dtype), up.to(dtype), down.to(dtype)
    gate = None if gate is None else gate.to(dtype)
    path: Callable[..., Tensor] = _masked if isinstance(plan, Mask) else grouped if isinstance(plan, Pairs) else tiled
    with torch.autocast(x.device.type, enabled=False):
        return path(x, up, gate, down, act, plan, scale)


def _masked(
    x: Tensor, up: Tensor, gate: Tensor | None, down: Tensor, act: Activation, plan: Mask, scale: Tensor | None
) -> Tensor:
    (mask,) = plan
    tokens, (blocks, size, width) = len(x), up.shape
    hidden = _hidden(x, up.view(-1, width), None if gate is None else gate.view(-1, width), act, scale)
    hidden = (hidden.view(tokens, blocks, size) * mask[:, :, None].to(hidden.dtype)).view(tokens, -1)
    return ScaledLinear.apply(hidden, down.view(-1, width).t(), scale)


def _hidden(x: Tensor, up: Tensor, gate: Tensor | None, act: Activation, scale: Tensor | None) -> Tensor:
    if gate is None:
        return act(ScaledLinear.apply(x, up, scale))
    return act(ScaledLinear.apply(x, gate, scale)) * ScaledLinear.apply(x, up, scale)


class ScaledLinear(torch.autograd.Function):
    """x @ weight^T whose weight gradient counts row t ``scale[t]`` times (scale None = once)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        return linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        into_x = grad @ weight if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return into_x, None, None
        scaled = grad if scale is None else grad * scale[:, None].to(grad.dtype)
        return into_x, scaled.t() @ x, None
