"""A plain loop with Accelerate: a prepared model, optimizer and loader train as they do without it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, Subset
from trainers import BATCH, CONFIG, LR, build, equal, some_rows, weights

import memsinks as ms
from memsinks.training.callback import repeated_at_the_end


@pytest.fixture(autouse=True)
def _fresh_state() -> None:
    """Accelerate keeps the precision of the last Trainer of the process; the next Accelerator would take it over."""
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(model, rows, accelerator: Accelerator | None):
    optimizer = ms.AdamW(ms.param_groups(model, LR))
    loader = DataLoader(rows, batch_size=BATCH, collate_fn=ms.collate)
    backward = torch.Tensor.backward
    if accelerator is not None:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        backward = accelerator.backward
    curve = []
    model.train()
    for batch in loader:
        loss = model(**batch).loss
        backward(loss)
        ms.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float(loss.detach()))
    return curve


@pytest.mark.parametrize("shared", ["decay", "none"])
def test_a_prepared_loop_is_the_plain_loop(tiny_llama, shared) -> None:
    rows, config = some_rows(apart_from=2), dataclasses.replace(CONFIG, shared=shared)
    plain, prepared = build(tiny_llama, config), build(tiny_llama, config)
    assert trained(plain, rows, None) == trained(prepared, rows, Accelerator(cpu=True))
    assert equal(weights(plain), weights(prepared))


def test_rows_that_a_prepared_loader_shuffles_are_refused(tiny_llama) -> None:
    rows = some_rows()
    model, loader = Accelerator(cpu=True).prepare(
        build(tiny_llama).train(), DataLoader(rows, batch_size=BATCH, collate_fn=ms.collate, shuffle=True)
    )
    with pytest.raises(ms.DataError, match="met after row"):
        [model(**batch) for batch in loader]


@pytest.mark.parametrize("process", [0, 1])
def test_rows_that_accelerate_would_repeat_are_told_before_training(process) -> None:
    """It fills up the batches of several processes with the first rows, whose exposures were counted once."""
    rows = some_rows()

    def problems(number: int, **settings) -> list[str]:
        loader = DataLoader(Subset(rows, range(number)), batch_size=2, collate_fn=ms.collate, **settings)
        shard = prepare_data_loader(loader, num_processes=2, process_index=process, put_on_device=False)
        return repeated_at_the_end(shard)

    assert problems(len(rows) // 4 * 4) == problems(len(rows) // 4 * 4 - 1, drop_last=True) == []
    (said,) = problems(len(rows) // 4 * 4 - 1)
    assert "do not divide by 4" in said and "dataloader_drop_last=True" in said
