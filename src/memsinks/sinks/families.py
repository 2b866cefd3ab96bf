"""Reading a decoder: where its layers and MLPs are, and the few architectures that must be told apart.

An MLP is recognized by the names of its parts and then proved: its output on random inputs must equal
down(act(up x)) or down(act(gate x) * (up x)). What fails the proof (hidden norms, sparse activations, fused kernels) is
refused, so an unknown architecture is either read rightly or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memsinks.errors import ArchitectureError
from memsinks.sinks.quantized import is_packed, packed_spread

ISOLATES_PACKED = frozenset(
    "llama qwen2 qwen3 mistral gemma2 gemma3_text gpt2 gpt_neox gptj gpt_neo olmo2 olmo3 phi phi3 smollm3 granite "
    "stablelm starcoder2 cohere2 nemotron gpt_bigcode exaone4 glm4 seed_oss nanochat "
    "mixtral qwen2_moe qwen3_moe olmoe deepseek_v2 deepseek_v3 granitemoe glm4_moe ernie4_5_moe dots1 hunyuan_v1_moe "
    "flex_olmo llama4_text llava gemma3 qwen3_vl qwen3_vl_text".split()
)
"""Model types in which restarting position_ids was shown to isolate the documents of a packed row. Of a multimodal model both its
own type and that of its language model must be here."""

CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""What configurations call the number of positions."""
RESIDUAL_INSIDE = frozenset({"bloom", "mpt"})
"""Model types whose MLP takes the residual as second argument and adds it."""


@dataclass(frozen=True)
class Layout:
    """Names of an MLP's parts. `gate` is "" without a gate, `up` = `gate` when both are one fused projection."""

    up: str
    down: str
    gate: str = ""


LAYOUTS = (
    Layout("up_proj", "down_proj", "gate_proj"),
    Layout("gate_up_proj", "down_proj", "gate_up_proj"),
    Layout("up_proj", "down_proj"),
    Layout("c_fc", "c_proj"),
    Layout("fc_in", "fc_out"),
    Layout("fc1", "fc2"),
    Layout("dense_h_to_4h", "dense_4h_to_h"),
)
MLP_NAMES = ("mlp", "ffn", "block_sparse_moe", "feed_forward")
ACTIVATIONS = ("act_fn", "activation_fn", "act", "gelu_impl")


@dataclass(frozen=True)
class Mlp:
    """What the sinks need to know of their host: its sizes, its activation, its projections, the spread of its weights.

    up, down, gate: modules with a weight, plain or quantized. gate is None without a gate, and `up` itself where one projection
    holds both, the gate in its first half. transposed: weights are [in, out] (Conv1D) instead of [out, in].
    """

    intermediate_size: int
    hidden_size: int
    act: Callable[[Tensor], Tensor]
    std: float
    up: Any
    down: Any
    gate: Any
    transposed: bool

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return self.gate is not None

    @property
    def weight(self) -> Tensor:
        """A weight of the host, for its dtype and device."""
        return self.down.weight


def context_of(config: Any) -> int:
    """The tokens that a model of this configuration can read at once; 10**9 where it says nothing."""
    text = config.get_text_config()
    return next((int(x) for name in CONTEXT if (x := getattr(text, name, None))), 10**9)


def decoder_layers(model: nn.Module) -> tuple[nn.ModuleList, str]:
    """The decoder's layers and the name of the MLP in each; of a multimodal model, those of its language model.

    Raises:
        ArchitectureError: no such layers (OPT and XGLM have no MLP module), or several stacks of them.
    """
    name, inside = type(model).__name__, _language_model(model)
    lists = [
        (module, mlp)
        for module in inside.modules()
        if isinstance(module, nn.ModuleList) and len(module)
        for mlp in MLP_NAMES
        if all(isinstance(getattr(layer, mlp, None), nn.Module) for layer in module)
    ]
    if not lists:
        raise ArchitectureError(
            f"{name} has no list of decoder layers with a module named {' or '.join(MLP_NAMES)} in each, which is where sinks "
            "are put; OPT, XGLM and encoder models are not supported"
        )
    if len(lists) > 1:
        raise ArchitectureError(
            f"{name} has {len(lists)} stacks of layers with MLPs; only plain decoders are supported, and multimodal models "
            "whose language model is one (model.get_decoder() finds it)"
        )
    return lists[0]


