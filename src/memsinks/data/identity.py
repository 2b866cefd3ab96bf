"""Document -> 63-bit id, the text it is, and the exposure numbers of a training order.

Two numbers belong to a document and are kept apart. The *document id* says which sinks to open; the *group* says which
text it is, so that meetings of a text can be counted. They differ when the sinks belong to a source (all documents of
a site open the same sinks) while repetition is still counted text by text.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from memsinks.batch import NO_SINKS, as_int64, is_id
from memsinks.checks import int_at_least, is_int, one_of
from memsinks.data.documents import Document, utf8
from memsinks.errors import DataError, refuse

By = Literal["content", "key", "source", "cluster"]
"""What gives a document its id: its text, its owner's name for it, where it comes from, or the near copies that it is one of."""

BY = get_args(By)

NEAR_COPIES = 20
"""So many different texts with one key are more than near copies of one text."""

# blake2b's personalization: at most 16 bytes. Changing one changes every id that was ever written.
_PERSON = {by: b"memsinks1" + by.encode() for by in BY}


def document_id(text_or_key: str | bytes, by: By = "content") -> int:
    """The 63-bit id of a text, a key or a source: the same on every machine and in every version, about 1 us.

    blake2b over the UTF-8 bytes exactly as given: nothing is stripped and Unicode is not normalized, so "ü" composed
    and decomposed are two texts. Text, key, source and cluster never share ids. P(any two of 1e8 documents
    collide) is about 5e-4.

    Args:
        text_or_key: the text, the key, the source or the name of the cluster.
        by: which of them it is.

    Raises:
        DataError: neither str nor bytes, or a str with lone surrogates, which has no UTF-8 form.
        ConfigError: an unknown `by`.
    """
    if by not in BY:
        refuse(one_of("by", by, BY), "cannot make an id")
    if isinstance(text_or_key, str):
        data = utf8(text_or_key, f"the {by}")
    elif isinstance(text_or_key, bytes):
        data = text_or_key
    else:
        raise DataError(f"the {by} must be str or bytes, got {type(text_or_key).__name__}: {text_or_key!r:.80}")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=_PERSON[by]).digest(), "little") & (2**63 - 1)


