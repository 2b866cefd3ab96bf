"""Putting sinks into any decoder and taking them out.

The stock MLP stays the general part; the sinks are one child module beside it, ``layer.mlp.sinks``, so no stock parameter
changes its name. What the touched modules then do is in `host_classes`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from memsinks.errors import ArchitectureError, ConfigError
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.experts import Experts, read_host
from memsinks.sinks.families import Mlp, decoder_layers
from memsinks.sinks.host_classes import Derived, SinkHead, SinkLayer, SinkMlp, SinkModel, derive
from memsinks.sinks.layer import Sinks
from memsinks.sinks.own import freeze_shared
from memsinks.sinks.quantized import prepare_quantized
from memsinks.sinks.sharding import is_sharded
from memsinks.sinks.state import SinkState, has_sinks, require_sinks, sink_parameters

PATCHED = "forward", "_original_forward"
"""What accelerate's autocast leaves on a model."""


@dataclass(frozen=True)
class SinkReport:
    """What `add_sinks` touched. Parameters are counts; `open_parameters` = open per token in all layers.

    intermediate_size: of the widest MLP; of one expert where all hosts are mixtures. mixtures: layers whose host is one.
    """

    layers: tuple[int, ...]
    intermediate_size: int
    neurons: int
    active: int
    shared_parameters: int
    sink_parameters: int
    open_parameters: int
    mixtures: int = 0

    def __str__(self) -> str:
        beside = f"mixtures of experts in {self.mixtures} of them" if self.mixtures else ""
        beside = beside or f"{self.intermediate_size} general ones"
        return (
            f"sinks in {len(self.layers)} layers: {self.neurons} neurons beside {beside}, "
            f"{self.active} open per document ({self.shared_parameters:,} shared, {self.sink_parameters:,} sink, "
            f"{self.open_parameters:,} open parameters)"
        )

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(NOT_A_MODEL)

    def __getattr__(self, name: str) -> Any:
        if hasattr(PreTrainedModel, name) and not name.startswith("__"):
            raise AttributeError(NOT_A_MODEL)
        raise AttributeError(f"a SinkReport has no {name!r}")


NOT_A_MODEL = "add_sinks changes the model in place and returns a report; go on with the model that you gave it"
Added = SinkReport
"""The name of before."""


def check_host(model: Any) -> None:
    """ArchitectureError for what is no model, or one that is wrapped, compiled, sharded or has sinks already."""
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
    if is_sharded(model):
        raise ArchitectureError("the model is sharded already (FSDP2 or tensor parallel); add sinks before sharding")
    if any(part._compiled_call_impl is not None for part in model.modules()):
        raise ArchitectureError("a part of the model is compiled already; add sinks first, then compile")
    if any("forward" in vars(part) for part in model.modules()):
        raise ArchitectureError(
            "a module of the model has a forward of its own (device_map over several devices, or a compiled forward), which "
            "would bypass the sinks; load the model without device_map and add sinks before anything is wrapped"
        )


