"""The training loop: of runs, of the arms of comparisons, of the paper's study.

    training = Training(model, config, total)
    for done in steps(training, batches, checkpoints=folder):
        ...  # log, evaluate, write down what a resumed run needs in training.notes

A step is one optimizer step. It learns from micro-batches whose gradients add up, over one divisor: the targets of the whole
step, over all processes. Under decay sinks learn first, from all of them. Shared weights and sinks are clipped apart. From a
checkpoint training goes on to the same bits (on the CPU; on a GPU as far as its kernels repeat their bits).
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from memsinks.batch import ISOLATION, stock_arguments, target_count
from memsinks.errors import CheckpointError
from memsinks.sinks.exact import without_rows_alone
from memsinks.sinks.state import has_sinks, require_sinks
from memsinks.training.checkpoint import Checkpoint, save_checkpoint
from memsinks.training.config import TrainingConfig
from memsinks.training.exchange import send_open_blocks
from memsinks.training.first import sinks_first
from memsinks.training.interrupt import finishing_the_step
from memsinks.training.optim import AdamW, clip_gradients, optimizer_and_schedule
from memsinks.training.processes import all_of, main_process, process_count, process_rank, sum_over
from memsinks.training.shards import load_whole_state, shard_model, whole_state

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
"""A micro-batch, int64 or bool [rows, length] each: what `collate` gives, and what a way of training needs beside it."""
Batches = Callable[[int], Sequence[Batch]]
"""The number of a step, counted from 0 -> this process's micro-batches of it, on the CPU."""


def plain_step(model: nn.Module, batch: Batch, divisor: Tensor) -> float:
    """Gradients of the mean loss over `divisor` targets into ``.grad``; returns the loss, nats."""
    arguments = stock_arguments(batch)
    if has_sinks(model):
        arguments |= {name: batch[name] for name in ("document_ids", "exposures", ISOLATION) if name in batch}
    loss = model(**arguments, num_items_in_batch=divisor).loss
    loss.backward()
    return loss.item()


def unchanged(batch: Batch) -> Batch:
    """The batch as it is."""
    return batch


@dataclass(frozen=True)
class Done:
    """A step that was made.

    step: counted from 1. loss: mean over the targets of all processes, nats, but for rows that were left out; nan if all were.
    learning_rate: of the shared weights in it. seconds: with fetching the batch.
    """

    step: int
    loss: float
    learning_rate: float
    seconds: float


