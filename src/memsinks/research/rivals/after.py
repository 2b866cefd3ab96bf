"""Post-hoc arms: they start from the trained model of another arm and give one model for each value of a sweep.

They must know which documents are to be forgotten (the repeated ones), but only after training. `random_neurons` zeroes the
same neurons whatever is to be forgotten: they follow from the seed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from memsinks.errors import ConfigError
from memsinks.research.rivals import scorers
from memsinks.research.rivals.hard_concrete import hard_concrete
from memsinks.research.rivals.method import Batch, EditingMethod
from memsinks.research.rivals.pruning import top_neurons, zero_neurons
from memsinks.research.rivals.unlearning import unlearn

FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.4)
STEPS = (4, 8, 16, 32)


def pruned(model: PreTrainedModel, scores: Tensor, fractions: Sequence[float]) -> Iterator[PreTrainedModel]:
    """For each fraction a copy of the model with the top of each layer zeroed; `scores` [layers, neurons]."""
    for fraction in fractions:
        other = copy.deepcopy(model)
        zero_neurons(other, top_neurons(scores, fraction))
        yield other


def activations(*, after: str, fractions: Sequence[float] = FRACTIONS) -> EditingMethod:
    """Zero the neurons with the largest mean absolute activation x output norm on the repeated documents.

    Source: Chang et al., NAACL 2024. It must be told which documents are to be forgotten.
    """
    return _pruning(after, fractions, lambda model, forget, seed: scorers.activations(model, forget))


def zero_out(*, after: str, fractions: Sequence[float] = FRACTIONS, documents: int = 8) -> EditingMethod:
    """Zero the neurons whose zeroing alone raises the loss most, measured on so many of the repeated documents.

    Source: Chang et al., NAACL 2024. One forward pass over those documents for each neuron.
    """
    return _pruning(
        after, fractions, lambda model, forget, seed: scorers.zero_out(model, first_rows(forget, documents))
    )


def integrated_gradients(*, after: str, fractions: Sequence[float] = FRACTIONS, steps: int = 16) -> EditingMethod:
    """Zero the neurons to which integrated gradients attribute most of the probability of the repeated documents' tokens.

    Source: Dai et al., ACL 2022; Chang et al., NAACL 2024; the paper's Fig. 2b.
    """
    return _pruning(after, fractions, lambda model, forget, seed: scorers.integrated_gradients(model, forget, steps))


def hard_concrete_pruning(
    *,
    after: str,
    fractions: Sequence[float] = FRACTIONS,
    iterations: int = 100,
    lr: float = 0.1,
    penalty: float = 8.0,
    start: float = 0.9,
) -> EditingMethod:
    """Zero the neurons whose learned gates are most open when the repeated documents are kept with few neurons.

    Source: Louizos et al., ICLR 2018; Chang et al., NAACL 2024; the paper's Fig. 2a ("Pruning").
    """
    return _pruning(
        after,
        fractions,
        lambda model, forget, seed: hard_concrete(
            model, forget, iterations=iterations, lr=lr, penalty=penalty, start=start, seed=seed
        ),
    )


def random_neurons(*, after: str, fractions: Sequence[float] = FRACTIONS) -> EditingMethod:
    """Zero neurons drawn at random, the same ones for every forget set: the control that every scorer has to beat."""
    return _pruning(after, fractions, lambda model, forget, seed: scorers.random_scores(model, seed))


def gradient_ascent(*, after: str, steps: Sequence[int] = STEPS, lr: float = 2e-4) -> EditingMethod:
    """Train on the repeated documents with the sign of the loss turned, and on nothing else."""
    return _unlearning(after, "gradient-ascent", steps, lr)


def graddiff(*, after: str, steps: Sequence[int] = STEPS, lr: float = 2e-4) -> EditingMethod:
    """Gradient ascent on the repeated documents, descent on those seen once. Source: Liu, Liu, Stone, 2022."""
    return _unlearning(after, "graddiff", steps, lr)


def npo(*, after: str, steps: Sequence[int] = STEPS, lr: float = 2e-4) -> EditingMethod:
    """Negative preference optimization (beta 0.1) with descent on the documents seen once. Source: Zhang et al., 2024."""
    return _unlearning(after, "npo", steps, lr)


def simnpo(*, after: str, steps: Sequence[int] = STEPS, lr: float = 2e-4) -> EditingMethod:
    """NPO without a reference, normalized by length, with descent on the documents seen once. Source: Fan et al., 2024."""
    return _unlearning(after, "simnpo", steps, lr)


def first_rows(rows: Sequence[Batch], count: int) -> list[Batch]:
    """The first `count` rows of the batches, in batches of their own."""
    found, left = [], count
    for batch in rows:
        if left > 0:
            found.append({name: value[:left] for name, value in batch.items()})
        left -= len(batch["labels"])
    return found


def _pruning(
    after: str, fractions: Sequence[float], score: Callable[[PreTrainedModel, Sequence[Batch], int], Tensor]
) -> EditingMethod:
    _check(after, "fractions", fractions, all(isinstance(x, int | float) and 0 <= x <= 1 for x in fractions))

    def edit(
        model: PreTrainedModel, forget: Sequence[Batch], retain: Sequence[Batch], seed: int
    ) -> Iterator[PreTrainedModel]:
        scorers.require_targets(forget)
        return pruned(model, score(model, forget, seed), fractions)

    return EditingMethod(after=after, sweep=tuple(f"{100 * x:g}%" for x in fractions), edit=edit)


def _unlearning(after: str, kind: str, steps: Sequence[int], lr: float) -> EditingMethod:
    rising = all(isinstance(x, int) and x >= 0 for x in steps) and list(steps) == sorted(set(steps))
    _check(after, "steps", steps, rising)

    def edit(
        model: PreTrainedModel, forget: Sequence[Batch], retain: Sequence[Batch], seed: int
    ) -> Iterator[PreTrainedModel]:
        return unlearn(model, forget, retain, kind, steps, lr)

    return EditingMethod(after=after, sweep=tuple(f"{x} steps" for x in steps), edit=edit)


def _check(after: str, name: str, values: Sequence[float], good: bool) -> None:
    if not isinstance(after, str) or not after:
        raise ConfigError(f"after must name the arm whose model is edited, got {after!r}")
    if not values or not good:
        kind = "numbers in [0, 1]" if name == "fractions" else "rising whole numbers"
        raise ConfigError(f"{name} must be a list of {kind}, got {values!r}")
