"""Tiny models, rows and arguments for tests of Trainers, and the plain loop that they are held against."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from memsinks.batch import collate
from memsinks.data.identity import exposures
from memsinks.data.packing import Rows, pack
from memsinks.sinks.attach import add_sinks
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.state import shared_parameters, sink_parameters
from memsinks.training.first import sinks_first
from memsinks.training.optim import AdamW, param_groups

LENGTH, BATCH = 16, 4
CONFIG = SinkConfig(neurons=64, active=16, block_size=8, shared="decay")
LR = 1e-2


def some_rows(apart_from: int | None = None) -> Rows:
    """12 documents, some of them met up to six times, packed; 6 steps of 4 rows."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 64, int(rng.integers(5, 12))) for _ in range(12)]
    order = rng.permutation(np.repeat(np.arange(12), np.tile([1, 2, 6], 4)))
    ids = np.arange(100, 112)[order]
    packed = pack([documents[i] for i in order], ids, exposures(ids), length=LENGTH, pad_id=0, apart_from=apart_from)
    assert len(packed) >= 6 * BATCH
    return packed.select(slice(0, 6 * BATCH))


def build(tiny_llama, config: SinkConfig | None = CONFIG, **changes):
    model = tiny_llama(**({"initializer_range": 0.3} | changes))
    if config is not None:
        add_sinks(model, config)
    return model


def arguments(folder: Path, **changes) -> TrainingArguments:
    """The defaults, apart from what keeps a test small and the order of the data."""
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": BATCH, "max_steps": 6, "learning_rate": LR,
        "train_sampling_strategy": "sequential", "logging_steps": 1, "disable_tqdm": True, "report_to": [],
    }  # fmt: skip
    return TrainingArguments(**(settings | changes))


def groups_of(model) -> AdamW:
    return AdamW(param_groups(model, LR, weight_decay=0.1, sink_lr_factor=3))


def trainer_of(model, args, rows, *callbacks, own: bool = False, kind: type = Trainer, **more) -> Trainer:
    optimizers = (groups_of(model), None) if own else (None, None)
    trainer = kind(
        model, args, train_dataset=rows, data_collator=collate, callbacks=list(callbacks), optimizers=optimizers, **more
    )
    trainer.pop_callback(type(next(x for x in trainer.callback_handler.callbacks if "Printer" in type(x).__name__)))
    return trainer


def stock(rows: Rows) -> list[dict[str, Tensor]]:
    """Rows as a stock model takes them."""
    return [{name: rows[index][name] for name in ("input_ids", "labels", "position_ids")} for index in range(len(rows))]


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weights(model) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def loop(model, rows: Rows, optimizer, *, clip, micro: int = 1, first: bool = False) -> list[float]:
    """A plain loop with the linear schedule of the Trainer: what it must do, without it."""
    curve, steps = [], len(rows) // BATCH
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for step in range(steps):
        batch = collate([rows[step * BATCH + index] for index in range(BATCH)])
        targets = (batch["labels"][:, 1:] != -100).sum()
        parts = [{name: tensor.chunk(micro)[part] for name, tensor in batch.items()} for part in range(micro)]
        if first:
            sinks_first(model, optimizer, parts, num_items_in_batch=targets)
        total = 0.0
        for chosen in parts:
            loss = model(**chosen, num_items_in_batch=targets).loss
            loss.backward()
            total += float(loss.detach())
        clip(model)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        curve.append(total)
    return curve


def separate(model) -> None:
    torch.nn.utils.clip_grad_norm_(shared_parameters(model), 1.0)
    torch.nn.utils.clip_grad_norm_(sink_parameters(model), 1.0)
