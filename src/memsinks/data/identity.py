"""Document -> 63-bit id, the text it is, and the exposure numbers of a training order.

Two numbers belong to a document and are kept apart. The *document id* says which sinks to open; the *group* says which
text it is, so that meetings of a text can be counted. They differ when the sinks belong to a source (all documents of
a site open the same sinks) while repetition is still counted text by text.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from memsinks.batch import NO_SINKS
from memsinks.data.documents import Document
from memsinks.errors import ConfigError, DataError

# blake2b's personalization: at most 16 bytes. Changing one changes every id that was ever written.
_PERSON = {kind: b"memsinks1" + kind.encode() for kind in ("content", "key", "source")}


def document_id(text_or_key: str | bytes, kind: Literal["content", "key", "source"] = "content") -> int:
    """The 63-bit id of a text, a key or a source: the same on every machine and in every version, about 1 us.

    blake2b over the UTF-8 bytes exactly as given: nothing is stripped and Unicode is not normalized, so "ü" composed
    and decomposed are two texts. The three kinds never share ids. P(any two of 1e8 documents collide) is about 5e-4.

    Raises:
        DataError: neither str nor bytes, or a str with lone surrogates, which has no UTF-8 form.
        ConfigError: an unknown kind.
    """
    person = _PERSON.get(kind)
    if person is None:
        raise ConfigError(f'kind must be "content", "key" or "source", got {kind!r}')
    if isinstance(text_or_key, str):
        try:
            data = text_or_key.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"the {kind} has a lone surrogate at character {error.start} and cannot be written as UTF-8; "
                'replace it, e.g. by text.encode("utf-8", "replace").decode()'
            ) from error
    elif isinstance(text_or_key, bytes):
        data = text_or_key
    else:
        raise DataError(f"the {kind} must be str or bytes, got {type(text_or_key).__name__}: {text_or_key!r:.80}")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=person).digest(), "little") & (2**63 - 1)


def identify(
    documents: Sequence[Document], by: Literal["content", "key", "source"] = "content"
) -> tuple[np.ndarray, np.ndarray]:
    """(document_ids, groups) of documents, int64 [n] each, in the order given; `copies` is not unrolled.

    Args:
        documents: the documents.
        by: ``"content"``: id and group come from the text, exact copies share both. ``"key"``: both come from the key;
            give near copies one key and they are one group. ``"source"``: the id comes from the source, the group from
            the text.

    Raises:
        DataError: a document without the key or source asked for (missing or empty), or as for `document_id`; names
            its index.
        ConfigError: an unknown `by`.
    """
    if by not in _PERSON:
        raise ConfigError(f'by must be "content", "key" or "source", got {by!r}')
    ids = np.empty(len(documents), np.int64)
    groups = np.empty(len(documents), np.int64)
    for index, document in enumerate(documents):
        name = document.text if by == "content" else getattr(document, by)
        if by != "content" and (name is None or name == ""):
            raise DataError(f'document {index} has no {by}; give every document one or identify by="content"')
        try:
            ids[index] = document_id(name, by)
            groups[index] = document_id(document.text) if by == "source" else ids[index]
        except DataError as error:
            raise DataError(f"document {index}: {error}") from error
    return ids, groups


def training_order(documents: Sequence[Document], seed: int = 0, epochs: int = 1) -> list[int]:
    """Indices into `documents` in the order of training: each one `copies` times per epoch, every epoch shuffled anew.

    Documents with 0 copies are left out. The global random state is neither used nor changed.

    Raises:
        ConfigError: fewer than 1 epoch.
        DataError: no document has copies above 0, or one has less than 0.
    """
    for index, document in enumerate(documents):
        if document.copies < 0:
            raise DataError(f"document {index} has {document.copies} copies; give 0 or more")
    return order_of([document.copies for document in documents], seed, epochs)


def order_of(copies: Sequence[int], seed: int = 0, epochs: int = 1) -> list[int]:
    """`training_order` of documents of which only the numbers of copies are given."""
    if epochs < 1:
        raise ConfigError(f"epochs must be at least 1, got {epochs}")
    once = [index for index, number in enumerate(copies) for _ in range(number)]
    if not once:
        raise DataError(f"none of the {len(copies)} documents has copies above 0; there is nothing to train on")
    rng = random.Random(f"training order {seed}")
    order = []
    for _ in range(epochs):
        rng.shuffle(once)
        order += once
    return order


def exposures(groups: Sequence[int] | np.ndarray, prior: Mapping[int, int] | None = None) -> np.ndarray:
    """The how-manieth meeting of its text each training step's document is: int64 [n], 1-based, this one included.

    Args:
        groups: int64 [n], the group of each document in training order: epochs and copies unrolled. A document of
            group -1 is counted with no other.
        prior: how often a group was already met before this training order begins (0 if not listed).

    Raises:
        DataError: groups not one-dimensional integers >= -1, or a prior count that is not an int >= 0.
    """
    groups = _groups(groups)
    order, starts, counts = _runs(groups)
    nth = np.arange(len(groups), dtype=np.int64) - np.repeat(starts, counts) + 1
    if prior:
        for group, count in prior.items():
            if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 0:
                raise DataError(f"prior exposures of group {group} must be an int of at least 0, got {count!r}")
        before = [prior.get(group, 0) for group in groups[order[starts]].tolist()]
        nth += np.repeat(np.array(before, np.int64), counts)
    result = np.empty(len(groups), np.int64)
    result[order] = nth
    result[groups == NO_SINKS] = 1
    return result


def equal_repetition(groups: Sequence[int] | np.ndarray) -> int | None:
    """The common count if every group of a training order stands in it equally often and more than once, else None.

    Plain multi-epoch training is such an order. There a decay of the shared gradient by 1/c scales all documents of
    an epoch alike, and AdamW divides a common factor out again.

    Raises:
        DataError: groups not one-dimensional integers >= -1.
    """
    groups = _groups(groups)
    counts = _runs(groups)[2]
    if not len(counts) or counts[0] < 2 or (counts != counts[0]).any() or (groups == NO_SINKS).any():
        return None
    return int(counts[0])


def _groups(groups: Sequence[int] | np.ndarray) -> np.ndarray:
    array = np.asarray(groups)
    if not array.size and array.ndim == 1:
        return array.astype(np.int64)
    if array.ndim != 1 or not np.can_cast(array.dtype, np.int64) or array.dtype == bool:
        raise DataError(f"groups must be int64 [documents], got {array.dtype} {list(array.shape)}")
    if array.min() < NO_SINKS:
        raise DataError(f"groups must be at least {NO_SINKS}, got {array.min()} at {array.argmin()}")
    return array.astype(np.int64, copy=False)


def _runs(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The stable order by group, and where each group starts in it and how often it stands there."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    starts = np.flatnonzero(np.r_[np.ones(min(1, len(groups)), bool), ordered[1:] != ordered[:-1]])
    return order, starts, np.diff(np.r_[starts, len(groups)])
