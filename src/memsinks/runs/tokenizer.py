"""The tokenizer that a recipe names, or a new one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from memsinks.data.documents import Document
from memsinks.data.stored import TOKENIZER
from memsinks.data.tokens import load_tokenizer, train_tokenizer
from memsinks.runs.corpus import background_documents, expanded
from memsinks.runs.recipe import Recipe, TokenizerRecipe

TAUGHT = 10_000
"""Documents of a background, or of a corpus on disk, that a new tokenizer is trained on."""


def load_tokenizer_of(
    recipe: Recipe, members: Sequence[Document], known: Callable[[str], bool] = lambda _: False
) -> PreTrainedTokenizerBase:
    """The tokenizer that a recipe names, or a new one, trained on the members and the beginning of the background.

    Args:
        known: which texts the background leaves out.
    """
    if recipe.tokenizer.path is not None:
        return load_tokenizer(expanded(recipe.tokenizer.path, "tokenizer.path"))
    assert recipe.tokenizer.vocab_size is not None
    texts: list[str] = [document.text for document in members]
    if recipe.data.background is not None:
        others = (x.text for x in background_documents(recipe.data.background) if not known(x.text))
        texts += itertools.islice(others, TAUGHT)
    return train_tokenizer(texts, recipe.tokenizer.vocab_size)


def tokenizer_of_corpus(
    tokenizer: TokenizerRecipe, documents: Callable[[], Iterable[Document]], out: Path
) -> PreTrainedTokenizerBase:
    """The tokenizer of a corpus on disk: the one that is named, or a new one, trained on its first documents, made once."""
    if tokenizer.path is not None:
        return load_tokenizer(expanded(tokenizer.path, "tokenizer.path"))
    if (out / TOKENIZER).is_dir():
        return load_tokenizer(out / TOKENIZER)
    assert tokenizer.vocab_size is not None
    return train_tokenizer((x.text for x in itertools.islice(documents(), TAUGHT)), tokenizer.vocab_size)
