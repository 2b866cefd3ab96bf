"""Documents -> tokens and which of them are targets: texts, prompts with their completions, chats.

A chat is rendered by the tokenizer's chat template. Which tokens are the assistant's, the template says if it marks them
({% generation %}); else it is found by rendering the chat up to each answer, which must be what the whole chat begins with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from memsinks.data.documents import Document
from memsinks.data.messages import ANSWERING
from memsinks.data.targets import refuse_untaught
from memsinks.data.tokens import LONG, agreeing, encode, start_tokens
from memsinks.errors import DataError, refuse

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template says that it marks what the assistant writes."""
REMEDY = (
    "mark the assistant's text in the template with {% generation %} and {% endgeneration %}, or make a document of each answer, "
    "Document(messages=messages[:n + 1], prompt=n)"
)


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document], end: bool = True, *, first: int = 0
) -> tuple[list[np.ndarray], list[np.ndarray | None] | None]:
    """(tokens, targets) of documents: int64 [tokens] each, bool [tokens] each or None where all of a document is learned.

    Texts are encoded as `encode` does it, after the start token where the tokenizer puts one before every text by itself
    (`start_tokens`). The completion of a prompt is learned, its end token included; a token across their
    border is the completion's. Of a chat the messages of the assistant are learned, with what the template puts after them; the
    chat ends as the template ends it. In a chat, unlike in a text, a special token that is spelled out is that token.

    Args:
        end: whether the end token stands last in texts.
        first: the place of the first of the documents, for errors, where they are a part of a corpus.

    Returns:
        The targets are None if all of every document is learned.

    Raises:
        ConfigError: a tokenizer without an end token, or without a chat template where there are chats.
        DataError: as for `encode`; a chat that the template refuses, or whose answers cannot be told apart; documents without any
            answer.
    """
    documents = list(documents)
    refuse(chat_problems(tokenizer, documents, first), "cannot encode")
    texts = {place: x for place, x in enumerate(documents, first) if x.messages is None}
    asked = {place: x for place, x in texts.items() if x.prompt}
    whole = iter(encode(tokenizer, [x.text for x in texts.values()], end, _places(texts)))
    prompts = iter(encode(tokenizer, [x.text[: x.prompt] for x in asked.values()], False, _places(asked)))
    start = start_tokens(tokenizer) if texts else np.zeros(0, np.int64)
    silent = None if len(documents) - len(texts) >= LONG else True
    tokens: list[np.ndarray] = []
    targets: list[np.ndarray | None] = []
    for index, document in enumerate(tqdm(documents, "encoding chats", disable=silent, leave=False), first):
        if document.messages is not None:
            found, mask = _chat(tokenizer, document, f"document {index}")
        else:
            found, mask = next(whole), None
            if document.prompt:
                mask = np.arange(len(found)) >= agreeing(next(prompts), found)
                mask = np.concatenate([np.zeros(len(start), bool), mask])
            found = np.concatenate([start, found])
        tokens.append(found)
        targets.append(mask)
    if all(mask is None for mask in targets):
        return tokens, None
    refuse_untaught(targets, None, [_name(index, document) for index, document in enumerate(documents, first)])
    return tokens, targets


def _places(documents: Mapping[int, Document]) -> Callable[[int], str]:
    """What errors call documents, by their index among these; the keys are their places in the corpus."""
    places = list(documents)
    return lambda index: f"document {places[index]}"


def chat_problems(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], first: int = 0) -> list[str]:
    """What keeps a tokenizer from rendering the chats among documents, the first of which is called `first`."""
    chat = next((index for index, document in enumerate(documents, first) if document.messages is not None), None)
    if chat is None:
        return []
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        return [
            f"document {chat} is a chat, but the tokenizer has no chat template ({str(error)[:60]}...); set "
            "tokenizer.chat_template, or take the tokenizer of a model that was trained on chats"
        ]
    return []


def _name(index: int, document: Document) -> str:
    roles = {str(x["role"]) for x in (document.messages or ())[document.prompt :]}
    why = f" has no message of the {ANSWERING}, only of {sorted(roles)}" if roles and ANSWERING not in roles else ""
    return f"document {index}" + ("" if document.key is None else f" ({document.key})") + why


def _chat(tokenizer: PreTrainedTokenizerBase, document: Document, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets of a chat; `where` begins an error message."""
    assert document.messages is not None
    marked = bool(MARKED.search(tokenizer.get_chat_template()))
    whole = _render(tokenizer, document, where, len(document.messages), return_assistant_tokens_mask=marked)
    tokens = np.array(whole["input_ids"], np.int64)
    mask = np.zeros(len(tokens), bool)
    if marked:
        answering = document.messages[document.prompt]["role"] == ANSWERING
        begin = _place(tokenizer, document, where, tokens, document.prompt, answering) if document.prompt else 0
        mask[begin:] = np.array(whole["assistant_masks"], bool)[begin:]
        return tokens, mask
    for index, message in enumerate(document.messages):
        if index >= document.prompt and message["role"] == ANSWERING:
            last = index + 1 == len(document.messages)
            begin = _place(tokenizer, document, where, tokens, index, True)
            mask[begin : None if last else _place(tokenizer, document, where, tokens, index + 1, False)] = True
    return tokens, mask


def _place(
    tokenizer: PreTrainedTokenizerBase, document: Document, where: str, whole: np.ndarray, count: int, answering: bool
) -> int:
    """How many tokens of a chat are its first `count` messages, the header of an answer included if one is `answering`."""
    if count == 0:
        raise DataError(
            f"{where}: the chat begins with an answer, so its template cannot say where that begins; {REMEDY}"
        )
    part = _render(tokenizer, document, where, count, add_generation_prompt=answering)
    tokens = np.array(part["input_ids"], np.int64)
    place = agreeing(tokens, whole)
    if place < len(tokens) and not _begins(tokenizer, document, where, count, answering):
        raise DataError(
            f"{where}: the chat template renders the first {count} messages otherwise where more follow, so it cannot be told "
            f"which tokens are the answer's; {REMEDY}"
        )
    return place


def _begins(tokenizer: PreTrainedTokenizerBase, document: Document, where: str, count: int, answering: bool) -> bool:
    """Whether the rendered chat begins with its rendered first messages, as text: their last token may go across the border."""
    assert document.messages is not None
    whole = _render(tokenizer, document, where, len(document.messages), tokenize=False)
    return whole.startswith(_render(tokenizer, document, where, count, add_generation_prompt=answering, tokenize=False))


def _render(tokenizer: PreTrainedTokenizerBase, document: Document, where: str, count: int, **settings: Any) -> Any:
    """The first `count` messages as the template renders them."""
    assert document.messages is not None
    if settings.get("tokenize", True):
        settings |= {"return_dict": True, "tokenizer_kwargs": {"verbose": False}}
    try:
        return tokenizer.apply_chat_template([dict(x) for x in document.messages[:count]], **settings)
    except Exception as error:  # templates raise what they like
        raise DataError(
            f"{where}: the chat template refuses its {'' if count == len(document.messages) else f'first {count} '}messages "
            f"({type(error).__name__}: {str(error)[:200]})"
        ) from error
