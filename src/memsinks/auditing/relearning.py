"""How fast does it come back? Fine-tuning a copy on half of the documents, beside the twin that never saw them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from memsinks.batch import IGNORED
from memsinks.errors import DataError
from memsinks.sinks.attach import PATCHED, remove_sinks
from memsinks.sinks.state import has_sinks

POINTS = 20
"""Times at which the losses are taken, apart from the start."""


@dataclass(frozen=True)
class RelearningCurve:
    """Losses, nats per token, after each of `steps`: of the half that is trained on again, and of the other half."""

    name: str
    steps: tuple[int, ...]
    same: tuple[float, ...]
    other: tuple[float, ...]


@dataclass(frozen=True)
class Relearning:
    """Steps until the loss of a half has come down to `target` (halfway from the twin's to the ordinary model's).

    steps_same, steps_other: by model, None = not within the budget. ratio_same, ratio_other: of the audited model to the
    twin; 1 = it comes back no faster than in a model that never saw it, 0 = it was there.
    """

    curves: tuple[RelearningCurve, ...]
    target_same: float
    target_other: float
    steps_same: dict[str, float | None]
    steps_other: dict[str, float | None]
    ratio_same: float | None
    ratio_other: float | None


def relearn(
    model: PreTrainedModel,
    tokens: Sequence[np.ndarray],
    start: np.ndarray,
    *,
    name: str,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
) -> RelearningCurve:
    """Fine-tune a copy without sinks, in float32, on every other document; the model itself is left alone.

    Args:
        tokens: integer [tokens of the document] each, at least 2 documents; longer ones are cut to the context.
        start: integer [0 or 1], put before each document.
        steps, lr, batch_size: of AdamW without weight decay, constant learning rate, gradients clipped to norm 1.

    Raises:
        DataError: fewer than 2 documents.
    """
    if len(tokens) < 2:
        raise DataError(f"relearning needs at least 2 documents to halve, got {len(tokens)}")
    student = copy.deepcopy(model)
    if has_sinks(student):
        remove_sinks(student)
    for patch in PATCHED:  # it may still call the model that was copied
        vars(student).pop(patch, None)
    student.float().train()
    student.requires_grad_(True)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    texts = [torch.from_numpy(np.concatenate([start, one])[:limit].astype(np.int64)) for one in tokens]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(texts))
    same, other = ([texts[index] for index in order[part::2]] for part in (0, 1))
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.0)
    marks = sorted({round(steps * part / POINTS) for part in range(POINTS + 1)})
    losses: list[tuple[float, float]] = []
    queue: list[int] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in tqdm(range(steps + 1), desc=f"{name}: relearning", unit=" steps", disable=None, leave=False):
            if step in marks:
                losses.append((_mean_loss(student, same, batch_size), _mean_loss(student, other, batch_size)))
            if step == steps:
                break
            while len(queue) < min(batch_size, len(same)):
                queue += rng.permutation(len(same)).tolist()
            chosen, queue = queue[:batch_size], queue[batch_size:]
            rows, labels = _padded([same[index] for index in chosen], student.device)
            student(input_ids=rows, labels=labels, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return RelearningCurve(name, tuple(marks), tuple(x[0] for x in losses), tuple(x[1] for x in losses))


def compare(audited: RelearningCurve, against: RelearningCurve, twin: RelearningCurve) -> Relearning:
    """The three curves together; `against` is the ordinary model, of which only the start is used."""
    targets = {half: (getattr(twin, half)[0] + getattr(against, half)[0]) / 2 for half in ("same", "other")}
    curves = (audited, twin)
    steps = {half: {x.name: steps_until(x.steps, getattr(x, half), targets[half]) for x in curves} for half in targets}

    def ratio(half: str) -> float | None:
        mine, its = steps[half][audited.name], steps[half][twin.name]
        return None if mine is None or not its else mine / its

    return Relearning(
        (audited, twin, against),
        targets["same"],
        targets["other"],
        steps["same"],
        steps["other"],
        ratio("same"),
        ratio("other"),
    )


def steps_until(steps: Sequence[int], losses: Sequence[float], target: float) -> float | None:
    """The step at which the loss first reaches `target`, between two points by a straight line; None if it does not."""
    for place, loss in enumerate(losses):
        if loss <= target:
            if place == 0:
                return float(steps[0])
            before = losses[place - 1]
            share = (before - target) / (before - loss)
            return steps[place - 1] + share * (steps[place] - steps[place - 1])
    return None


@torch.no_grad()
def _mean_loss(model: PreTrainedModel, texts: Sequence[torch.Tensor], batch_size: int) -> float:
    model.eval()
    total, count = 0.0, 0
    for at in range(0, len(texts), batch_size):
        rows, labels = _padded(texts[at : at + batch_size], model.device)
        targets = int((labels[:, 1:] != IGNORED).sum())
        total += float(model(input_ids=rows, labels=labels, use_cache=False).loss) * targets
        count += targets
    model.train()
    return total / count


def _padded(texts: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded rows and labels; padding is not looked at by a causal model and has no loss."""
    rows = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=IGNORED)
    return rows.to(device), labels.to(device)
