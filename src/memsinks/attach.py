"""Putting sinks into any decoder, opening and closing them, and taking them out.

The stock MLP stays the general part; the sinks are one child module beside it, ``layer.mlp.sinks``, so no stock parameter
changes its name. What the touched modules then do is in `hosts`.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .config import ArchitectureError, ConfigError, DataError, SinkConfig
from .families import decoder_layers, read_mlp
from .hosts import Derived, SinkHead, SinkLayer, SinkMlp, SinkModel, SinkState, derive, sink_parameters
from .routing import NO_SINKS, check_ids
from .sinks import Sinks

OpenIds = int | Iterable[int] | Tensor | np.ndarray | Sequence[Iterable[int]]

PATCHED = "forward", "_original_forward"
"""What accelerate's autocast leaves on a model."""


@dataclass(frozen=True)
class Added:
    """What `add_sinks` touched. Parameters are counts; `open_parameters` = open per token in all layers."""

    layers: tuple[int, ...]
    host_width: int
    neurons: int
    active: int
    shared_parameters: int
    sink_parameters: int
    open_parameters: int

    def __str__(self) -> str:
        return (
            f"sinks in {len(self.layers)} layers: {self.neurons} neurons beside {self.host_width} general ones, "
            f"{self.active} open per document ({self.shared_parameters:,} shared, {self.sink_parameters:,} sink, "
            f"{self.open_parameters:,} open parameters)"
        )


def _parse_open(ids: OpenIds) -> Tensor:
    """Any form that `sinks_open` takes, as int64 [rows or 1, columns, union], padded with -1."""
    if isinstance(ids, np.ndarray):
        ids = torch.from_numpy(ids)
    if isinstance(ids, Tensor):
        check_ids(ids)
        if ids.dim() not in (0, 1, 2):
            raise DataError(f"an id tensor for sinks_open has shape [B] or [B, T], got {list(ids.shape)}")
        return ids.reshape(-1, 1, 1) if ids.dim() < 2 else ids[:, :, None]
    sets: list[list[Any]] = []
    if isinstance(ids, int | np.integer):
        sets = [[ids]]
    elif isinstance(ids, Iterable) and not isinstance(ids, str | bytes):
        values = list(ids)
        nested = any(isinstance(x, Iterable) for x in values)
        sets = [list(x) if isinstance(x, Iterable) else [x] for x in values] if nested else [values]
    if not any(sets):
        raise DataError(
            f"sinks_open needs at least one id: an int, a list or int64 tensor of ids, or sets; got {ids!r}"
        )
    for value in itertools.chain.from_iterable(sets):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or not NO_SINKS <= value < 2**63:
            raise DataError(f"a document id is an int from 0 to 2**63 - 1, or exactly -1 for none, got {value!r}")
    most = max(len(x) for x in sets)
    flat = torch.tensor([[int(y) for y in x] + [NO_SINKS] * (most - len(x)) for x in sets], dtype=torch.int64)
    return flat[:, None, :]


def unwrap(model: Any) -> Any:
    """The model inside torch.compile, DDP and other wrappers that keep it as `module` or `_orig_mod`."""
    while not isinstance(model, SinkModel):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def has_sinks(model: nn.Module) -> bool:
    """Whether `add_sinks` was applied to the model."""
    return isinstance(unwrap(model), SinkModel)


def require_sinks(model: nn.Module) -> SinkState:
    """The model's sink state; ArchitectureError if it has none."""
    inner = unwrap(model)
    if not isinstance(inner, SinkModel):
        raise ArchitectureError(f"{type(model).__name__} has no sinks; add them with memsinks.add_sinks(model, config)")
    return inner.sink_state


def _check_host(model: Any) -> None:
    name = type(model).__name__
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ArchitectureError(
            f"the model is wrapped in {name}; add sinks before wrapping (DataParallel is not supported)"
        )
    if type(model).__name__ == "OptimizedModule" or getattr(model, "_compiled_call_impl", None) is not None:
        raise ArchitectureError("the model is compiled already; add sinks first, then compile")
    if not isinstance(model, PreTrainedModel):
        raise ArchitectureError(
            f"{name} is not a Hugging Face PreTrainedModel; give the model itself, not a wrapper around it (PEFT: add "
            "sinks to the base model first)"
        )
    if has_sinks(model):
        raise ArchitectureError(f"{name} has sinks already; remove_sinks(model) first")
    if getattr(model, "_tp_size", None) is not None:
        raise ArchitectureError("tensor-parallel models are not supported: sinks would not be sharded with their host")
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise ArchitectureError("the model is sharded already (FSDP2 or tensor parallel); add sinks before sharding")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ArchitectureError("quantised models are not supported; add sinks to the full-precision model")
    if any(part._compiled_call_impl is not None for part in model.modules()):
        raise ArchitectureError("a part of the model is compiled already; add sinks first, then compile")
    if any("forward" in vars(part) for part in model.modules()):
        raise ArchitectureError(
            "a module of the model has a forward of its own (device_map over several devices, or a compiled forward), which "
            "would bypass the sinks; load the model without device_map and add sinks before anything is wrapped"
        )


