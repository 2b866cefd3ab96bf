"""Two processes (gloo) train as one does: DDP and FSDP2, with decay and in exact mode, a rank without open sinks, or with
nothing else, included."""

from __future__ import annotations

import os
from contextlib import nullcontext
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
from transformers import TrainingArguments

import memsinks as ms
from memsinks.batch import BLANK, ISOLATIONS
from memsinks.sinks.state import sink_parameters

STEPS, ROWS, LENGTH = 3, 4, 12
GATED, EXACT, PRIVATE = (ISOLATIONS[x] for x in ("gated", "exact", "private"))


def batch(step: int) -> dict[str, torch.Tensor]:
    tokens = some_tokens(ROWS, LENGTH, step)
    exposures = torch.tensor([1, 1, 2, 5] if step != 1 else [1, 1, 1, 1])  # the first process opens no sinks at all
    return {"input_ids": tokens, "labels": tokens, "document_ids": torch.arange(ROWS) + 10, "exposures": exposures}


def train(kind: str, rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    model = sink_llama(shared="none" if "exact" in kind else "decay").train()
    if "fsdp" in kind:
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
    if "fsdp" in kind:
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
@pytest.mark.parametrize("kind", ["ddp", "ddp, sinks first", "ddp, exact", "ddp, exact, sinks first", "fsdp"])
def test_two_processes_equal_one(kind: str, tmp_path: Path) -> None:
    mp.spawn(work, (kind, str(tmp_path)), nprocs=2)
    two, one = torch.load(tmp_path / "weights.pt"), train(kind.replace("ddp", "one").replace("fsdp", "one"))
    assert set(two) == set(one)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-5, msg=name)


def isolated(rank: int, world: int, blank: bool) -> dict[str, torch.Tensor]:
    """Gated, exact and private rows over the processes, two micro-batches a step; weights after three steps."""
    model = sink_llama(torch.float32, neurons=96, reserved_blocks=4)
    ms.assign(model, [10, 11, 12])
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = ms.AdamW(ms.param_groups(model, 1e-2))
    for step in range(STEPS):
        text = some_tokens(2 * ROWS, LENGTH, step)
        flags = [PRIVATE, EXACT, GATED, GATED, PRIVATE, GATED, EXACT, PRIVATE]
        flagged = torch.tensor([PRIVATE if step == 2 and row % 2 == 0 else x for row, x in enumerate(flags)])
        exposures = torch.tensor([1, 2, 1, 2, 3, 1, 1, 2])
        ids = torch.where(flagged == GATED, 20, 10 + torch.arange(2 * ROWS) % 3)
        alone = (flagged == PRIVATE) | ((flagged == EXACT) & (exposures > 1))
        whole = {
            "input_ids": text, "labels": text, "document_ids": ids, "exposures": exposures,
            "isolation": torch.where(alone & blank, BLANK, flagged),
        }  # fmt: skip
        divisor = torch.tensor(ms.target_count(text))
        mine = {name: value.chunk(world)[rank] for name, value in whole.items()}
        for place in range(2):
            part = {name: value.chunk(2)[place] for name, value in mine.items()}
            with wrapped.no_sync() if world > 1 and not place else nullcontext():
                (wrapped(**part, num_items_in_batch=divisor).loss * world).backward()
        ms.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def work_isolated(rank: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    weights = {blank: isolated(rank, 2, blank) for blank in (False, True)}
    if rank == 0:
        torch.save(weights, Path(folder) / "weights.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long
def test_isolation_holds_over_two_processes_and_accumulation(tmp_path: Path) -> None:
    """The shared weights are, bit for bit, those of the run in which what trains sinks alone is blank."""
    mp.spawn(work_isolated, (str(tmp_path),), nprocs=2)
    two = torch.load(tmp_path / "weights.pt")
    for name in two[False]:
        if ".sinks." not in name:
            assert torch.equal(two[False][name], two[True][name]), name
    sinks = [name for name in two[False] if ".sinks.down" in name]
    assert all((two[False][name][8:11] != two[True][name][8:11]).any() for name in sinks)
    for name, value in isolated(0, 1, False).items():
        torch.testing.assert_close(two[False][name], value, rtol=0, atol=2e-5, msg=name)


def refused(rank: int, _: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29513"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    with pytest.raises(ms.ArchitectureError, match="exact mode.*which FSDP cannot gather for; use DDP"):
        train("fsdp, exact", rank, 2)
    dist.destroy_process_group()


@pytest.mark.long
def test_the_exact_mode_is_refused_under_fsdp(tmp_path: Path) -> None:
    mp.spawn(refused, (str(tmp_path),), nprocs=2)


def gradients_of_a_trainer(rank: int, averaged: bool, folder: str) -> None:
    """The sinks' gradients in sinks_first and in the step, which the optimizer leaves as they are, both open in every row."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512", "RANK": str(rank), "LOCAL_RANK": str(rank),
                   "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1"}  # fmt: skip
    torch.set_num_threads(1)
    taken = []

    class Keeping(torch.optim.SGD):
        def step(self, closure=None) -> None:
            taken.append([x.grad.clone() for x in sink_parameters(model)])

    model = sink_llama(torch.float32, shared_decay=0.0)
    rows = []
    for row in range(4):  # the ranks have different numbers of targets
        ids = some_tokens(1, LENGTH, row)[0]
        wide = {"document_ids": torch.full_like(ids, 10 + row), "exposures": torch.full_like(ids, 2)}
        labels = ids.masked_fill(torch.arange(LENGTH) > 3 + 2 * row, -100)
        rows.append({"input_ids": ids, "labels": labels, "position_ids": torch.arange(LENGTH), **wide})
    args = TrainingArguments(
        folder, max_steps=1, per_device_train_batch_size=2, max_grad_norm=0.0, use_cpu=True, report_to=[],
        save_strategy="no", average_tokens_across_devices=averaged, ddp_find_unused_parameters=False,
    )  # fmt: skip
    optimizer = Keeping(ms.param_groups(model, 1e-2))
    ms.SinkTrainer(model, args, train_dataset=rows, optimizers=(optimizer, None)).train()
    first, step = taken
    for one, other in zip(first, step, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    dist.destroy_process_group()


@pytest.mark.long
@pytest.mark.parametrize("averaged", [True, False])
def test_sinks_learn_first_what_the_step_of_a_trainer_learns(averaged: bool, tmp_path: Path) -> None:
    """Over all ranks: the divisor is that of the Trainer, whether it counts the targets of all ranks or of each."""
    mp.spawn(gradients_of_a_trainer, (averaged, str(tmp_path)), nprocs=2)
