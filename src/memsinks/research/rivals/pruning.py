"""Single neurons of the MLPs of a trained model: looking at them, switching them off, zeroing the top of a ranking.

A set of neurons is a bool tensor [layers, neurons], a ranking a float tensor [layers, neurons]. Works on every decoder
whose MLPs `families` can read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memsinks.errors import ArchitectureError, ConfigError
from memsinks.sinks.families import LAYOUTS, decoder_layers, read_mlp


def mlps(model: nn.Module) -> list[Any]:
    """The MLP of each layer."""
    layers, name = decoder_layers(model)
    return [getattr(layer, name) for layer in layers]


def down_projections(model: PreTrainedModel) -> list[Any]:
    """The down projection of each layer's MLP: its input are the neurons, [rows, length, neurons]."""
    return [read_mlp(mlp, model.config.model_type).down for mlp in mlps(model)]


def neuron_vectors(down: Any) -> Tensor:
    """What each neuron writes, [neurons, d]: a view of the down projection's weight."""
    return down.weight if type(down).__name__ == "Conv1D" else down.weight.T


@contextmanager
def neurons_changed(model: PreTrainedModel, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Within the block each layer's neurons, [rows, length, neurons], pass through ``change(layer, neurons)``."""
    hooks = [
        down.register_forward_pre_hook(lambda _, args, layer=layer: (change(layer, args[0]), *args[1:]))
        for layer, down in enumerate(down_projections(model))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def neurons_off(model: PreTrainedModel, chosen: Tensor) -> Iterator[None]:
    """Within the block the neurons of the bool tensor `chosen` [layers, neurons] give nothing."""
    with neurons_changed(model, lambda layer, neurons: neurons.masked_fill(chosen[layer].to(neurons.device), 0.0)):
        yield


def top_neurons(scores: Tensor, fraction: float) -> Tensor:
    """The highest-scored `fraction` of the neurons of each layer, bool [layers, neurons]; of equals the first.

    Raises:
        ConfigError: a fraction outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ConfigError(f"a fraction of neurons lies in [0, 1], got {fraction}")
    count = round(fraction * scores.shape[1])
    order = scores.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order[:, :count], True)


@torch.no_grad()
def zero_neurons(model: PreTrainedModel, chosen: Tensor) -> None:
    """Zero what the neurons of the bool tensor `chosen` [layers, neurons] write, in place and for good."""
    for down, off in zip(down_projections(model), chosen, strict=True):
        neuron_vectors(down)[off.to(down.weight.device)] = 0.0


def last_neurons(model: PreTrainedModel, count: int) -> Tensor:
    """The last `count` neurons of each layer, bool [layers, neurons]."""
    sizes = [len(neuron_vectors(down)) for down in down_projections(model)]
    return torch.arange(sizes[0]).expand(len(sizes), -1) >= sizes[0] - count


def neuron_masks(model: PreTrainedModel, chosen: Tensor) -> dict[nn.Parameter, Tensor]:
    """For each weight and bias of the MLPs that belongs to single neurons: 1 at the neurons of `chosen`, 0 elsewhere.

    Masks broadcast to their parameter; the bias of the down projection belongs to no neuron and has none.
    """
    masks: dict[nn.Parameter, Tensor] = {}
    for mlp, line in zip(mlps(model), chosen, strict=True):
        read_mlp(mlp, model.config.model_type)
        layout = next(x for x in LAYOUTS if all(hasattr(mlp, part) for part in (x.up, x.down, x.gate) if part))
        if layout.up == layout.gate:
            raise ArchitectureError(
                f"{type(mlp).__name__} keeps gate and up in one matrix, which is not supported here"
            )
        for name in filter(None, {layout.up, layout.gate, layout.down}):
            module = getattr(mlp, name)
            last_axis = (name == layout.down) != (type(module).__name__ == "Conv1D")
            mask = line.to(module.weight.device, module.weight.dtype)
            masks[module.weight] = mask[None] if last_axis else mask[:, None]
            if name != layout.down and module.bias is not None:
                masks[module.bias] = mask
    return masks
