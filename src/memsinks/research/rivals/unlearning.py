"""Further training that is to take documents out of a model: gradient ascent, GradDiff, NPO, SimNPO.

The losses are functions of log-probabilities of documents, sums over their targets, float [documents] each: `forget` of the
documents to be forgotten, `reference` the same under the model before, `retain` of documents to be kept; `sizes` are numbers
of targets. Lower is better for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from memsinks.errors import ConfigError
from memsinks.research.rivals.method import Batch
from memsinks.research.rivals.scorers import predicting, require_targets, token_log_probabilities


def gradient_ascent_loss(forget: Tensor, sizes: Tensor) -> Tensor:
    """The mean log-probability of a token: minus the ordinary loss."""
    return forget.sum() / sizes.sum()


def graddiff_loss(forget: Tensor, sizes: Tensor, retain: Tensor, retain_sizes: Tensor) -> Tensor:
    """Gradient ascent on what is to be forgotten, ordinary descent on what is to be kept.

    Source: Liu, Liu, Stone, "Continual learning and private unlearning", 2022; Maini et al., "TOFU", 2024.
    """
    return gradient_ascent_loss(forget, sizes) - retain.sum() / retain_sizes.sum()


def npo_loss(forget: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    """Mean over documents of -(2/beta) log sigmoid(-beta log(p / p_reference)).

    Source: Zhang et al., "Negative preference optimization", COLM 2024, equation 3.
    """
    return -(2 / beta) * logsigmoid(-beta * (forget - reference)).mean()


def simnpo_loss(forget: Tensor, sizes: Tensor, beta: float = 2.5, gamma: float = 0.0) -> Tensor:
    """Mean over documents of -(2/beta) log sigmoid(-(beta/size) log p - gamma): no reference, normalized by length.

    Source: Fan et al., "Simplicity prevails: rethinking negative preference optimization", 2024, equation 3.
    """
    return -(2 / beta) * logsigmoid(-beta * forget / sizes - gamma).mean()


def document_log_probabilities(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """(sum of the log-probabilities of the targets, number of targets) of each row, one document a row; [rows] each."""
    return token_log_probabilities(model, batch).sum(1), predicting(batch).sum(1)


def unlearn(
    model: PreTrainedModel, forget: Sequence[Batch], retain: Sequence[Batch], kind: str, steps: Sequence[int], lr: float
) -> Iterator[PreTrainedModel]:
    """Train `model` in place and give it back after each of the step counts.

    A step takes the next batch of each side in turn; Adam, norm clipped to 1. NPO and SimNPO add the ordinary loss of the
    documents to be kept. Evaluation mode throughout: no dropout.

    Args:
        kind: "gradient-ascent", "graddiff", "npo" or "simnpo".
        steps: rising.

    Raises:
        ConfigError, DataError: an unknown kind; nothing to forget, or to keep where that is needed. Before the first step.
    """
    if kind not in KINDS:
        raise ConfigError(f"unlearning must be one of {', '.join(KINDS)}, got {kind!r}")
    require_targets(forget)
    if kind != "gradient-ascent":
        require_targets(retain, "kept")
    model.eval()
    with torch.no_grad():
        before = [document_log_probabilities(model, batch)[0] for batch in forget]
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(max(steps) + 1):
        if step in steps:
            yield model
        if step == max(steps):
            return
        place = step % len(forget)
        logp, sizes = document_log_probabilities(model, forget[place])
        loss = KINDS[kind](logp, sizes, before[place])
        if kind != "gradient-ascent":
            kept, kept_sizes = document_log_probabilities(model, retain[step % len(retain)])
            loss = loss - kept.sum() / kept_sizes.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


KINDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "gradient-ascent": lambda forget, sizes, _: gradient_ascent_loss(forget, sizes),
    "graddiff": lambda forget, sizes, _: gradient_ascent_loss(forget, sizes),
    "npo": lambda forget, _, reference: npo_loss(forget, reference),
    "simnpo": lambda forget, sizes, _: simnpo_loss(forget, sizes),
}
"""The part of each loss that is about what is to be forgotten."""