def add_sinks(model: PreTrainedModel, config: SinkConfig) -> Added:
    """Put sinks into a causal language model, in place; its function does not change.

    Call it before torch.compile, DDP, FSDP and PEFT. The global random state is not touched.

    Args:
        model: a Hugging Face decoder with an output embedding.
        config: the sink settings.

    Returns:
        What was touched.

    Raises:
        ArchitectureError: the model cannot carry sinks, with the reason; nothing was changed.
        ConfigError: the settings do not fit the model.
    """
    _check_host(model)
    layers, mlp_name = decoder_layers(model)
    chosen = tuple(range(len(layers))) if config.layers is None else tuple(sorted(config.layers))
    if chosen[-1] >= len(layers):
        raise ConfigError(f"layers names layer {chosen[-1]}, the model has layers 0 to {len(layers) - 1}")
    hosts = [read_mlp(getattr(layers[index], mlp_name), model.config.model_type) for index in chosen]
    widths = {host.hidden for host in hosts}
    if config.host_width is not None and widths != {config.host_width}:
        raise ConfigError(f"this SinkConfig is for MLPs {config.host_width} wide, the model's are {sorted(widths)}")
    head: Any = model.get_output_embeddings()
    if head is None:
        raise ArchitectureError(f"{type(model).__name__} has no output embedding; sinks are for causal language models")
    if config.shared == "decay" and config.shared_decay and getattr(model.config, "output_router_logits", False):
        raise ConfigError("shared_decay cannot be combined with a router loss; set config.output_router_logits=False")

    arguments = [x for x in inspect.signature(model.forward).parameters if x not in ("kwargs", "args")]
    state = SinkState(config, chosen, max(widths), tuple(arguments))
    for place, (index, host) in enumerate(zip(chosen, hosts, strict=True)):
        layer: Any = layers[index]
        mlp: Any = getattr(layer, mlp_name)
        mlp.sinks = Sinks(
            config, width=host.width, act=host.act, gated=host.gated, std=host.std, layer=index,
            dtype=host.down.weight.dtype, device=host.down.weight.device,
        )  # fmt: skip
        mlp.sinks.train(mlp.training)
        mlp.__class__ = derive(type(mlp), SinkMlp)
        layer.__class__ = derive(type(layer), SinkLayer)
        layer.sink_state, layer.sink_place, layer.sink_mlp = state, place, mlp_name
    head.__class__ = derive(type(head), SinkHead)
    head.sink_state = state
    model.__class__ = derive(type(model), SinkModel)
    model.sink_state = state  # type: ignore[assignment]
    sinks = sum(parameter.numel() for parameter in sink_parameters(model))
    shared = sum(parameter.numel() for parameter in model.parameters()) - sinks
    return Added(
        chosen, max(widths), config.neurons, config.active, shared, sinks, sinks * config.active // config.neurons
    )


def remove_sinks(model: PreTrainedModel) -> PreTrainedModel:
    """Delete all sinks, in place; the model is of its stock class again. Returns the model."""
    require_sinks(model)
    if not isinstance(model, SinkModel):
        raise ArchitectureError(f"the model is wrapped in {type(model).__name__}; give remove_sinks the model inside")
    for name in PATCHED:  # bound to the class that goes
        vars(model).pop(name, None)
    for module in list(model.modules()):
        if isinstance(module, Derived):
            if isinstance(module, SinkMlp):
                del module.sinks
            for name in ("sink_state", "sink_place", "sink_mlp"):
                module.__dict__.pop(name, None)
            module.__class__ = type(module).stock_class
    return model


@contextmanager
def sinks_open(model: nn.Module, ids: OpenIds) -> Iterator[None]:
    """Within the block, the model in eval mode runs with the sinks of `ids` open.

    Args:
        ids: an id, or a list or set of ids (their union), for all rows; an int64 tensor [B] or [B, T] with the id of
            each row or token; or a list with one set of ids for each row (their union). -1 opens nothing.
    """
    state = require_sinks(model)
    if model.training:
        raise ConfigError("sinks_open is for evaluation, the model is in training mode; call model.eval() first")
    before, state.opened = state.opened, _parse_open(ids)
    try:
        yield
    finally:
        state.opened = before


@contextmanager
def sinks_closed(model: nn.Module, rescale: str = "none") -> Iterator[None]:
    """Within the block, sinks are closed and the general neurons are multiplied by a factor.

    Args:
        rescale: ``"none"`` (1), ``"expected"`` or ``"released"``, see `SinkConfig.rescale_factors`.

    Raises:
        ConfigError: an unknown rescale, or a model in training mode, in which sinks follow the document ids.
    """
    state = require_sinks(model)
    if model.training:
        raise ConfigError("sinks_closed is for evaluation, the model is in training mode; call model.eval() first")
    before, state.opened = state.opened, None
    factor = rescale_factor(state, rescale)
    hooks = [
        host.register_forward_pre_hook(lambda _, args: (args[0] * factor, *args[1:])) for host in down_modules(model)
    ]
    try:
        yield
    finally:
        state.opened = before
        for hook in hooks:
            hook.remove()


def rescale_factor(state: SinkState, rescale: str) -> float:
    """The factor of a named rescale; ConfigError for an unknown name."""
    factors = state.config.rescale_factors(state.host_width)
    if rescale not in factors:
        raise ConfigError(f"rescale must be one of {sorted(factors)}, got {rescale!r}")
    return factors[rescale]


def down_modules(model: nn.Module) -> list[nn.Module]:
    """The down projections of the host MLPs that have sinks."""
    kind = model.config.model_type  # type: ignore[union-attr]
    return [read_mlp(module, kind).down for module in model.modules() if isinstance(module, SinkMlp)]  # type: ignore
