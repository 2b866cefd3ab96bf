"""SGTM, selective gradient masking: reserved heads and neurons learn the forget set, everything else never does."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from memsinks.research.rivals.method import Batch, TrainingMethod, masked_gradients, without
from memsinks.research.rivals.reserved import cut_out, reserved_masks, reserved_off


def sgtm(*, extra_neurons: int, heads: int) -> TrainingMethod:
    """`extra_neurons` and `heads` beyond the recipe's are reserved for the repeated documents, the forget set.

    On those, the gradients of all other parameters are zeroed (embeddings and output matrix too); on all other text the
    reserved part is zeroed in the forward. It must be told beforehand which documents are repeated. The reserved part is cut
    out in the end. Some architectures want the model width to be a multiple of the number of all heads. Source: "Selective
    gradient masking", arXiv 2512.05648, sections 2 and 3.
    """

    def step(model: PreTrainedModel, batch: Batch, divisor: Tensor) -> float:
        masks = reserved_masks(model, extra_neurons, heads)
        with reserved_off(model, masks):
            retain = masked_gradients(
                model, without(batch, batch["repeated"]), divisor, dict.fromkeys(model.parameters())
            )
        return retain + masked_gradients(model, without(batch, ~batch["repeated"]), divisor, masks)

    def remove(model: PreTrainedModel) -> None:
        cut_out(model, extra_neurons, heads)

    return TrainingMethod(extra_neurons=extra_neurons, heads=heads, step=step, remove=remove)
