"""Samplers that change the order of rows, in which exposures were counted, are refused."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from memsinks.errors import DataError


def refuse_shuffling(sampler: Any) -> None:
    """Raise if a sampler, batch sampler or DataLoader, or a sampler inside it, changes the order of the rows.

    Exposures count the meetings of a text in the order of the data, so that order is the training order. Refused are
    the samplers of torch, transformers and accelerate that permute; one of your own must yield the rows in order.

    Raises:
        DataError: if the order is changed.
    """
    pending, seen = [sampler], set()
    while pending:
        sampler = pending.pop()
        if sampler is None or id(sampler) in seen:
            continue
        seen.add(id(sampler))
        if _permutes(sampler):
            raise DataError(
                f"{type(sampler).__name__} changes the order of the rows, but their exposures were counted in the "
                "order of the data; use a SequentialSampler, with the HF Trainer "
                'TrainingArguments(train_sampling_strategy="sequential"), and shuffle documents before pack()'
            )
        pending += [getattr(sampler, name, None) for name in ("sampler", "batch_sampler")]


# By name, because these belong to transformers, which this file does not need.
_PERMUTING = {"LengthGroupedSampler", "DistributedLengthGroupedSampler", "BatchRebalanceSampler"}


def _permutes(sampler: Any) -> bool:
    if isinstance(sampler, DistributedSampler):
        return bool(sampler.shuffle)
    if isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
        return True
    return any(base.__name__ in _PERMUTING for base in type(sampler).__mro__)