def _language_model(model: Any) -> nn.Module:
    """The part of a multimodal model that reads text; a text model itself."""
    config = getattr(model, "config", None)
    try:
        return model if config is None or config.get_text_config() is config else model.get_decoder()
    except ValueError as error:
        raise ArchitectureError(
            f"{type(model).__name__} has several models of text, not one decoder: {error}"
        ) from error


def read_mlp(mlp: nn.Module, model_type: str, *, quantized: bool = False) -> Mlp:
    """Recognize a host MLP and prove the reading.

    Args:
        quantized: whether its weights may be; what they are as numbers then is not to be had.

    Raises:
        ArchitectureError: unknown parts, or an output that differs from the plain formula.
    """
    name = type(mlp).__name__
    layout = next((x for x in LAYOUTS if all(hasattr(mlp, part) for part in (x.up, x.down, x.gate) if part)), None)
    act = next((getattr(mlp, x) for x in ACTIVATIONS if callable(getattr(mlp, x, None))), None)
    if layout is None or act is None:
        raise ArchitectureError(
            f"{name} is not an MLP that is known here (parts: {[x for x, _ in mlp.named_children()]}), nor a mixture with its "
            "experts in a module `experts`; fused MLPs are not supported"
        )
    if isinstance(act, nn.Module) and any(True for _ in act.parameters()):
        raise ArchitectureError(f"the activation of {name} has parameters of its own, which sinks cannot share")
    up, down = getattr(mlp, layout.up), getattr(mlp, layout.down)
    for part in (up, down):
        weight = getattr(part, "weight", None)
        plain_weight = isinstance(weight, Tensor) and not is_packed(weight) and weight.dim() == 2
        if not plain_weight and not (quantized and isinstance(getattr(part, "in_features", None), int)):
            raise ArchitectureError(
                f"{name} has no plain floating-point weights (quantized?); add sinks before quantizing"
            )
    transposed = type(down).__name__ == "Conv1D"
    sizes = (down.out_features, down.in_features) if is_packed(down.weight) else down.weight.shape
    hidden_size, intermediate_size = sizes if not transposed else sizes[::-1]
    gate = getattr(mlp, layout.gate) if layout.gate else None

    def plain(x: Tensor) -> Tensor:
        if gate is None:
            return down(act(up(x)))
        first, inner = up(x).chunk(2, -1) if gate is up else (gate(x), up(x))
        return down(act(first) * inner)

    if up.weight.device.type != "meta":
        _prove(mlp, plain, hidden_size, model_type)
    if up.weight.device.type == "meta":
        std = 0.02
    else:
        std = packed_spread(up) if is_packed(up.weight) else float(up.weight.detach().float().std())
    if std == 0:
        raise ArchitectureError(f"the weights of {name} are all equal (not initialized?); sinks start at their spread")
    return Mlp(intermediate_size, hidden_size, act, std, up, down, gate, transposed)


@torch.no_grad()
def _prove(mlp: nn.Module, plain: Callable[[Tensor], Tensor], hidden_size: int, model_type: str) -> None:
    weight = next(mlp.parameters())
    dtype = weight.dtype if weight.dtype.itemsize > 1 else torch.float32
    x = torch.randn(1, 4, hidden_size, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    more: tuple[Any, ...] = (torch.zeros_like(x),) if model_type in RESIDUAL_INSIDE else ()
    training = mlp.training
    mlp.eval()
    try:
        got = mlp(x, *more)
    except Exception as error:
        raise ArchitectureError(f"{type(mlp).__name__} cannot be called as an MLP of one input: {error}") from error
    finally:
        mlp.train(training)
    want = plain(x)
    if not isinstance(got, Tensor) or got.shape != want.shape:
        raise ArchitectureError(f"{type(mlp).__name__} does not return one tensor of the shape of its input")
    exact = dtype in (torch.float32, torch.float64) and not any(map(is_packed, mlp.parameters()))
    tolerance = 1e-4 if exact else 3e-2
    error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-20))
    if not error <= tolerance:
        raise ArchitectureError(
            f"{type(mlp).__name__} does not compute down(act(up x)) or down(act(gate x) * (up x)): relative error "
            f"{error:.2g} (a norm inside the MLP, as in BitNet, or a sparse activation); sinks beside it would not match it"
        )
