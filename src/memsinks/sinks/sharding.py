"""Sharded models (FSDP2): is a model sharded, what of a tensor is here, and what its ranks have to agree on.

Under `torch.distributed.fsdp.fully_shard` a parameter is a `DTensor`, cut along its first dimension: each rank holds whole sink
blocks. A forward gathers and a backward reduces on all ranks at once, so all must run the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor, Replicate, Shard

from memsinks.errors import ArchitectureError


def is_sharded(model: nn.Module) -> bool:
    """Whether no process holds whole parameters (FSDP2, tensor parallel); ArchitectureError for FSDP1."""
    found = False
    for part in model.modules():
        if isinstance(part, FSDP1):
            raise ArchitectureError(
                "FSDP1 (FullyShardedDataParallel) flattens sinks together with other weights; shard with "
                "torch.distributed.fsdp.fully_shard, under Accelerate with fsdp_version: 2"
            )
        found = found or isinstance(part, FSDPModule)
    return found or any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Let `parameters()` give the sharded ones again, which an evaluation leaves whole in the outermost module."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: a view; the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; where it is sharded, every rank must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(values: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of whole `values`, were they sharded as `like`; nothing is sent."""
    if not isinstance(like, DTensor):
        return values
    mesh = like.device_mesh
    everywhere = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements).to_local()


def per_block(values: Tensor, like: Tensor) -> Tensor:
    """Values [blocks here] of a parameter [blocks, ...] as a tensor [blocks], sharded as it is."""
    if not isinstance(like, DTensor):
        return values
    size = torch.Size([like.shape[0]])
    return DTensor.from_local(values, like.device_mesh, like.placements, run_check=False, shape=size, stride=(1,))


def require_whole_blocks(parameter: Tensor) -> None:
    """ArchitectureError for sinks that are cut within their blocks."""
    if isinstance(parameter, DTensor) and any(x != Shard(0) and not x.is_replicate() for x in parameter.placements):
        raise ArchitectureError(
            f"sinks are sharded as {parameter.placements}, which cuts their blocks; leave them to the first dimension (Shard(0))"
        )


def most_of_ranks(model: nn.Module, numbers: Sequence[int]) -> list[int]:
    """The greatest of each number over the ranks that a model is sharded over; the numbers themselves where it is not.

    Every rank must call this, with as many numbers.
    """
    if not numbers or not is_sharded(model):
        return list(numbers)
    sharded = next((x for x in model.parameters() if isinstance(x, DTensor)), None)
    mesh: Any = None if sharded is None else sharded.device_mesh  # None: all are whole just now, on all ranks
    values = torch.tensor(list(numbers), dtype=torch.int64, device=next(model.parameters()).device)
    for group in [None] if mesh is None else [mesh.get_group(dimension) for dimension in range(mesh.ndim)]:
        dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
    return values.tolist()


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict; of a sharded model the whole one on its first rank, on the CPU, {} on others: every rank must call this."""
    if not is_sharded(model):
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))  # type: ignore


def on_first_rank(model: nn.Module, work: Callable[[], None]) -> None:
    """Do `work`; of a sharded model on its first rank alone, while the others wait, who raise what it raises."""
    if not is_sharded(model):
        work()
        return
    raised: list[Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except Exception as error:
            raised[0] = error
    dist.broadcast_object_list(raised, src=0)
    if raised[0] is not None:
        raise raised[0]


@torch.no_grad()
def put(parameter: Tensor, values: Tensor) -> None:
    """Copy whole values into a parameter; where it is sharded, each rank takes its part of them."""
    here = local(parameter)
    here.copy_(part_like(values.to(here.device, here.dtype), parameter))


@torch.no_grad()
def copy_into(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put weights that were taken from `named_parameters()` back, in place."""
    for name, parameter in model.named_parameters():
        if name in weights:
            local(parameter).copy_(local(weights[name]))