def _forget_quantization(model: Any) -> None:
    """Weights that were dequantized when they were loaded are saved as what they are."""
    if getattr(model, "hf_quantizer", None) is None:
        return
    model.hf_quantizer = None
    for holder, name in (
        (model, "is_quantized"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if name in vars(holder):
            delattr(holder, name)


def add_sinks(model: PreTrainedModel, config: SinkConfig) -> SinkReport:
    """Put sinks into a causal language model, in place; its function does not change.

    Call it before torch.compile, DDP, FSDP and PEFT. The global random state is not touched. Sinks have the dtype of their host,
    but float32 beside bfloat16, float16 and quantized weights, in which they would not learn. A quantized model is frozen, and
    takes settings such as `SinkConfig.for_finetuning`.

    Args:
        model: a Hugging Face decoder with an output embedding.
        config: the sink settings.

    Returns:
        What was touched.

    Raises:
        ArchitectureError: the model cannot carry sinks, with the reason; nothing was changed.
        ConfigError: the settings do not fit the model.
    """
    check_host(model)
    quantized = prepare_quantized(model, config)
    layers, mlp_name = decoder_layers(model)
    chosen = tuple(range(len(layers))) if config.layers is None else tuple(sorted(config.layers))
    if chosen[-1] >= len(layers):
        raise ConfigError(f"layers names layer {chosen[-1]}, the model has layers 0 to {len(layers) - 1}")
    hosts = [read_host(getattr(layers[index], mlp_name), model.config) for index in chosen]
    sizes = {host.intermediate_size for host in hosts}
    if config.intermediate_size is not None and sizes != {config.intermediate_size}:
        raise ConfigError(
            f"this SinkConfig is for MLPs {config.intermediate_size} wide, the model's are {sorted(sizes)}"
        )
    head: Any = model.get_output_embeddings()
    if head is None:
        raise ArchitectureError(f"{type(model).__name__} has no output embedding; sinks are for causal language models")
    text = model.config.get_text_config()
    if config.shared == "decay" and config.shared_decay and getattr(text, "output_router_logits", False):
        raise ConfigError(
            "shared_decay cannot be combined with a router loss; set config.output_router_logits=False, or take the exact mode"
        )

    arguments = _arguments(model)
    if not quantized:
        _forget_quantization(model)
    state = SinkState(config, chosen, max(sizes), arguments)
    for place, (index, host) in enumerate(zip(chosen, hosts, strict=True)):
        layer: Any = layers[index]
        _give_sinks(getattr(layer, mlp_name), host, config, index)
        layer.__class__ = derive(type(layer), SinkLayer)
        layer.sink_state, layer.sink_place, layer.sink_mlp = state, place, mlp_name
    head.__class__ = derive(type(head), SinkHead)
    head.sink_state = state
    model.__class__ = derive(type(model), SinkModel)
    model.sink_state = state  # type: ignore[assignment]
    if quantized:
        freeze_shared(model)
    sinks = sum(parameter.numel() for parameter in sink_parameters(model))
    shared = sum(parameter.numel() for parameter in model.parameters()) - sinks
    opened = sinks * config.active // config.neurons
    mixtures = sum(isinstance(host, Experts) for host in hosts)
    return SinkReport(chosen, max(sizes), config.neurons, config.active, shared, sinks, opened, mixtures)


def _arguments(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of what the model's forward takes, in order; at the end `use_cache`, where it hands that on unnamed."""
    parameters = inspect.signature(model.forward).parameters
    names = [name for name in parameters if name not in ("kwargs", "args")]
    hands_on = any(x.kind is inspect.Parameter.VAR_KEYWORD for x in parameters.values())
    if "use_cache" not in names and hands_on and hasattr(model.config.get_text_config(), "use_cache"):
        names.append("use_cache")
    return tuple(names)


def _give_sinks(mlp: Any, host: Mlp | Experts, config: SinkConfig, layer: int) -> None:
    """Put the sinks of a layer beside its MLP."""
    mlp.sinks = Sinks(
        config,
        hidden_size=host.hidden_size,
        act=host.act,
        gated=host.gated,
        std=config.start_scale * host.std,
        layer=layer,
        dtype=torch.promote_types(host.weight.dtype, torch.float32),
        device=host.weight.device,
    )
    mlp.sinks.train(mlp.training)
    mlp.__class__ = derive(type(mlp), SinkMlp)


def remove_sinks(model: PreTrainedModel) -> PreTrainedModel:
    """Delete all sinks, in place; the model is of its stock class again, frozen weights stay frozen. Returns the model."""
    require_sinks(model, missing_ok=True)
    if not isinstance(model, SinkModel):
        raise ArchitectureError(f"the model is wrapped in {type(model).__name__}; give remove_sinks the model inside")
    _take_off(model)
    return model


def _take_off(model: nn.Module) -> None:
    """Make every module of its stock class again, in place, also where only some got sinks."""
    for name in PATCHED:  # bound to the class that goes
        vars(model).pop(name, None)
    for module in list(model.modules()):
        if isinstance(module, Derived):
            if isinstance(module, SinkMlp):
                del module.sinks
            for name in ("sink_state", "sink_place", "sink_mlp"):
                module.__dict__.pop(name, None)
            module.__class__ = type(module).stock_class


@contextmanager
def undone_on_failure(model: Any) -> Iterator[None]:
    """If the block fails, a model that had no sinks is left without them, and the weights that learned before learn again."""
    new = isinstance(model, nn.Module) and not has_sinks(model)
    learns = [(x, x.requires_grad) for x in model.parameters()] if isinstance(model, nn.Module) else []
    try:
        yield
    except BaseException:
        if new:
            _take_off(model)
        for parameter, flag in learns:
            parameter.requires_grad_(flag)
        raise
