"""Two processes (gloo) train as one does on the joined batch: DDP and FSDP2, whatever their rows open, or if they have none."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from ranks import Outcomes, on_ranks, shard
from tiny import sink_llama
from tiny import tokens as some_tokens
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

import memsinks as ms
from memsinks.batch import BLANK, ISOLATIONS
from memsinks.sinks.sharding import whole

STEPS, ROWS, LENGTH = 3, 8, 12
GATED, EXACT, PRIVATE = (ISOLATIONS[x] for x in ("gated", "exact", "private"))
Parts = dict[str, torch.Tensor]


def rows(step: int, kind: str) -> Parts:
    """The whole batch of a step; with two processes each has half of it.

    Step 0: every process has open and closed rows. Step 1: the first has closed rows alone. Step 2: both have open rows alone.
    """
    text = some_tokens(ROWS, LENGTH, step)
    exposures = torch.tensor([[1, 1, 2, 1, 2, 5, 1, 3], [1, 1, 1, 1, 2, 2, 1, 5], [2, 3, 2, 4, 2, 5, 9, 3]][step])
    batch = {
        "input_ids": text,
        "labels": text.clone(),
        "document_ids": torch.arange(ROWS) % 5 + 10,
        "exposures": exposures,
    }
    batch["labels"][step, :7] = -100  # the processes have different numbers of targets
    if "isolated" in kind:
        flags = [PRIVATE, EXACT, GATED, GATED, PRIVATE, GATED, EXACT, PRIVATE]
        flags = torch.tensor([PRIVATE if step == 2 and row < 4 else flag for row, flag in enumerate(flags)])
        batch["document_ids"] = torch.where(flags == GATED, 20, 10 + torch.arange(ROWS) % 3)
        alone = (flags == PRIVATE) | ((flags == EXACT) & (exposures > 1))
        batch["isolation"] = torch.where(alone & ("blank" in kind), BLANK, flags)
    return batch


def built(kind: str) -> torch.nn.Module:
    if "isolated" in kind:
        model = sink_llama(neurons=96, reserved_blocks=4)
        ms.assign(model, [10, 11, 12])
    else:
        model = sink_llama(shared="none" if "exact" in kind else "decay")
    if "float32" in kind:
        model = model.float()
    if "recomputed" in kind:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def train(kind: str, wrapper: str = "", rank: int = 0, world: int = 1) -> dict[str, object]:
    """Three steps of two micro-batches; losses, first gradients, the norms that were clipped, and weights at the end."""
    model = built(kind)
    if wrapper == "fsdp":
        shard(model)
    wrapped = DistributedDataParallel(model) if wrapper == "ddp" else model
    if wrapper == "ddp" and "whole pool" not in kind:
        ms.send_open_blocks(wrapped)
    optimizer = ms.AdamW(ms.param_groups(model, 1e-2, weight_decay=0.1), eps=1e-3)
    losses, gradients, norms = [], {}, []
    for step in range(STEPS):
        joined = rows(step, kind)
        divisor = torch.tensor(ms.target_count(joined["labels"]))
        mine = {name: value.chunk(world)[rank] for name, value in joined.items()}
        parts = [{name: value.chunk(2)[place] for name, value in mine.items()} for place in range(2)]
        if "first" in kind:
            ms.sinks_first(wrapped, optimizer, parts, updates=2, until=0.5, num_items_in_batch=divisor)
        total = 0.0
        for place, part in enumerate(parts):
            with wrapped.no_sync() if wrapper == "ddp" and not place else contextlib.nullcontext():
                loss = wrapped(**part, num_items_in_batch=divisor).loss
                (loss * world).backward()  # both take the mean of gradients over ranks
                total += float(loss.detach())
        if step == 0:
            gradients = {name: whole(x.grad).clone() for name, x in model.named_parameters()}
        losses.append(total)
        norms.append([float(x) for x in ms.clip_grad_norm_(model, 0.5)])
        optimizer.step()
        optimizer.zero_grad()
    if wrapper == "fsdp":
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    else:
        weights = model.state_dict()
    return {"losses": losses, "gradients": gradients, "norms": norms, "weights": weights}


def on_rank(kind: str, wrapper: str) -> dict[str, object]:
    rank = torch.distributed.get_rank()
    found = train(kind, wrapper, rank, 2)
    together = torch.tensor(found["losses"])
    torch.distributed.all_reduce(together)
    return found | {"losses": together.tolist()}


KINDS = ("decay, first, recomputed", "exact, first, recomputed", "isolated, float32", "isolated, float32, blank")
MORE = (
    "decay",
    "decay, first",
    "decay, whole pool",
    "exact",
    "exact, float32",
    "exact, whole pool",
    "isolated",
    "isolated, blank",
)
WRAPPERS = ("ddp", "fsdp")


def outcomes(kinds: tuple[str, ...], folder: Path) -> Outcomes:
    return on_ranks({f"{x}: {kind}": (on_rank, (kind, x)) for kind in kinds for x in WRAPPERS}, folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Outcomes:
    return outcomes(KINDS, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> Outcomes:
    return outcomes(MORE, tmp_path_factory.mktemp("more"))


def equal_one(found: dict, kind: str) -> None:
    """Losses, the first gradients, norms before clipping and weights after three steps."""
    one = train(kind)
    small = 1e-4 if "float32" in kind else 1e-6
    assert found["losses"] == pytest.approx(one["losses"], abs=small)
    for a, b in zip(found["norms"], one["norms"], strict=True):
        assert a == pytest.approx(b, rel=small)
    for what in ("gradients", "weights"):
        assert set(found[what]) == set(one[what])
        for name, value in one[what].items():
            torch.testing.assert_close(found[what][name], value, rtol=0, atol=small, msg=f"{what} of {name}")


def isolated(found: Outcomes, wrapper: str, kind: str) -> None:
    """The shared weights are, bit for bit, those of the run in which what trains sinks alone is blank; own blocks are not."""
    real, blank = (found[f"{wrapper}: {x}"]["weights"] for x in (kind, f"{kind}, blank"))
    for name in real:
        if ".sinks." not in name:
            assert torch.equal(real[name], blank[name]), name
    assert all((real[x][8:11] != blank[x][8:11]).any() for x in real if ".sinks.down" in x)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(two: Outcomes, kind: str, wrapper: str) -> None:
    equal_one(two[f"{wrapper}: {kind}"], kind)


@pytest.mark.long
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", MORE)
def test_two_processes_equal_one_in_more_ways(more: Outcomes, kind: str, wrapper: str) -> None:
    equal_one(more[f"{wrapper}: {kind}"], kind)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_isolation_holds_over_two_processes_and_accumulation(two: Outcomes, wrapper: str) -> None:
    isolated(two, wrapper, "isolated, float32")


@pytest.mark.long
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_isolation_holds_in_float64(more: Outcomes, wrapper: str) -> None:
    isolated(more, wrapper, "isolated")
