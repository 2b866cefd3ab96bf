"""Reading a host of sinks: an MLP, or a mixture of experts, beside which the sinks stand as a shared expert would.

What a mixture computes has no one formula to prove. Proved is what the sinks need: that it maps each token to one of the model's
width and looks at no other token, so that nothing of a document reaches another through its router.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from memsinks.errors import ArchitectureError
from memsinks.sinks.families import Mlp, read_mlp
from memsinks.sinks.quantized import is_packed


@dataclass(frozen=True)
class Experts:
    """What the sinks need to know of a mixture of experts.

    intermediate_size: of one expert. act: of the experts; SiLU where they have a formula of their own (GPT-OSS). std: of the
    weights into an expert. weight: of the experts, for its dtype and device.
    """

    intermediate_size: int
    hidden_size: int
    act: Callable[[Tensor], Tensor]
    std: float
    weight: Tensor
    gated: bool = True


def read_host(module: nn.Module, config: PretrainedConfig) -> Mlp | Experts:
    """Recognize what sinks are put beside, by the model's config.

    Raises:
        ArchitectureError: see `read_mlp`; a mixture whose parts are unknown, or whose tokens are not independent.
    """
    if not is_mixture(module):
        return read_mlp(module, config.model_type, quantized=True)
    name, experts = type(module).__name__, module.get_submodule("experts")
    down: Any = getattr(experts, "down_proj", None)
    into: Any = getattr(experts, "gate_up_proj", getattr(experts, "up_proj", None))
    text = config.get_text_config()
    act = getattr(experts, "act_fn", None)
    if act is None and getattr(text, "hidden_act", None) in ACT2FN:
        act = ACT2FN[text.hidden_act]
    plain = all(isinstance(x, Tensor) and x.dim() == 3 and not is_packed(x) for x in (down, into))
    if not plain or act is None or text.hidden_size not in down.shape[1:]:
        raise ArchitectureError(
            f"{name} is not a mixture of experts that is known here: their weights must be up_proj or gate_up_proj and "
            f"down_proj [experts, .., ..] with an activation (parts: {[x for x, _ in experts.named_parameters()][:4]})"
        )
    if down.device.type == "meta":
        return Experts(down[0].numel() // text.hidden_size, text.hidden_size, act, 0.02, down)
    _prove(module, text.hidden_size, down)
    std = float(into[0].detach().float().std())
    if std == 0:
        raise ArchitectureError(f"the weights of {name} are all equal (not initialized?); sinks start at their spread")
    return Experts(down[0].numel() // text.hidden_size, text.hidden_size, act, std, down)


def is_mixture(module: nn.Module) -> bool:
    """Whether a module that stands for an MLP holds experts."""
    return isinstance(getattr(module, "experts", None), nn.Module)


def first_of(out: Any) -> Any:
    """What a host gives: some mixtures return the router's scores beside it."""
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def _prove(module: nn.Module, hidden_size: int, weight: Tensor) -> None:
    name = type(module).__name__
    x = torch.randn(1, 8, hidden_size, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    other = x.clone()
    other[:, 4:] = x[:, :4]
    training = module.training
    module.eval()
    try:
        found, alone = (first_of(module(each.clone())) for each in (x, other))
    except Exception as error:
        raise ArchitectureError(f"{name} cannot be called as an MLP of one input: {error}") from error
    finally:
        module.train(training)
    if not isinstance(found, Tensor) or found.numel() != x.numel():
        raise ArchitectureError(f"{name} does not return a tensor of the shape of its input, to which sinks could add")
    found, alone = found.reshape(x.shape), alone.reshape(x.shape)
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2
    pairs = ((found[:, :4], alone[:, :4]), (found[:, :4], alone[:, 4:]))
    error = max(float((a - b).abs().max()) for a, b in pairs) / max(float(found.abs().max()), 1e-20)
    if not error <= tolerance:
        raise ArchitectureError(
            f"what {name} gives for a token depends on the other tokens (relative error {error:.2g}; experts of limited "
            "capacity?), so documents would reach each other through it"
        )
