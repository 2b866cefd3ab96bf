"""Texts -> tokens: train a small byte-level tokenizer, load any fast one, encode documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from memsinks.checks import int_at_least
from memsinks.data.documents import utf8
from memsinks.errors import ConfigError, DataError, refuse

END = "<|endoftext|>"
LEAST_VOCABULARY = 257
"""256 bytes and `END`."""
_BATCH = 1000
OF_LOADING = ("is_local", "local_files_only")
"""What transformers notes in a tokenizer of how it was loaded, and would write."""
LONG = 20_000
"""Texts from which encoding shows a progress bar."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that decodes to exactly the text encoded.

    Digits are split one by one, so that numbers are not memorized as tokens. `END` is the end, start and padding token
    and has id 0. Few texts may give fewer tokens than `vocab_size`; see ``len(tokenizer)``.

    Raises:
        ConfigError: `vocab_size` below 257 (256 bytes and `END`).
        DataError: no text.
    """
    refuse(int_at_least("vocab_size", vocab_size, LEAST_VOCABULARY), f"a byte-level tokenizer has 256 bytes and {END}")
    texts = _texts(texts)
    if not any(texts):
        raise DataError("there is no text to train a tokenizer on: the corpus is empty")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path_or_name: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer: a Hugging Face folder or name, or a single JSON file of the `tokenizers` library.

    A tokenizer that names no end token (a JSON file never does) ends documents with `END` if that is in its
    vocabulary. One that names no padding token pads with its end token.

    Raises:
        ConfigError: not found, not readable, or no end token to be found.
    """
    path = Path(path_or_name)
    try:
        if path.is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), clean_up_tokenization_spaces=False)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(path_or_name))
    except Exception as error:  # tokenizers raises bare Exception, AutoTokenizer half a dozen types
        raise ConfigError(
            f"cannot load a tokenizer from {str(path_or_name)!r} ({type(error).__name__}: {str(error)[:200]}); give a "
            "tokenizer folder, a tokenizer JSON file, or a name that can be downloaded"
        ) from error
    if tokenizer.eos_token_id is None:
        if END not in tokenizer.get_vocab():
            raise ConfigError(
                f"the tokenizer {str(path_or_name)!r} names no end token and has no {END}; give a tokenizer folder "
                "whose tokenizer_config.json names its eos_token"
            )
        tokenizer.eos_token = END
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a tokenizer's files into a folder, the same bytes wherever it was loaded from; OSError if they cannot be written."""
    held = {name: tokenizer.init_kwargs.pop(name) for name in OF_LOADING if name in tokenizer.init_kwargs}
    try:
        tokenizer.save_pretrained(str(folder))
    except OSError:
        raise
    except Exception as error:  # what tokenizers raises when the disk is full
        raise OSError(f"the tokenizer cannot be written into {folder}: {error}") from error
    finally:
        tokenizer.init_kwargs.update(held)


def has_tokenizer(folder: str | Path) -> bool:
    """Whether files of a tokenizer lie in a folder, whole or not."""
    patterns = ("tokenizer*", "vocab.*", "merges.txt", "spiece.model", "sentencepiece*", "special_tokens_map.json")
    return any(next(Path(folder).glob(pattern), None) for pattern in patterns)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    end: bool = True,
    name: Callable[[int], str] | None = None,
) -> list[np.ndarray]:
    """Tokens of each text: int64 [tokens of the document] each; with `end`, the end token stands last and only there.

    No other special token is added (`encode_documents` adds the start token), and one spelled out in a text is encoded as the
    characters it is spelled with.

    Args:
        name: what an error calls the text of an index; None = "document 0", "document 1", ...

    Raises:
        DataError: an item that is not str, has lone surrogates (no UTF-8 form), or gives no tokens; names its index.
        ConfigError: no tokenizer of transformers, or `end` with one that has no end token.
    """
    name = name or "document {}".format
    texts = _texts(texts, name)
    refuse(encoding_problems(tokenizer, end), "cannot encode")
    last = [tokenizer.eos_token_id] if end else []
    result: list[np.ndarray] = []
    silent = None if len(texts) >= LONG else True
    for start in tqdm(range(0, len(texts), _BATCH), "encoding, 1000 texts each", disable=silent, leave=False):
        for tokens in _encoded(tokenizer, texts[start : start + _BATCH]):
            if not len(tokens):
                raise DataError(f"{name(len(result))} ({texts[len(result)]!r:.80}) gives no tokens; leave it out")
            result.append(np.array(tokens + last, np.int64))
    return result


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The start token, int64 [1], where the tokenizer puts one before every text by itself (Llama, Gemma); else [0].

    A model that was trained with it must read and be scored with it: without, its losses are those of another model.
    """
    first = tokenizer("a")["input_ids"][:1]
    return np.array(first if first == [tokenizer.bos_token_id] else [], np.int64)


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The tokens of texts without special ones.

    A tokenizer that adds nothing to that of `tokenizers` is asked there, for the ids alone: a tenth faster.
    """
    kind = type(tokenizer)
    plain = isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, None)
        for name in ("__call__", "_encode_plus")
    )
    if plain:
        backend: Any = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return [x.ids for x in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]


def agreeing(prompt: np.ndarray, tokens: np.ndarray) -> int:
    """How many tokens of a document are those of a prompt that it begins with: one across the border belongs to the rest."""
    both = min(len(prompt), len(tokens))
    return int((prompt[:both] == tokens[:both]).cumprod().sum())


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills rows up: the tokenizer's padding token, or its end token where it names none.

    Raises:
        ConfigError: it names neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise ConfigError("the tokenizer names neither a padding nor an end token; set tokenizer.pad_token")


def encoding_problems(tokenizer: PreTrainedTokenizerBase, end: bool = True) -> list[str]:
    """What keeps a tokenizer from encoding documents."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return [f"the tokenizer must be one of transformers, got {type(tokenizer).__name__}; see load_tokenizer"]
    if end and tokenizer.eos_token_id is None:
        return ["the tokenizer has no end token; set tokenizer.eos_token, or encode with end=False"]
    return []


def token_offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """Where each token that `encode` gives stands in the text, in characters: [start, end); without the end token."""
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    return encoded["offset_mapping"]


def _texts(texts: Iterable[str], name: Callable[[int], str] = "document {}".format) -> list[str]:
    if isinstance(texts, str):
        raise DataError("texts must be a list of str, got one str; put it into a list")
    texts = list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{name(index)} must be str, got {type(text).__name__}: {text!r:.80}")
        utf8(text, name(index))
    return texts
