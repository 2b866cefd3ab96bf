"""The processes of one training that torchrun started, one a GPU (or, on the CPU, as many as asked for)."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = datetime.timedelta(days=1)
"""How long processes wait for the first one, which reads and tokenizes the corpus alone."""


@contextmanager
def joined_processes() -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; gives the device of this one."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    joining = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if joining:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield device
    finally:
        if joining:
            dist.destroy_process_group()


def process_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank() -> int:
    """The number of this one among them."""
    return dist.get_rank() if dist.is_initialized() else 0


def main_process() -> bool:
    """Whether this one writes."""
    return process_rank() == 0


@contextmanager
def main_process_first() -> Iterator[None]:
    """The block runs in the first process, then in the others: what it writes is there for them."""
    if not main_process():
        dist.barrier()
    yield
    if main_process() and process_count() > 1:
        dist.barrier()


def sum_over(value: Tensor, device: torch.device) -> Tensor:
    """The sum of a 0-dimensional tensor over all processes."""
    if process_count() > 1:
        value = value.to(device)
        dist.all_reduce(value)
    return value


def all_of(value: Any) -> list[Any]:
    """What each process has, in their order."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values
