"""A reserved part of MLPs and attention: which weights it is, zeroing it in the forward, cutting it out afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memsinks.errors import ArchitectureError
from memsinks.sinks.families import decoder_layers

MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def parts(model: PreTrainedModel) -> list[tuple[Any, Any]]:
    """(MLP, attention) of each layer; ArchitectureError unless they are those of Llama and its relatives."""
    layers, name = decoder_layers(model)
    found = [(getattr(layer, name), getattr(layer, "self_attn", None)) for layer in layers]
    for mlp, attention in found:
        missing = [x for x in MLP if not hasattr(mlp, x)] + [x for x in ATTENTION if not hasattr(attention, x)]
        if missing:
            raise ArchitectureError(
                f"{type(model).__name__} has no {', '.join(missing)}; reserved parts need an architecture like Llama's"
            )
    return found


def reserved_masks(model: PreTrainedModel, neurons: int, heads: int) -> dict[nn.Parameter, Tensor]:
    """For each weight that has a reserved part, 1 there and 0 elsewhere, of a shape that broadcasts.

    The last `neurons` of each MLP and the last `heads` heads of each attention (with as many key-value heads).
    """
    masks: dict[nn.Parameter, Tensor] = {}
    size: int = model.config.hidden_size // model.config.num_attention_heads
    size = getattr(model.config, "head_dim", None) or size
    for mlp, attention in parts(model):
        modules = [(mlp, x, neurons, int(x == "down_proj")) for x in MLP if neurons]
        modules += [(attention, x, heads * size, int(x == "o_proj")) for x in ATTENTION if heads]
        for module, name, count, axis in modules:
            weight = getattr(module, name).weight
            line = torch.zeros(weight.shape[axis], device=weight.device)
            line[len(line) - count :] = 1
            masks[weight] = line[None] if axis else line[:, None]
    return masks


@contextmanager
def reserved_off(model: PreTrainedModel, masks: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Within the block the reserved part gives nothing (what enters down and output projections is zeroed)."""
    hooks = []
    for mlp, attention in parts(model):
        for module in (mlp.down_proj, attention.o_proj):
            if module.weight in masks:
                keep = 1 - masks[module.weight][0]
                hooks.append(module.register_forward_pre_hook(lambda _, args, keep=keep: (args[0] * keep,)))  # type: ignore
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def cut_out(model: PreTrainedModel, neurons: int, heads: int) -> None:
    """Take the reserved part out, in place: the model gets the shapes of one that never had it."""
    size = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads

    def shorten(linear: Any, count: int, axis: int) -> None:
        if count:
            kept = linear.weight.shape[axis] - count
            linear.weight = nn.Parameter(linear.weight.narrow(axis, 0, kept).clone())
            linear.out_features, linear.in_features = linear.weight.shape
            if linear.bias is not None and axis == 0:
                linear.bias = nn.Parameter(linear.bias[:kept].clone())

    for mlp, attention in parts(model):
        for name in MLP:
            shorten(getattr(mlp, name), neurons, int(name == "down_proj"))
        for name in ATTENTION:
            shorten(getattr(attention, name), heads * size, int(name == "o_proj"))
    model.config.intermediate_size -= neurons
    model.config.head_dim = size
    model.config.num_attention_heads -= heads
    model.config.num_key_value_heads -= heads