@dataclass
class Training:
    """A model in training: what a step changes, and so what a checkpoint holds.

    Args:
        model: where it is to be trained; in training mode in each step. Under torchrun every process has one.
        config: the settings.
        total: steps, for the schedule.
        learn: gradients of one micro-batch, as `plain_step`.
        change: what is done to each micro-batch after its targets are counted: other targets, other document ids.
        sinks_last: the sinks learn after these steps, see `last.sinks_last`. Rows that would train their sinks alone are left out
            then. They count in the divisor, so the shared weights end on the same bits as with them.

    Attributes:
        optimizer, schedule: see `optimizer_and_schedule`.
        sharded: the model is sharded over the processes.
        step: steps made.
        notes: what the caller writes down on the way, in numbers, text, lists and dicts; kept in checkpoints.
    """

    model: PreTrainedModel
    config: TrainingConfig
    total: int
    learn: Callable[[Any, Batch, Tensor], float] = plain_step
    change: Callable[[Batch], Batch] = unchanged
    sinks_last: bool = False
    step: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    sharded: bool = field(init=False)
    optimizer: AdamW = field(init=False)
    schedule: torch.optim.lr_scheduler.LambdaLR = field(init=False)

    def __post_init__(self) -> None:
        self.sharded = self.config.shard and process_count() > 1
        if self.sharded:
            shard_model(self.model)
        self.optimizer, self.schedule = optimizer_and_schedule(self.model, self.config, self.total)
        self._attributes = _training_attributes(self.model, self.config)
        self._exchanging: DistributedDataParallel | None = None

    def update(self, parts: Sequence[Batch]) -> float:
        """One optimizer step on this process's micro-batches; returns its loss, see `Done`."""
        device, processes = self.model.device, process_count()
        targets = sum_over(torch.tensor(sum(target_count(part["labels"]) for part in parts)), device)
        parts = [self.change({name: x.to(device, non_blocking=True) for name, x in part.items()}) for part in parts]
        divisor = targets if processes == 1 else targets / processes  # DDP and FSDP take the mean over processes
        learned = targets
        if self.sinks_last:
            parts = [without_rows_alone(self.model, part) for part in parts]
            learned = sum_over(torch.tensor(sum(target_count(part["labels"]) for part in parts)), device)
        self.model.train()
        if (
            processes > 1 and not self.sharded and self._exchanging is None
        ):  # unused parameters: experts that no token chose
            unused = not self.config.gradient_checkpointing
            self._exchanging = DistributedDataParallel(self.model, find_unused_parameters=unused)
            if has_sinks(self.model):
                send_open_blocks(self._exchanging)
        with self.as_in_training():
            if self.config.sinks_first and has_sinks(self.model) and require_sinks(self.model).config.shared == "decay":
                sinks_first(
                    self.model,
                    self.optimizer,
                    parts,
                    updates=self.config.sinks_first,
                    until=self.config.sinks_first_until,
                    max_norm=self.config.max_grad_norm,
                    num_items_in_batch=targets,
                )
            loss = 0.0
            for place, part in enumerate(parts):
                with self._alone(place + 1 < len(parts)):
                    loss += self.learn(self._exchanging or self.model, part, divisor)
        clip_gradients(self.model, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.step += 1
        loss = loss if processes == 1 else float(sum_over(torch.tensor(loss), device)) / processes
        if not self.sinks_last:
            return loss
        return loss * float(targets) / float(learned) if learned else math.nan

    def as_in_training(self) -> AbstractContextManager[None]:
        """Within the block the forward of the model is that of a step: autocast, compiled, without a cache."""
        return _as_in_training(self.model, self._attributes)

    def _alone(self, alone: bool) -> AbstractContextManager[None]:
        """Without the exchange of gradients between processes."""
        return self._exchanging.no_sync() if alone and self._exchanging is not None else nullcontext()

    def release(self) -> None:
        """Let go of the other processes: their group must not be left while the exchange of gradients holds it."""
        self._exchanging = None

    def save(self, folder: Path, facts: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint into `folder`; every process must call this, the first one writes.

        After the last step it holds what the model is, not what further steps would need.
        """
        states, state = all_of(_random_state(self.model.device)), {}
        if self.sharded:
            state = whole_state(self.model, self.optimizer)
        elif main_process():
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if not main_process():
            return
        state |= {"notes": self.notes, "schedule": self.schedule.state_dict(), "random": states}
        if self.step == self.total:
            state = {name: state[name] for name in ("model", "notes")}
        processes = process_count()
        facts = {"processes": processes, "rows_per_step": processes * self.config.batch_rows} | dict(facts or {})
        save_checkpoint(folder, self.step, state, keep=self.config.keep, facts=facts)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, to the same bits with as many processes; with another number, whose steps hold the same rows,
        to the same figures but for rounding.

        Raises:
            CheckpointError: it cannot be read, or its steps held another number of rows.
        """
        before, now = checkpoint.facts.get("processes", 1), process_count()
        rows = self.config.batch_rows * now
        held = checkpoint.facts.get("rows_per_step", self.config.batch_rows * before)
        if held != rows:
            raise CheckpointError(
                f"{checkpoint.path} was written by {before} processes whose steps held {held} rows, {now} with batch_rows="
                f"{self.config.batch_rows} would make steps of {rows}; resume with torchrun --nproc-per-node {before}, or set "
                f"training.batch_rows to {held / now:g}"
            )
        if before != now:
            logger.warning(
                "%s was written by %d processes, this is one of %d: steps hold the same rows, but sums are rounded otherwise",
                checkpoint.path,
                before,
                now,
            )
        state = checkpoint.load()
        self.step, self.notes = checkpoint.step, state["notes"]
        unfinished = self.step < self.total
        if self.sharded:
            load_whole_state(self.model, self.optimizer if unfinished else None, state)
        else:
            self.model.load_state_dict(state["model"])
            if unfinished:
                self.optimizer.load_state_dict(state["optimizer"])
        if unfinished:
            self.schedule.load_state_dict(state["schedule"])
            _set_random_state(state["random"], self.model.device)


def steps(
    training: Training,
    batches: Batches,
    *,
    until: int | None = None,
    checkpoints: Path | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Iterator[Done]:
    """Train; after each step the caller may look, evaluate and write into ``training.notes``.

    Args:
        until: stop after so many steps; None = at the end.
        checkpoints: save there every ``save_every`` steps but the last, and when Ctrl-C ends the training.
        facts: of the checkpoints.
    """
    last = training.total if until is None else min(until, training.total)
    every = training.config.save_every
    with finishing_the_step(checkpoints is not None and process_count() == 1) as interrupted:
        try:
            while training.step < last:
                start = time.perf_counter()
                rate = float(training.schedule.get_last_lr()[0])
                loss = training.update(batches(training.step))
                yield Done(training.step, loss, rate, time.perf_counter() - start)
                due = every > 0 and training.step % every == 0 and training.step < training.total
                if checkpoints is not None and (due or interrupted()):
                    training.save(checkpoints, facts)
                if interrupted():
                    raise KeyboardInterrupt
        finally:
            training.release()


def _training_attributes(model: PreTrainedModel, config: TrainingConfig) -> dict[str, Any]:
    """Attributes that the model has in a step only: autocast around its forward, compilation."""
    attributes: dict[str, Any] = {}
    if config.precision == "bf16":
        attributes["forward"] = torch.autocast(model.device.type, torch.bfloat16)(model.forward)
    if config.compile:
        with _as_in_training(model, dict(attributes)):
            model.compile()
            attributes["_compiled_call_impl"] = vars(model).pop("_compiled_call_impl")
    return attributes


@contextmanager
def _as_in_training(model: PreTrainedModel, attributes: Mapping[str, Any]) -> Iterator[None]:
    """With the attributes of training, and without the cache, with which packed documents see each other."""
    before = {name: vars(model)[name] for name in attributes if name in vars(model)}
    use_cache = getattr(model.config, "use_cache", None)
    vars(model).update(attributes)
    model.config.use_cache = False
    try:
        yield
    finally:
        for name in attributes:
            del vars(model)[name]
        vars(model).update(before)
        if use_cache is not None:
            model.config.use_cache = use_cache


def _random_state(device: torch.device) -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    state = {"python": [version, list(numbers), gauss], "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_state(states: Sequence[dict[str, Any]], device: torch.device) -> None:
    """That of this process."""
    state = states[process_rank() % len(states)]
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
