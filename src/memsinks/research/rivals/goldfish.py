"""The goldfish loss: a fixed 1 in k of the tokens, chosen by what stands before them, is never learned."""

from __future__ import annotations

import torch
from torch import Tensor

from memsinks.research.rivals.method import Batch, TrainingMethod, without
from memsinks.sinks.routing import splitmix64

BASE = 0x5851F42D4C957F2D
"""Odd multiplier of the rolling hash, modulo 2^64."""


def goldfish(*, k: int = 4, context: int = 13) -> TrainingMethod:
    """Drop the target at each place where the hash of the `context` tokens before it falls under 1/k.

    The same context drops the same target in every copy, so a copy never teaches what the first left out. The divisor
    stays that of all targets. Source: Hans et al., "Be like a goldfish, don't memorize!", arXiv 2406.10209, section 3.1.
    """

    def change(batch: Batch) -> Batch:
        return without(batch, dropped(batch["input_ids"], batch["position_ids"], k, context))

    return TrainingMethod(change=change)


def dropped(input_ids: Tensor, position_ids: Tensor, k: int, context: int) -> Tensor:
    """Which targets are dropped, bool [rows, length]; none of the first `context` tokens of a document.

    The hash is polynomial, sum over j of BASE^j * (token j places before + 1) modulo 2^64, then mixed: it depends on the
    order of the tokens and on no token more than on others.

    Args:
        input_ids: int64 [rows, length].
        position_ids: int64 [rows, length], the place of each token in its document.
    """
    rolling = torch.zeros_like(input_ids)
    power = 1
    for back in range(1, context + 1):
        power = power * BASE % 2**64
        signed = power - 2**64 if power >= 2**63 else power
        shifted = torch.nn.functional.pad(input_ids, (back, 0))[:, : input_ids.shape[1]]
        rolling = rolling + (shifted + 1) * signed
    share = (splitmix64(rolling) >> 11) & (2**53 - 1)
    return (share < 2**53 // k) & (position_ids >= context)
