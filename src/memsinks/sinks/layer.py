"""The sink module: the second, routed MLP that stands beside the host's MLP."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memsinks.sinks.config import SinkConfig
from memsinks.sinks.gradient import ZeroGradient
from memsinks.sinks.kernels import Activation, sink_forward
from memsinks.sinks.plan import Closed, LayerPlan


class Sinks(nn.Module):
    """The sink neurons of one layer.

    Parameters `up`, `down` and, beside a gated MLP, `gate`: [blocks, block_size, d]. No biases.

    Args:
        config: the sink settings.
        hidden_size: d, the model width.
        act: the host's activation, shared with it.
        gated: whether the host's MLP has a gate.
        std: standard deviation of `up` and `gate` at the start; `down` starts at zero, so that adding
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
        self.std, self.layer, self.seed, self.act = std, layer, config.seed, act
        shape = (config.blocks, config.block_size, hidden_size)
        up, gate = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        if device.type != "meta":
            generator = torch.Generator().manual_seed((config.seed * 1_000_003 + layer) % 2**63)
            for part in (up, gate) if gated else (up,):
                hashed = part[: config.hashed_blocks]
                values = torch.empty(hashed.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
                hashed.copy_(values)
            for block in range(config.hashed_blocks, config.blocks):
                up[block], gate[block] = start_of(self.seed, layer, block, std, shape[1:])
        self.up = nn.Parameter(up)
        self.gate = nn.Parameter(gate) if gated else None
        self.down = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))

    @torch.no_grad()
    def start_anew(self, blocks: Sequence[int]) -> None:
        """Give some blocks that are not hashed to the values they started with."""
        for block in blocks:
            up, gate = start_of(self.seed, self.layer, block, self.std, tuple(self.up.shape[1:]))
            self.up[block] = up.to(self.up.device, self.up.dtype)
            if self.gate is not None:
                self.gate[block] = gate.to(self.gate.device, self.gate.dtype)
            self.down[block] = 0

    @torch.no_grad()
    def larger(self, blocks: int) -> dict[str, nn.Parameter]:
        """The parameters by name with `blocks` zero blocks at the end, for `grow`."""
        return {
            name: nn.Parameter(
                torch.cat([parameter.data, parameter.new_zeros(blocks, *parameter.shape[1:])]), parameter.requires_grad
            )
            for name, parameter in self.named_parameters()
        }

    def grow(self, larger: dict[str, nn.Parameter]) -> None:
        """Take larger parameters, whose new blocks start; the blocks there keep their bits."""
        before = len(self.up)
        for name, parameter in larger.items():
            getattr(self, name).outgrown = True  # an optimizer that still has it would move nothing
            setattr(self, name, parameter)
        if self.up.device.type != "meta":
            self.start_anew(range(before, len(self.up)))

    def forward(self, x: Tensor, plan: LayerPlan, scale: Tensor | None) -> Tensor:
        """What the open sinks add to the MLP output; x: [..., d], see `kernels.sink_forward`.

        Under a closed plan x is the MLP's output, which comes back as it is, and the sinks get a gradient of zeros.
        """
        if isinstance(plan, Closed):
            learning = [x for x in self.parameters() if x.requires_grad]
            if not learning or not torch.is_grad_enabled():
                return x
            return ZeroGradient.apply(x, *learning).clone()  # Falcon writes into it, which a view of a Function forbids
        flat = sink_forward(x.reshape(-1, x.shape[-1]), self.up, self.gate, self.down, self.act, plan, scale)
        return flat.view(x.shape)

    def extra_repr(self) -> str:
        blocks, size, hidden_size = self.up.shape
        return f"blocks={blocks}, block_size={size}, hidden_size={hidden_size}, gated={self.gate is not None}"


def start_of(seed: int, layer: int, block: int, std: float, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The start values of `up` and `gate` of a block that is not hashed to, float32 [block_size, d] each.

    They depend on seed, layer and number of the block alone, so that a block can start anew at any time.
    """
    text = f"memsinks block {seed} {layer} {block}".encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") & (2**63 - 1)
    values = torch.empty((2, *shape), dtype=torch.float32)
    up, gate = values.normal_(0.0, std, generator=torch.Generator().manual_seed(number))
    return up, gate
