"""The loss of each row of a model, with sinks closed or with its own sinks open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from memsinks.batch import IGNORED, collate, trim
from memsinks.sinks.attach import PATCHED
from memsinks.sinks.opening import own_sinks_open

EVALUATED_ROWS, EVALUATED_TOKENS = 32, 8192
"""Rows and tokens of one forward in evaluation, at most."""


class AnyRows(Protocol):
    """`Rows`, or what gives the same."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


def batches(rows: AnyRows, size: int, where: torch.device | str = "cpu") -> Iterator[dict[str, Tensor]]:
    """Rows in order, `size` at a time."""
    for start in range(0, len(rows), size):
        batch = collate([rows[index] for index in range(start, min(len(rows), start + size))])
        yield {name: value.to(where) for name, value in batch.items()}


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of each row's targets, nats, float64 [rows]; logits [rows, length, vocabulary], labels [rows, length]."""
    labels = labels[:, 1:]
    each = cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels, ignore_index=IGNORED, reduction="none")
    return each.double().sum(1) / (labels != IGNORED).sum(1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in eval mode; at its end every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def gradients_aside(model: nn.Module) -> Iterator[None]:
    """Within the block every `.grad` begins as None; at its end, however it ends, they are what they were."""
    held = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in held:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient


@contextmanager
def unpatched(model: nn.Module) -> Iterator[None]:
    """Within the block without the autocast that a Trainer leaves around the forward, in which losses would be bfloat16."""
    patched = {name: vars(model).pop(name) for name in PATCHED if name in vars(model)}
    try:
        yield
    finally:
        vars(model).update(patched)


@torch.no_grad()
def losses(model: nn.Module, rows: AnyRows, *, opened: bool = False) -> np.ndarray:
    """Mean loss of each row's targets, nats, float64 [rows]; with its own sinks open if asked. One document a row.

    The model may be in any mode, and is in it again afterwards.
    """
    found = []
    size = min(EVALUATED_ROWS, max(1, EVALUATED_TOKENS // len(rows[0]["input_ids"]))) if len(rows) else 1
    with evaluating(model):
        for batch in map(trim, batches(rows, size, next(model.parameters()).device)):
            own = batch["document_ids"][:, 0]
            scope: AbstractContextManager[None] = own_sinks_open(model, own) if opened else nullcontext()
            with scope:
                logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
            found.append(row_losses(logits, batch["labels"]).cpu())
    return torch.cat(found).numpy()