def identify(documents: Iterable[Document], by: By = "content", *, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(document_ids, groups) of documents, int64 [n] each, in the order given; `copies` is not unrolled.

    Args:
        documents: the documents.
        by: ``"content"``: id and group come from the text, exact copies share both. ``"key"``: both come from the key;
            give near copies one key and they are one group. ``"source"``: the id comes from the source, the group from
            the text. ``"cluster"``: both come from the cluster, see `cluster_documents`; a document without one is like no
            other, and its text names its cluster.
        first: the place of the first of the documents, for errors, where they are a part of a corpus.

    Warns:
        UserWarning: one key stands for `NEAR_COPIES` different texts or more, which would count as one repeated text.

    Raises:
        DataError: a document without the key or source asked for (missing or empty), or as for `document_id`; names
            its index.
        ConfigError: an unknown `by`.
    """
    refuse(one_of("by", by, BY), "cannot identify documents")
    documents = list(documents)
    ids = np.empty(len(documents), np.int64)
    groups = np.empty(len(documents), np.int64)
    for index, document in enumerate(documents):
        name = document.text if by == "content" else getattr(document, by)
        if by == "cluster" and not name:
            name = document.text
        if not name and by != "content":
            raise DataError(f'document {first + index} has no {by}; give every document one or identify by="content"')
        try:
            ids[index] = document_id(name, by)
            groups[index] = document_id(document.text) if by == "source" else ids[index]
        except DataError as error:
            raise DataError(f"document {first + index}: {error}") from error
    if by == "key":
        _warn_of_shared_keys(documents)
    return ids, groups


def _warn_of_shared_keys(documents: list[Document]) -> None:
    texts: dict[str | None, set[str]] = {}
    for document in documents:
        texts.setdefault(document.key, set()).add(document.text)
    key = max(texts, key=lambda key: len(texts[key]), default=None)
    if key is not None and len(texts[key]) >= NEAR_COPIES:
        shared = sum(len(x) > 1 for x in texts.values())
        warnings.warn(
            f"the key {key!r} stands for {len(texts[key])} different texts ({shared} of {len(texts)} keys stand for several): "
            "they share their sinks, and the second already counts as a repetition of the first; give only near copies one "
            'key, identify by="source" to share sinks alone, or by="content"',
            stacklevel=3,
        )


def training_order(documents: Iterable[Document], seed: int = 0, epochs: int = 1) -> list[int]:
    """Indices into `documents` in the order of training: each one `copies` times per epoch, every epoch shuffled anew.

    Documents with 0 copies are left out. The global random state is neither used nor changed.

    Raises:
        ConfigError: fewer than 1 epoch.
        DataError: no document has copies above 0, or one has not a whole number of at least 0.
    """
    return order_of([document.copies for document in documents], seed, epochs)


def order_of(copies: Iterable[int], seed: int = 0, epochs: int = 1) -> list[int]:
    """`training_order` of documents of which only the numbers of copies are given."""
    refuse(int_at_least("epochs", epochs, 1), "cannot order documents")
    copies = list(copies)
    check_copies(copies)
    once = [index for index, number in enumerate(copies) for _ in range(number)]
    rng = random.Random(f"training order {seed}")
    order = []
    for _ in range(epochs):
        rng.shuffle(once)
        order += once
    return order


def check_copies(copies: Sequence[int]) -> None:
    """DataError unless all are integers of at least 0, and one is above."""
    wrong = [f"document {index} has {x!r}" for index, x in enumerate(copies) if not is_int(x) or x < 0]
    if wrong:
        raise DataError(f"copies must be integers of at least 0: {_some(wrong)}")
    if not any(copies):
        raise DataError(f"none of the {len(copies)} documents has copies above 0; there is nothing to train on")


def exposures(groups: Iterable[int] | np.ndarray, prior: Mapping[int, int] | None = None) -> np.ndarray:
    """How many times each document's text has been met so far in the training order, this time included: int64 [n].

    Args:
        groups: int64 [n], the group of each document in training order: epochs and copies unrolled. A document of
            group -1 is counted with no other.
        prior: how often a group was already met before this training order begins (0 if not listed).

    Raises:
        DataError: groups not one-dimensional integers >= -1, or rounded by floats; a prior count that is not an int >= 0,
            or one of a group that is no int.
    """
    groups = as_int64(groups, "groups", NO_SINKS, narrow=True)
    order, starts, counts = _runs(groups)
    nth = np.arange(len(groups), dtype=np.int64) - np.repeat(starts, counts) + 1
    if prior is not None:
        check_prior(prior)
        before = [prior.get(group, 0) for group in groups[order[starts]].tolist()]
        nth += np.repeat(np.array(before, np.int64), counts)
    result = np.empty(len(groups), np.int64)
    result[order] = nth
    result[groups == NO_SINKS] = 1
    return result


def check_prior(prior: Mapping[int, int]) -> None:
    """DataError for what `exposures` would refuse."""
    if not isinstance(prior, Mapping):
        raise DataError(f"prior must map groups to counts, got {type(prior).__name__}")
    problems = []
    for group, count in prior.items():
        if not is_id(group, or_none=True):
            problems.append(f"{group!r} is no group")
        elif not is_int(count) or count < 0:
            problems.append(f"the count of group {group} must be an int of at least 0, got {count!r}")
    if problems:
        raise DataError(
            f"prior must map groups, int64 as `identify` gives them, to counts: {_some(problems)} (JSON makes strings of "
            "keys: read them back with int())"
        )
    as_int64(list(prior), "groups of prior", NO_SINKS)


def _some(problems: list[str]) -> str:
    return ", ".join(problems[:5]) + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")


def equal_repetition(groups: Iterable[int] | np.ndarray) -> int | None:
    """The common count if every group of a training order stands in it equally often and more than once, else None.

    Plain multi-epoch training is such an order. There a decay of the shared gradient by 1/c scales all documents of
    an epoch alike, and AdamW divides a common factor out again.

    Raises:
        DataError: groups not one-dimensional integers >= -1.
    """
    groups = as_int64(groups, "groups", NO_SINKS, narrow=True)
    counts = _runs(groups)[2]
    if not len(counts) or counts[0] < 2 or (counts != counts[0]).any() or (groups == NO_SINKS).any():
        return None
    return int(counts[0])


def _runs(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The stable order by group, and where each group starts in it and how often it stands there."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    starts = np.flatnonzero(np.r_[np.ones(min(1, len(groups)), bool), ordered[1:] != ordered[:-1]])
    return order, starts, np.diff(np.r_[starts, len(groups)])
