"""The sink module: the second, routed MLP that stands beside the host's MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memsinks.sinks.config import SinkConfig
from memsinks.sinks.kernels import Activation, sink_forward
from memsinks.sinks.plan import LayerPlan


class Sinks(nn.Module):
    """The sink neurons of one layer.

    Parameters `up`, `down` and, beside a gated MLP, `gate`: [blocks, block_size, d]. No biases.

    Args:
        config: the sink settings.
        hidden_size: d, the model width.
        act: the host's activation, shared with it.
        gated: whether the host's MLP has a gate.
        std: standard deviation of `up` and `gate` at the start (the host's); `down` starts at zero, so that adding
            sinks changes no output, open or closed.
        layer: index of the layer; makes the start values differ.
        dtype, device: of the parameters. On the meta device nothing is initialized.
    """

    def __init__(
        self,
        config: SinkConfig,
        *,
        hidden_size: int,
        act: Activation,
        gated: bool,
        std: float,
        layer: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        shape = (config.blocks, config.block_size, hidden_size)
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + layer) % 2**63)

        def start() -> nn.Parameter:
            if device.type == "meta":
                return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
            values = torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
            return nn.Parameter(values.to(device, dtype))

        self.up = start()
        self.gate = start() if gated else None
        self.down = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        self.act = act

    def forward(self, x: Tensor, plan: LayerPlan, scale: Tensor | None) -> Tensor:
        """What the open sinks add to the MLP output; x: [..., d], see `kernels.sink_forward`."""
        flat = sink_forward(x.reshape(-1, x.shape[-1]), self.up, self.gate, self.down, self.act, plan, scale)
        return flat.view(x.shape)

    def extra_repr(self) -> str:
        blocks, size, hidden_size = self.up.shape
        return f"blocks={blocks}, block_size={size}, hidden_size={hidden_size}, gated={self.gate is not None}"
