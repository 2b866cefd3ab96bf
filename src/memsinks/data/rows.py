"""Documents -> rows in one call; and its pieces, which the preparation of a run puts together another way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from memsinks.checks import int_at_least, one_of
from memsinks.data.chat import chat_problems, encode_documents
from memsinks.data.documents import Document, as_documents
from memsinks.data.identity import BY, By, check_copies, check_prior, exposures, identify, order_of
from memsinks.data.isolation import isolation_of
from memsinks.data.packing import Long, Rows, pack, packing_problems
from memsinks.data.stored import StoredCorpus
from memsinks.data.targets import refuse_untaught
from memsinks.data.token_store import StoredTokens
from memsinks.data.tokenized import TokenizedDocuments
from memsinks.data.tokens import encoding_problems, pad_token
from memsinks.errors import refuse


def make_rows(
    documents: Iterable[Document | str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    seed: int = 0,
    epochs: int = 1,
    by: By | None = None,
    prior: Mapping[int, int] | None = None,
    pad_id: int | None = None,
    apart_from: int | None = 2,
    one_document_per_row: bool = False,
    long: Long = "split",
) -> Rows:
    """Documents -> identity -> tokens -> training order -> exposures -> rows, to be trained on in their order, once.

    Args:
        documents: documents, or texts that stand in the corpus once each; or a `StoredCorpus`, whose tokens stay on disk. Those
            with 0 copies are in no row.
        tokenizer: each document is encoded once. A text ends with its end token, a chat as its chat template ends it; of chats
            and of prompts with completions the answers alone are targets, see `chat.encode_documents`.
        length: tokens per row.
        seed, epochs: every document as often as it has copies, shuffled anew in each epoch, see `training_order`. The rows
            hold all epochs.
        by: what gives a document its id, see `identify`; None = its content, or what a `StoredCorpus` was made with.
        prior: how often a group was already met before these rows, see `exposures`.
        pad_id: the token that fills rows up; None = the tokenizer's padding token, or its end token.
        apart_from, one_document_per_row, long: see `pack`. In exact mode (``shared="none"``, the default of `SinkConfig`) rows
            that open sinks must be apart: ``apart_from=config.open_from``, which is 2 unless it is set.

    Raises:
        ConfigError: settings out of range, all at once.
        DataError: documents, counts or texts that give no rows; names the first ones. Both before any text is encoded.
    """
    stored = documents if isinstance(documents, StoredCorpus) else None
    given = [] if stored is not None else as_documents(documents)
    problems = encoding_problems(tokenizer) or chat_problems(tokenizer, given)
    pad_id = pad_token(tokenizer) if pad_id is None and not problems else pad_id
    problems += packing_problems(length, 0 if pad_id is None else pad_id, apart_from, long)
    problems += int_at_least("epochs", epochs, 1) + one_of("by", by, (*BY, None))
    refuse(problems, "cannot make rows")
    check_prior({} if prior is None else prior)
    if stored is not None:
        stored.require_tokenizer(tokenizer)
    return rows_of(
        _tokenized(given, tokenizer, by or "content") if stored is None else stored.tokenized(by),
        seed=seed,
        epochs=epochs,
        prior=prior,
        length=length,
        pad_id=pad_id,
        apart_from=apart_from,
        one_document_per_row=one_document_per_row,
        long=long,
    )


def _tokenized(documents: list[Document], tokenizer: PreTrainedTokenizerBase, by: By) -> TokenizedDocuments:
    check_copies([document.copies for document in documents])
    ids, groups = identify(documents, by)
    tokens, targets = encode_documents(tokenizer, documents)
    copies = np.array([document.copies for document in documents], np.int64)
    return TokenizedDocuments(tokens, ids, groups, copies, isolation_of(documents), targets)


def rows_of(
    documents: TokenizedDocuments, *, seed: int, epochs: int, prior: Mapping[int, int] | None = None, **packing: Any
) -> Rows:
    """The rows of `documents` in training order; `packing` are the settings of `pack`."""
    masks = documents.targets
    if masks is not None and packing.get("long") == "truncate":
        refuse_untaught(masks, packing["length"])
    order = np.array(order_of(documents.copies.tolist(), seed, epochs), np.int64)
    tokens, counts = documents.tokens, exposures(documents.groups[order], prior)
    met = tokens.in_order(order) if isinstance(tokens, StoredTokens) else [tokens[index] for index in order.tolist()]
    isolation = None if documents.isolation is None else documents.isolation[order]
    targets = None if masks is None else [masks[index] for index in order.tolist()]
    return pack(met, documents.ids[order], counts, isolation=isolation, targets=targets, **packing)
