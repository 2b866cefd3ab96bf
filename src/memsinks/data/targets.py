"""The tokens of documents checked, which of them are targets, and what the length of a row cuts off."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import numpy as np

from memsinks.errors import DataError

logger = logging.getLogger(__name__)

Targets = Sequence[np.ndarray | None]
"""For each document bool [tokens], whether each token is a target; None = all are. The first token of a document never is one."""


def check_tokens(tokens: Iterable[np.ndarray] | Iterable[Sequence[int]]) -> list[np.ndarray]:
    """`tokens` in a list; DataError unless each is integer [tokens], of at least one, none below 0."""
    documents = [np.asarray(document) for document in tokens]
    if not documents:
        raise DataError("there are no documents to pack: the corpus is empty")
    for index, document in enumerate(documents):
        if document.ndim != 1:
            raise DataError(f"tokens of document {index} must be one-dimensional, got shape {list(document.shape)}")
        if not len(document):
            raise DataError(f"document {index} has no tokens; leave it out")
        if document.dtype.kind not in "iu":
            raise DataError(f"tokens of document {index} must be integers, got {document.dtype}")
        if document.min() < 0:
            raise DataError(f"tokens of document {index} must be at least 0, got {document.min()}")
    return documents


def check_targets(targets: Iterable[np.ndarray | None], sizes: np.ndarray) -> Targets:
    """`targets` in a list; DataError unless each is None or bool [tokens of its document]."""
    found = [None if mask is None else np.asarray(mask) for mask in targets]
    if len(found) != len(sizes):
        raise DataError(f"targets must have one mask for each of the {len(sizes)} documents, got {len(found)}")
    for index, (mask, size) in enumerate(zip(found, sizes.tolist(), strict=True)):
        if mask is not None and (mask.dtype != np.bool_ or mask.shape != (size,)):
            raise DataError(
                f"targets of document {index} must be bool [{size}] (of labels: labels != -100) or None, got {mask.dtype} "
                f"{list(mask.shape)}"
            )
    return found


def refuse_untaught(targets: Targets, limit: int | None, names: Sequence[str] | None = None) -> None:
    """DataError for documents none of whose first `limit` tokens (None = all) is a target; says the first ones.

    Args:
        names: what each document is called; None = by its number.
    """
    wrong = [index for index, mask in enumerate(targets) if mask is not None and not mask[1:limit].any()]
    if not wrong:
        return
    some = ", ".join(f"document {index}" if names is None else names[index] for index in wrong[:5])
    why = "no target: all labels are masked" if limit is None else f"no target among their first {limit} tokens"
    raise DataError(
        f"{len(wrong)} documents have {why}, so they would teach nothing: {some}{', ...' if len(wrong) > 5 else ''}; leave them "
        "out" + ("" if limit is None else ', make rows longer, or choose long="split"')
    )


def segment_targets(segments: np.ndarray, targets: Targets | None) -> np.ndarray:
    """int64 [segments], the targets of each segment (`packing.SEGMENT`), whose first token is none."""
    counts = segments["size"].astype(np.int64) - 1
    if targets is not None:
        places = zip(*(segments[name].tolist() for name in ("document", "start", "size")), strict=True)
        for number, (index, start, size) in enumerate(places):
            mask = targets[index]
            if mask is not None:
                counts[number] = np.count_nonzero(mask[start + 1 : start + size])
    return counts


def truncated(sizes: np.ndarray, length: int, targets: Targets | None) -> np.ndarray:
    """The sizes of documents of which the first `length` tokens are kept; says how much that leaves out.

    Raises:
        DataError: no target is left of a document that has a mask.
    """
    if targets is not None:
        refuse_untaught(targets, length)
    kept = sizes.clip(max=length)
    lost = sizes - kept
    if lost.any():
        logger.warning(
            "truncated %d of %d documents (each copy counted) to %d tokens: %d of %d tokens are left out",
            np.count_nonzero(lost), len(sizes), length, lost.sum(), sizes.sum(),
        )  # fmt: skip
    return kept


def refuse_long(sizes: np.ndarray, length: int) -> None:
    """DataError if a document is longer than a row; says the first ones."""
    too_long = np.flatnonzero(sizes > length).tolist()
    if too_long:
        some = ", ".join(f"document {index} has {sizes[index]}" for index in too_long[:5])
        raise DataError(
            f"{len(too_long)} documents are longer than a row of {length} tokens: {some}"
            f"{', ...' if len(too_long) > 5 else ''}; make rows longer, cut the documents, or choose "
            'long="split" or long="truncate"'
        )


def as_bits(targets: Targets | None, sizes: np.ndarray) -> np.ndarray:
    """The targets of the first documents, of `sizes` tokens each, as uint8, eight tokens each; [0] if all are."""
    if targets is None:
        return np.zeros(0, np.uint8)
    return np.packbits(
        np.concatenate([np.ones(n, bool) if x is None else x for x, n in zip(targets, sizes, strict=False)])
    )


def from_bits(bits: np.ndarray, sizes: np.ndarray, documents: int) -> Targets | None:
    """The targets of `documents` documents, of the first of which `as_bits` was given `sizes`."""
    if not len(bits):
        return None
    first = np.split(np.unpackbits(bits, count=int(sizes.sum())).astype(bool), np.cumsum(sizes)[:-1])
    return [*first, *[None] * (documents - len(first))]
