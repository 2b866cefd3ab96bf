"""Two processes (gloo) train as one does: DDP and FSDP2, with decay, a rank without open sinks included."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import sink_llama
from tiny import tokens as some_tokens
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import memsinks as ms

STEPS, ROWS, LENGTH = 3, 4, 12


def batch(step: int) -> dict[str, torch.Tensor]:
    tokens = some_tokens(ROWS, LENGTH, step)
    exposures = torch.tensor([1, 1, 2, 5] if step != 1 else [1, 1, 1, 1])  # the first process opens no sinks at all
    return {"input_ids": tokens, "labels": tokens, "document_ids": torch.arange(ROWS) + 10, "exposures": exposures}


def train(kind: str, rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    model = sink_llama().train()
    if kind == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    wrapped = DistributedDataParallel(model) if "ddp" in kind else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        whole = batch(step)
        divisor = torch.tensor(ms.target_count(whole["labels"]))
        part = {name: value.chunk(world)[rank] for name, value in whole.items()}
        if "first" in kind:
            ms.sinks_first(wrapped, optimizer, [part], num_items_in_batch=divisor)
        loss = wrapped(**part, num_items_in_batch=divisor).loss * world  # both average gradients over ranks
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if kind == "fsdp":
        with pytest.raises(ms.ArchitectureError, match="use DDP or one process, not FSDP"):
            ms.sinks_first(model, optimizer, [part])
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return model.state_dict()


def work(rank: int, kind: str, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    weights = train(kind, rank, 2)
    if rank == 0:
        torch.save(weights, Path(folder) / "weights.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ddp", "ddp, sinks first", "fsdp"])
def test_two_processes_equal_one(kind: str, tmp_path: Path) -> None:
    mp.spawn(work, (kind, str(tmp_path)), nprocs=2)
    two, one = torch.load(tmp_path / "weights.pt"), train("one, sinks first" if "first" in kind else "one")
    assert set(two) == set(one)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-5, msg=name)
