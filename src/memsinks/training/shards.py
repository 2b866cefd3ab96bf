"""Sharding a model over the processes that train it, and its state whole, so that any number of processes goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from memsinks.errors import CheckpointError
from memsinks.sinks.families import decoder_layers
from memsinks.sinks.sharding import full_state_dict, part_like, per_block, put, whole
from memsinks.sinks.state import sink_modules


def shard_model(model: PreTrainedModel) -> None:
    """Shard a model, with sinks or without, over all processes, in place: each decoder layer, then the rest.

    Sinks of another dtype than their host are a unit of their own, because FSDP2 takes one dtype a unit.
    """
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    for sinks in sink_modules(model).values():
        if sinks.up.dtype != model.dtype:
            fully_shard(sinks, mesh=mesh)
    for layer in decoder_layers(model)[0]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_state(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``model`` and ``optimizer`` as their state dicts are in one process, on the first rank; every rank must call this.

    Tensors are gathered one at a time; on other ranks what is gathered is dropped.
    """
    stored = optimizer.state_dict()
    first = dist.get_rank() == 0
    states: dict[int, dict[str, Any]] = {}
    for number, state in stored["state"].items():
        values = {name: whole(x) if isinstance(x, Tensor) else x for name, x in state.items()}
        if first:
            states[number] = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in values.items()}
    return {"model": full_state_dict(model), "optimizer": stored | {"state": states}}


def load_whole_state(model: PreTrainedModel, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Any]) -> None:
    """Put what `whole_state` gave, or one process saved, into a sharded model and its optimizer (None = not into that)."""
    own = model.state_dict()
    if own.keys() != state["model"].keys():
        raise CheckpointError(
            f"the checkpoint lacks or has too many of {sorted(own.keys() ^ state['model'].keys())[:3]}"
        )
    for name, tensor in own.items():
        put(tensor, state["model"][name])
    if optimizer is None:
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut = {
        number: {name: _like(value, parameters[number]) for name, value in values.items()}
        for number, values in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict(dict(state["optimizer"]) | {"state": cut})


def _like(value: Any, parameter: Tensor) -> Any:
    """A whole state of a parameter, sharded as it is: a tensor of its shape, or a number for each block."""
    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or not value.dim():
        return value
    here = part_like(value.to(parameter.device), parameter).clone()
    if value.shape != parameter.shape:
        return per_block(here, parameter)
    return DTensor.from_local(
        here,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
