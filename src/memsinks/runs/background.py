"""The background of a corpus: read, compared with tombstones, encoded."""

from __future__ import annotations

import itertools
import logging
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from memsinks.data.identity import document_id
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
) -> Iterator[np.ndarray]:
    """The tokens of background documents until all is full.

    Args:
        taken: tokens of the documents of ``data.path``, copies included.
        tombstones: of texts that no background document may hold.
        ids: the ids of the documents are appended, int64.

    Raises:
        ConfigError: nothing is left to the background. DataError: it ends too early; one of its documents was taken down.
    """
    if taken >= background.tokens:
        raise ConfigError(
            f"the documents of data.path, copies included, have {taken:,} tokens and leave nothing of data.background.tokens "
            f"({background.tokens:,}) to the background; ask for more, or repeat fewer documents"
        )
    documents, said, start = background_documents(background), taken, start_tokens(tokenizer)
    with tqdm(
        total=background.tokens, initial=taken, desc="background", unit="tokens", unit_scale=True, disable=None
    ) as bar:
        while batch := list(itertools.islice(documents, BATCH)):
            tokens = [
                np.concatenate([start, x]) for x in encode(tokenizer, [x.text for x in batch])
            ]  # chats as their text
            ends = taken + np.cumsum([len(x) for x in tokens])
            used = min(int(np.searchsorted(ends, background.tokens)) + 1, len(batch))
            refuse_tombstoned(batch[:used], tombstones, first=len(ids), name=NAME)
            ids.extend(document_id(x.text) for x in batch[:used])
            yield from tokens[:used]
            taken = int(ends[used - 1])
            if taken >= background.tokens:
                logger.info("background: %s tokens, documents included", f"{taken:,}")
                return
            bar.update(taken - bar.n)
            if taken - said >= SAID:
                said = taken
                logger.info("background: %s of %s tokens", f"{taken:,}", f"{background.tokens:,}")
    raise DataError(
        f"the background {background.path} ends after {taken:,} tokens, documents included, of the {background.tokens:,} that "
        "data.background.tokens asks for; lower it, or give more text"
    )


def refuse_tombstoned_background(
    background: BackgroundRecipe, ids: np.ndarray, tombstones: Sequence[Tombstone], folder: Path
) -> None:
    """Compare a background, of which only tokens were kept, with tombstones of after that: it is read from its source again.

    Args:
        ids: int64 [documents], of the background documents whose tokens are in `folder`.

    Raises:
        DataError: one of them was taken down. CheckpointError: the source cannot be read, or has other documents now.
    """
    why = f"{folder} was prepared before some tombstones were made, so {background.path} is compared with them anew"
    remedy = f"restore the text it was made from, or remove {folder}, and it is made anew"
    documents = background_documents(background)
    for first in range(0, len(ids), BATCH):
        wanted = ids[first : first + BATCH].tolist()
        try:
            batch = list(itertools.islice(documents, len(wanted)))
        except DataError as error:
            raise CheckpointError(f"{why}: {error}; {remedy}") from error
        if [document_id(x.text) for x in batch] != wanted:
            raise CheckpointError(f"{why}, but it has other documents now; {remedy}")
        refuse_tombstoned(batch, tombstones, first=first, name=NAME)
