"""The background of a corpus: read, compared with tombstones, encoded."""

from __future__ import annotations

import itertools
import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from memsinks.data.documents import Document
from memsinks.data.identity import document_id, identify
from memsinks.data.tokens import encode, start_tokens
from memsinks.errors import CheckpointError, ConfigError, DataError
from memsinks.removal.tombstone import Tombstone, refuse_tombstoned
from memsinks.runs.corpus import background_documents
from memsinks.runs.data_recipe import BackgroundRecipe

logger = logging.getLogger(__name__)

BATCH = 1000
"""Background documents that are read, compared and encoded at a time."""
SAID = 20_000_000
"""Background tokens from one line of progress to the next."""
NAME = "background document"


def background_tokens(
    background: BackgroundRecipe,
    taken: int,
    tokenizer: PreTrainedTokenizerBase,
    tombstones: Sequence[Tombstone],
    ids: array[int],
    known: Callable[[str], bool],
    left_out: array[int],
) -> Iterator[np.ndarray]:
    """The tokens of background documents until all is full.

    Args:
        taken: tokens of the documents of ``data.path``, copies included.
        tombstones: of texts that no background document may hold.
        ids: the ids of the documents are appended, int64.
        known: which texts are left out, those of ``data.path``.
        left_out: the places of the documents that are left out are appended.

    Raises:
        ConfigError: nothing is left to the background. DataError: it ends too early; one of its documents was taken down.
    """
    if taken >= background.tokens:
        raise ConfigError(
            f"the documents of data.path, copies included, have {taken:,} tokens and leave nothing of data.background.tokens "
            f"({background.tokens:,}) to the background; ask for more, or repeat fewer documents"
        )
    said, start = taken, start_tokens(tokenizer)
    with tqdm(
        total=background.tokens, initial=taken, desc="background", unit="tokens", unit_scale=True, disable=None
    ) as bar:
        for first, batch, kept in _batches(background, known):
            texts = [batch[index].text for index in kept]  # chats as their text
            places = [f"{NAME} {first + index}" for index in kept]
            tokens = [np.concatenate([start, x]) for x in encode(tokenizer, texts, name=places.__getitem__)]
            ends = taken + np.cumsum([len(x) for x in tokens], dtype=np.int64)
            used = min(int(np.searchsorted(ends, background.tokens)) + 1, len(kept))
            full = used > 0 and ends[used - 1] >= background.tokens
            read = kept[used - 1] + 1 if full else len(batch)
            refuse_tombstoned(batch[:read], tombstones, first=first, name=NAME)
            ids.extend(document_id(text) for text in texts[:used])
            left_out.extend(first + index for index in sorted({*range(read)} - {*kept}))
            yield from tokens[:used]
            taken = int(ends[used - 1]) if used else taken
            if full:
                if left_out:
                    logger.info(
                        "background: %s documents are left out: data.path has their texts", f"{len(left_out):,}"
                    )
                logger.info("background: %s tokens, documents included", f"{taken:,}")
                return
            bar.update(taken - bar.n)
            if taken - said >= SAID:
                said = taken
                logger.info("background: %s of %s tokens", f"{taken:,}", f"{background.tokens:,}")
    without = f" ({len(left_out):,} of its documents are left out: data.path has their texts)" if left_out else ""
    raise DataError(
        f"the background {background.path} ends after {taken:,} tokens, documents included, of the {background.tokens:,} that "
        f"data.background.tokens asks for{without}; lower it, or give more text"
    )


def _batches(
    background: BackgroundRecipe, known: Callable[[str], bool]
) -> Iterator[tuple[int, list[Document], list[int]]]:
    """(the place of the first, documents, which of them are not left out), `BATCH` at a time."""
    documents, first = background_documents(background), 0
    while batch := list(itertools.islice(documents, BATCH)):
        yield first, batch, [index for index, document in enumerate(batch) if not known(document.text)]
        first += len(batch)


def refuse_shared(others: Sequence[Document], background: np.ndarray, folder: Path) -> None:
    """Refuse a folder from before such texts were left out of the background, whose ids are given, if it has any."""
    shared = np.isin(background, identify(others)[0]).sum()
    if shared:
        raise CheckpointError(
            f"{folder} was prepared when the background could hold texts of data.path, and {shared} of its documents do; remove "
            "it and start anew, for a run that has begun cannot go on with other data"
        )


def refuse_tombstoned_background(
    background: BackgroundRecipe,
    ids: np.ndarray,
    tombstones: Sequence[Tombstone],
    folder: Path,
    known: Callable[[str], bool],
) -> None:
    """Compare a background, of which only tokens were kept, with tombstones of after that: it is read from its source again.

    Args:
        ids: int64 [documents], of the background documents whose tokens are in `folder`.
        known: which texts were left out.

    Raises:
        DataError: one of them was taken down. CheckpointError: the source cannot be read, or has other documents now.
    """
    why = f"{folder} was prepared before some tombstones were made, so {background.path} is compared with them anew"
    remedy = f"restore the text it was made from, or remove {folder}, and it is made anew"
    batches, done = _batches(background, known), 0
    while done < len(ids):
        try:
            first, batch, kept = next(batches, (0, [], []))
        except DataError as error:
            raise CheckpointError(f"{why}: {error}; {remedy}") from error
        kept = kept[: len(ids) - done]
        found = [document_id(batch[index].text) for index in kept]
        if not batch or found != ids[done : done + len(kept)].tolist():
            raise CheckpointError(f"{why}, but it has other documents now; {remedy}")
        done += len(kept)
        read = kept[-1] + 1 if done == len(ids) else len(batch)
        refuse_tombstoned(batch[:read], tombstones, first=first, name=NAME)
