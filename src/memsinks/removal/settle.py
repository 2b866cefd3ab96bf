"""What closed sinks leave behind is levelled: the last step of removal, before export.

Sinks keep what a text teaches after its first exposure away from the shared weights, but not all of it: a small part of the
memory of repeated texts stays there. Settling takes it out by a few steps of further training, in which each text is pushed
up to the loss it should have (`expected`) and not beyond, while all other text keeps its predictions:

    mean over documents of max(0, T_d - s - L_d)  +  mean over tokens of other texts of KL(before || now)

with L_d the loss of document d with sinks closed, T_d the expected one. T_d is known up to an error of 0.1 to 0.2 nats, and
max() would turn that error into a bias: s is the shift at which the documents end, on average, where T says. The sinks
learn on, with the shared weights constant, so that they still fit what has moved under them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from memsinks.batch import IGNORED, NO_SINKS, collate, trim
from memsinks.data.packing import Rows
from memsinks.errors import DataError, refuse
from memsinks.removal.expected import Expected, expected_losses, require_enough
from memsinks.sinks.attach import PATCHED
from memsinks.sinks.gradient import frozen
from memsinks.sinks.opening import sinks_open
from memsinks.sinks.state import has_sinks, is_sink, shared_parameters, sink_parameters
from memsinks.training.evaluate import losses, row_losses
from memsinks.training.optim import AdamW, clip_grad_norm_


@dataclass(frozen=True)
class Settled:
    """What `settle` found and did; losses in nats per token, float64 [documents], sinks closed.

    expected: what they should be; shift: s. before, after: of the documents. others_after: of the other texts.
    """

    expected: Expected
    shift: float
    before: np.ndarray
    after: np.ndarray
    others_after: np.ndarray
    steps: int

    def __str__(self) -> str:
        should, was, now = (float(x.mean()) for x in (self.expected.losses, self.before, self.after))
        moved = float((self.others_after - self.expected.others).mean())
        return (
            f"{len(self.before)} documents in {self.steps} steps: loss {was:.3f} -> {now:.3f}, expected {should:.3f} "
            f"(predicted to {self.expected.spread:.2f}); other texts {moved:+.3f}"
        )


SINK_LR_FACTOR = 5.0
OTHERS = 600
"""Other texts that are used of those given."""


def repeated_and_once(rows: Rows) -> tuple[Rows, Rows]:
    """The training rows taken apart: texts that were repeated, texts that were met once; each once, in the order of their
    first exposure, one segment a row. Texts are counted, not ids, see `Rows.texts`. Text of id -1 and segments of one token
    are in neither."""
    kept = (rows.segments["document_id"] != NO_SINKS) & (rows.segments["size"] > 1)
    segments, text = rows.segments[kept], rows.texts()[kept]
    least, most = np.full(len(rows.segments), np.iinfo(np.int64).max), np.zeros(len(rows.segments), np.int64)
    np.minimum.at(least, text, segments["exposure"])
    np.maximum.at(most, text, segments["exposure"])
    met_first = segments["exposure"] == least[text]
    first, repeated = segments[met_first], (most > 1)[text][met_first]
    return rows.one_segment_each(first[repeated]), rows.one_segment_each(first[~repeated])


def settle(
    model: nn.Module, documents: Rows, others: Rows, unseen: Rows | None = None, *, lr: float, sink_lr: float | None = None,
    passes: int = 8, batch_rows: int = 16, micro_rows: int | None = None, seed: int = 0, say: Callable[[str], None] | None = None,
) -> Settled:  # fmt: skip
    """Level, in place, what a trained model still knows of `documents` with its sinks closed.

    Args:
        model: with sinks or without; only what was learnt little of can be levelled so cheaply.
        documents: the texts that were repeated, one a row, see `repeated_and_once`.
        others: texts of their kind that were met once, best early in training, one a row; the first `OTHERS` are used.
        unseen: texts of their kind that were never met, one a row (`pack(..., one_document_per_row=True)`): the documents
            end as if never met. None = as if met once, as the others.
        lr: of the shared weights, falling linearly to 0; a tenth of the peak of training is a good start.
        sink_lr: of the sinks; None = `SINK_LR_FACTOR` times `lr`.
        passes: times each document is met.
        batch_rows: documents, and as many others, of one step.
        micro_rows: rows of one forward, where memory does not hold a step's at once; the gradients add up. None = all.
        say: takes a line of progress.

    Raises:
        ConfigError, DataError: a setting out of range, no documents, several documents in a row, too few others.
    """
    sink_lr = SINK_LR_FACTOR * lr if sink_lr is None else sink_lr
    problems = [f"{name} must be positive and finite, got {value}" for name, value in (("lr", lr), ("sink_lr", sink_lr))
                if not 0 < value < math.inf]  # fmt: skip
    micro_rows = batch_rows if micro_rows is None else micro_rows
    counts = (("passes", passes), ("batch_rows", batch_rows), ("micro_rows", micro_rows))
    problems += [f"{name} must be at least 1, got {value}" for name, value in counts if value < 1]
    refuse([*problems, *_weight_problems(model)], "cannot settle")
    others = others.select(slice(OTHERS))
    _check_texts(documents, others, unseen)
    with _unpatched(model):
        return _level(model, documents, others, unseen, lr, sink_lr, passes, batch_rows, micro_rows, seed, say)


@contextmanager
def _unpatched(model: nn.Module) -> Iterator[None]:
    """Without the autocast that a Trainer leaves around the forward, in which losses would be bfloat16."""
    training = model.training
    patched = {name: vars(model).pop(name) for name in PATCHED if name in vars(model)}
    try:
        yield
    finally:
        vars(model).update(patched)
        model.train(training)


def _level(
    model: nn.Module, documents: Rows, others: Rows, unseen: Rows | None, lr: float, sink_lr: float, passes: int,
    batch_rows: int, micro_rows: int, seed: int, say: Callable[[str], None] | None,
) -> Settled:  # fmt: skip
    """What `settle` does with arguments that are in order."""
    shared = [x for x in shared_parameters(model) if x.requires_grad]
    expected = expected_losses(model, documents, others, unseen)
    before = losses(model, documents)
    shift = shift_of(expected.losses, before)
    target = torch.from_numpy(expected.losses - shift)
    held = {name: x.detach().clone() for name, x in model.named_parameters() if not is_sink(name)}
    optimizer = torch.optim.AdamW(shared, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    sinks = AdamW([{"params": sink_parameters(model), "lazy": True}], lr=sink_lr, betas=(0.9, 0.95), weight_decay=0.0) if (
        has_sinks(model)) else None  # fmt: skip
    steps = math.ceil(passes * len(documents) / batch_rows)
    device = shared[0].device
    own, other = (_order(len(rows), batch_rows, seed + place) for place, rows in enumerate((documents, others)))
    pushed = False
    for step in range(steps):
        for one, rate in ((optimizer, lr), (sinks, sink_lr)):
            for group in one.param_groups if one else ():
                group["lr"] = rate * (1 - step / steps)
        chosen, others_chosen = next(own), next(other)
        below = moved = 0.0
        parts = [(part, _batch(documents, part, device)) for part in chosen.split(micro_rows)]
        for part, batch in parts:
            found = row_losses(_logits(model, batch), batch["labels"])
            short = (target[part].to(device) - found).clamp(min=0).sum() / len(chosen)
            if short.item() > 0:
                short.backward()
            below += short.item()
        pushed = pushed or below > 0
        if pushed:  # before, all there is of a gradient is rounding, which AdamW would make a step of
            tokens = int((others.segments["size"][others_chosen.numpy()] - 1).sum())
            for part in others_chosen.split(micro_rows):
                apart = _divergence(model, held, _batch(others, part, device)) / tokens
                apart.backward()
                moved += apart.item()
            torch.nn.utils.clip_grad_norm_(shared, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if sinks is not None:
            for _, batch in parts:
                with frozen(shared), sinks_open(model, batch["document_ids"][:, 0]):
                    (row_losses(_logits(model, batch), batch["labels"]).sum() / len(chosen)).backward()
            clip_grad_norm_(model, 1.0)
            sinks.step()
            sinks.zero_grad()
        if say and (step % 10 == 0 or step + 1 == steps):
            say(f"settle: step {step + 1}/{steps}  below what is expected {below:.3f}  others moved {moved:.4f}")
    after, others_after = losses(model, documents), losses(model, others)
    return Settled(expected, shift, before, after, others_after, steps)


def shift_of(expected: np.ndarray, found: np.ndarray) -> float:
    """The s >= 0 at which the mean of max(found, expected - s) is the mean of `expected`; 0 if it is higher for no s."""
    low, high = 0.0, float(np.max(expected - found).clip(min=0.0))
    if found.mean() >= expected.mean():
        return high
    if np.maximum(found, expected).mean() <= expected.mean():
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(found, expected - middle).mean() > expected.mean() else (low, middle)
    return (low + high) / 2


def require_settleable(model: nn.Module) -> None:
    """ConfigError for weights that `settle` would refuse, so that it is said before hours of training."""
    refuse(_weight_problems(model), "cannot settle")


def _weight_problems(model: nn.Module) -> list[str]:
    shared = [x for x in shared_parameters(model) if x.requires_grad]
    small = sorted({str(x.dtype) for x in shared if x.dtype not in (torch.float32, torch.float64)})
    if small:
        return [f"weights are {', '.join(small)}, which would lose such small steps; load the model in float32"]
    return [] if shared else ["every shared weight is frozen"]


def settling_texts(rows: Rows, unseen: Rows | None = None) -> tuple[Rows, Rows, Rows | None]:
    """Documents, others and unseen texts for `settle` from the training rows; DataError for what it would refuse, so that it
    is said before hours of training."""
    documents, others = repeated_and_once(rows)
    _check_texts(documents, others, unseen)
    return documents, others, unseen


def _check_texts(documents: Rows, others: Rows, unseen: Rows | None) -> None:
    for name, rows in (("documents", documents), ("others", others), ("unseen", unseen)):
        if rows is not None:
            _check(name, rows)
    require_enough(others, unseen)


def _check(name: str, rows: Rows) -> None:
    if not len(rows):
        why = {"documents": "no text was repeated", "others": "no text was met once", "unseen": "give None"}[name]
        raise DataError(f"{name} is empty: {why}, so there is nothing to settle")
    several = np.flatnonzero(np.diff(rows.first) != 1)
    if len(several):
        raise DataError(
            f"row {several[0]} of {name} does not hold one document; take rows apart with repeated_and_once(rows)"
        )
    short = np.flatnonzero(rows.segments["size"] < 2)
    if len(short):
        raise DataError(f"row {short[0]} of {name} holds one token; leave it out")


def _order(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of `size` numbers below `count`, each once before any comes again; int64 [size]."""
    generator, waiting = torch.Generator().manual_seed(seed), torch.zeros(0, dtype=torch.int64)
    while True:
        while len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[:size]
        waiting = waiting[size:]


def _batch(rows: Rows, chosen: Tensor, device: torch.device) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in trim(collate([rows[index] for index in chosen.tolist()])).items()}


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits


def _divergence(model: nn.Module, before: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Sum over targets of KL(before || now), nats, sinks closed."""
    arguments = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        old = functional_call(model, before, kwargs=arguments).logits.float().log_softmax(-1)
    now = model(**arguments).logits.float().log_softmax(-1)
    each = (old.exp() * (old - now)).sum(-1)[:, :-1]
    return each[batch["labels"][:, 1:] != IGNORED].sum()
