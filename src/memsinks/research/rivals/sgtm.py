"""SGTM, selective gradient masking: reserved heads and neurons learn the forget set, everything else never does."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from memsinks.research.rivals.method import Batch, Method, masked_gradients, without
from memsinks.research.rivals.reserved import cut_out, reserved_masks, reserved_off


def sgtm(*, width: int, heads: int) -> Method:
    """`width` neurons and `heads` heads beyond the recipe's are reserved for the repeated documents, the forget set.

    On those, the gradients of all other parameters are zeroed (embeddings and output matrix too); on all other text the
    reserved part is zeroed in the forward. It must be told beforehand which documents are repeated. The reserved part is cut
    out in the end. Some architectures want the model width to be a multiple of the number of all heads. Source: "Selective
    gradient masking", arXiv 2512.05648, sections 2 and 3.
    """

    def step(model: PreTrainedModel, batch: Batch, divisor: Tensor) -> float:
        masks = reserved_masks(model, width, heads)
        with reserved_off(model, masks):
            retain = masked_gradients(
                model, without(batch, batch["repeated"]), divisor, dict.fromkeys(model.parameters())
            )
        return retain + masked_gradients(model, without(batch, ~batch["repeated"]), divisor, masks)

    return Method(width=width, heads=heads, step=step, remove=lambda model: cut_out(model, width, heads))
