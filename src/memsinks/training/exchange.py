"""Gradients between processes: of the sinks only those of blocks that a process opened are sent.

    model = DistributedDataParallel(model)
    ms.send_open_blocks(model)
    ...  # train as before; Training and SinkTrainer do this by themselves

Otherwise DDP sends the gradient of the whole pool, which is zero nearly everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from memsinks.errors import ArchitectureError
from memsinks.sinks.gradient import nonzero_blocks
from memsinks.sinks.state import require_sinks, sink_parameters


def send_open_blocks(model: DistributedDataParallel) -> None:
    """From now on DDP sends, of the sinks' gradients, the blocks that are not zero in every process; the mean stays what it was.

    Which they are is agreed on first: a byte for each block of a parameter. Each sum is taken in the order of the ranks, so that
    no block's bits depend on which others are sent, with any number of processes.

    Args:
        model: a model with sinks in DDP that has no communication hook yet; call this before its first backward.

    Raises:
        ArchitectureError: not DDP, a model without sinks.
    """
    if not isinstance(model, DistributedDataParallel):
        raise ArchitectureError(
            f"send_open_blocks takes a model inside DistributedDataParallel, got {type(model).__name__}"
        )
    require_sinks(model)
    # DDP looks at a hook's annotations as objects, which in this file are strings.
    model.register_comm_hook(
        frozenset(map(id, sink_parameters(model))), lambda sinks, bucket: _mean_of_bucket(sinks, bucket)
    )


def _mean_of_bucket(sinks: frozenset[int], bucket: Any) -> torch.futures.Future[Tensor]:
    """DDP's hook: the mean over the processes of a bucket of gradients."""
    buffer = bucket.buffer().div_(dist.get_world_size())
    parts = list(zip(bucket.parameters(), bucket.gradients(), strict=True))
    own = [gradient for parameter, gradient in parts if id(parameter) in sinks]
    shared = [gradient for parameter, gradient in parts if id(parameter) not in sinks]
    if shared:
        together = torch.cat([x.flatten() for x in shared]) if own else buffer
        dist.all_reduce(together)
        for gradient, summed in zip(shared, together.split([x.numel() for x in shared]), strict=True) if own else ():
            gradient.copy_(summed.view_as(gradient))
    if own:
        add_open_blocks(own)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(buffer)
    return future


@torch.no_grad()
def add_open_blocks(gradients: list[Tensor]) -> None:
    """Sum over the processes, in place; blocks that are zero in all of them are not sent. Every process must call this.

    Args:
        gradients: [blocks, block_size, d] each.
    """
    opened = torch.stack([nonzero_blocks(x) for x in gradients]).to(torch.uint8)
    dist.all_reduce(opened, dist.ReduceOp.MAX)
    chosen = [mask.nonzero()[:, 0] for mask in opened]
    values = [gradient[blocks] for gradient, blocks in zip(gradients, chosen, strict=True)]
    summed = _sum_in_order(torch.cat([x.flatten() for x in values]))
    for gradient, blocks, part in zip(gradients, chosen, summed.split([x.numel() for x in values]), strict=True):
        gradient[blocks] = part.view(len(blocks), *gradient.shape[1:])


def _sum_in_order(values: Tensor) -> Tensor:
    """The sum over the processes, each number added in the order of the ranks; as many bytes as a ring sends."""
    if not len(values):
        return values
    world = dist.get_world_size()
    padded = torch.nn.functional.pad(values, (0, -len(values) % world))
    received = torch.empty_like(padded)
    dist.all_to_all_single(received, padded)
    first, *others = received.chunk(world)
    for other in others:
        first = first + other
    dist.all_gather(list(padded.chunk(world)), first)
    return padded[: len(values)]
