"""Gradient masking: repeated documents may write only into some neurons of each MLP, the others only into the rest."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memsinks.research.rivals.method import Batch, TrainingMethod, masked_gradients, without
from memsinks.research.rivals.reserved import cut_out, reserved_masks


def gradient_masking(*, extra_neurons: int) -> TrainingMethod:
    """`extra_neurons` memorization neurons beside the recipe's general ones; the forward is not masked.

    In the MLP weights, repeated documents teach the memorization neurons and all others the general neurons; attention,
    norms and embeddings learn from both. It must be told beforehand which documents are repeated. The memorization
    neurons are cut out in the end. Source: Ghosal, Maini, Raghunathan, ICML 2025, section 4, after Cloud et al., "Gradient
    routing", arXiv 2410.04332.
    """

    def step(model: PreTrainedModel, batch: Batch, divisor: Tensor) -> float:
        return masked_step(model, batch, divisor, reserved_masks(model, extra_neurons, 0))

    def remove(model: PreTrainedModel) -> None:
        cut_out(model, extra_neurons, 0)

    return TrainingMethod(extra_neurons=extra_neurons, step=step, remove=remove)


def masked_step(model: PreTrainedModel, batch: Batch, divisor: Tensor, masks: Mapping[nn.Parameter, Tensor]) -> float:
    """Gradients of one step into ``.grad``; `masks` are 1 where only repeated documents may write. Returns the loss, nats."""
    everything: dict[torch.nn.Parameter, Tensor | None] = dict.fromkeys(model.parameters())
    others = masked_gradients(
        model, without(batch, batch["repeated"]), divisor, everything | {x: 1 - y for x, y in masks.items()}
    )
    return others + masked_gradients(model, without(batch, ~batch["repeated"]), divisor, everything | dict(masks))
