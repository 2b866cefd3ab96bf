"""Sinks learn last: after training, the sinks of repeated texts alone, with the shared weights constant.

    documents, once = ms.repeated_and_once(rows)
    ms.sinks_last(model, documents, lr=6e-3)

What is removed cannot change by a bit: the shared weights are constants. So sinks may take as many steps as their texts need
to be recited, and they fit the shared weights as these are at the end, which no update on the way did.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from memsinks.batch import collate, trim
from memsinks.checks import at_least, int_at_least, positive
from memsinks.data.packing import Rows
from memsinks.errors import ConfigError, DataError, refuse
from memsinks.sinks.gradient import frozen
from memsinks.sinks.opening import sinks_open
from memsinks.sinks.sharding import local, part_like, reshard
from memsinks.sinks.state import require_sinks, shared_parameters, sink_modules, sink_parameters, unwrap
from memsinks.training.evaluate import evaluating, gradients_aside, losses, row_losses, unpatched
from memsinks.training.optim import AdamW, clip_grad_norm_

logger = logging.getLogger(__name__)
BETAS = (0.8, 0.9)
"""Of AdamW: a text is met only as often as there are passes, so moments that remember less recite more."""
PASSES = 40
"""Times each text is met, unless something else is asked for."""
LOG_EVERY = 20
"""Steps between two lines of progress."""


@dataclass(frozen=True)
class SinksLastResult:
    """Losses of the documents with their own sinks open, nats per token, float64 [documents], and the steps made."""

    before: np.ndarray
    after: np.ndarray
    steps: int

    def __str__(self) -> str:
        return (
            f"{len(self.before)} documents in {self.steps} steps: loss with their own sinks {self.before.mean():.3f} -> "
            f"{self.after.mean():.3f}"
        )


def sinks_last(
    model: nn.Module,
    documents: Rows,
    *,
    lr: float,
    passes: int = PASSES,
    until: float = 0.0,
    batch_rows: int = 16,
    micro_rows: int | None = None,
    max_norm: float = 1.0,
    only: Mapping[int, Sequence[int]] | None = None,
    seed: int = 0,
) -> SinksLastResult:
    """Train the sinks of some texts alone, in place; every shared weight keeps its bits.

    `AdamW` on the blocks that are open, without weight decay, the learning rate falling linearly to 0. It costs a forward and
    the backward of the sinks, about two thirds of a training step, `passes` times for each *different* text.

    Args:
        model: with sinks, in any mode, which is kept, and also inside DDP; one process is enough. All ranks of a sharded one
            (FSDP2) must call this with the same documents. Gradients in ``.grad`` stay.
        documents: the texts, one a row: those of `repeated_and_once`, whose sinks opened in training.
        lr: peak learning rate; that of the sinks in training (``lr * sink_lr_factor``) is a good start.
        passes: times each text is met.
        until: a text whose loss was at or below this when it was met, nats, is met no more; 0 = each text in every pass. Passes
            over texts that are recited already are most of the cost; what leaving them out does to recall was not measured. No
            sink can bring a loss below a floor that the output embedding sets, so below it this ends nothing.
        batch_rows: texts of one step; micro_rows: of one forward, the gradients add up. None = all.
        max_norm: of the sinks' gradient; 0 = no clipping.
        only: {layer: blocks} that learn, all others keep every bit; None = all that are open.
        seed: of the order of the texts.

    Raises:
        ConfigError: a setting out of range; every sink is frozen. ArchitectureError: a model without sinks; FSDP1.
        DataError: no texts, several in a row, or one of a single token.
    """
    require_sinks(model)
    model = unwrap(model)
    reshard(model)
    problems = positive("lr", lr) + int_at_least("passes", passes, 1) + int_at_least("batch_rows", batch_rows, 1)
    problems += at_least("until", until, 0)
    problems += [] if micro_rows is None else int_at_least("micro_rows", micro_rows, 1)
    refuse(problems, "cannot train the sinks last")
    require_one_text_each("documents", documents)
    parameters, shared = [x for x in sink_parameters(model) if x.requires_grad], shared_parameters(model)
    if not parameters:
        raise ConfigError("every sink is frozen; sinks_last has nothing to train")
    batch_rows = min(batch_rows, len(documents))
    steps = math.ceil(passes * len(documents) / batch_rows)
    order = shuffled(len(documents), batch_rows, seed)
    optimizer = AdamW([{"params": parameters, "lazy": True}], lr=lr, betas=BETAS, weight_decay=0.0)
    bar = tqdm(total=steps, desc="sinks last", disable=None, leave=False)
    with gradients_aside(model), evaluating(model), unpatched(model), bar:
        before = losses(model, documents, opened=True)
        known, made = torch.zeros(len(documents), dtype=torch.bool), 0
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
            texts = next(order)
            texts = texts[~known[texts]]
            bar.update()
            if not len(texts):
                continue
            parts = [batch_of(documents, x, parameters[0].device) for x in texts.split(micro_rows or batch_rows)]
            found = add_own_gradients(model, shared, parts)
            known[texts] = (found <= until).cpu() if until else False
            made += 1
            if only is not None:
                _keep_gradients(model, only)
            clip_grad_norm_(model, max_norm)
            optimizer.step()
            optimizer.zero_grad()
            if bar.disable and (step % LOG_EVERY == 0 or step + 1 == steps):
                logger.info("sinks last: step %d/%d  loss with own sinks %.3f", step + 1, steps, found.mean())
        return SinksLastResult(before, losses(model, documents, opened=True), made)


def add_own_gradients(model: nn.Module, shared: Sequence[nn.Parameter], batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """Add the sinks' gradient of the mean loss of some texts, their own sinks open, `shared` constant.

    Returns:
        Their losses, nats, float64 [texts].
    """
    count, found = sum(len(batch["labels"]) for batch in batches), []
    for batch in batches:
        reshard(model)  # an evaluation may have left parameters whole, which `shared` does not name
        with frozen(shared), sinks_open(model, batch["document_ids"][:, 0]):
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
            each = row_losses(logits, batch["labels"])
        (each.sum() / count).backward()
        found.append(each.detach())
    return torch.cat(found)


def _keep_gradients(model: nn.Module, blocks: Mapping[int, Sequence[int]]) -> None:
    """Set the gradient of all sink blocks but these to zero."""
    for layer, module in zip(require_sinks(model).layers, sink_modules(model).values(), strict=True):
        for parameter in module.parameters():
            if parameter.grad is not None:
                rest = torch.ones(len(parameter), dtype=torch.bool)
                rest[list(blocks.get(layer, ()))] = False
                local(parameter.grad)[part_like(rest.to(parameter.device), parameter)] = 0


def require_one_text_each(name: str, rows: Rows, why_empty: str = "no text was repeated, so no sinks opened") -> None:
    """DataError unless every row holds one text with a target, and there is one."""
    if not len(rows):
        raise DataError(f"{name} is empty: {why_empty}")
    several = np.flatnonzero(np.diff(rows.first) != 1)
    if len(several):
        raise DataError(
            f"row {several[0]} of {name} does not hold one document; take rows apart with repeated_and_once(rows)"
        )
    untaught = np.flatnonzero(rows.segment_targets < 1)
    if len(untaught):
        raise DataError(f"row {untaught[0]} of {name} holds no target (one token, or no answer); leave it out")


def shuffled(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of `size` numbers below `count`, each once before any comes again; int64 [size]."""
    generator, waiting = torch.Generator().manual_seed(seed), torch.zeros(0, dtype=torch.int64)
    while True:
        while len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[:size]
        waiting = waiting[size:]


def batch_of(rows: Rows, chosen: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Some rows as a batch, without the columns that are padding in all of them."""
    return {name: x.to(device) for name, x in trim(collate([rows[index] for index in chosen.tolist()])).items()}
