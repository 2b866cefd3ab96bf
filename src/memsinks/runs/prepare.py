"""The corpus of a run: documents -> tokens -> rows; in memory, or in a folder that many runs share.

folder/tokens.bin       int32, the tokens of every document once, members first, then the background
folder/index.npz        offsets, document ids, groups and copies, int64
folder/members.jsonl    the documents of data.path that are trained on; folder/controls.jsonl the held-out ones;
                        folder/unseen.jsonl those set aside for settling
folder/tokenizer/       the tokenizer
folder/data.json        the settings it was made from, counts, SHA-256 of tokens.bin

Rows are cut from these tokens when they are asked for, so memory follows the number of documents (about 100 bytes each),
not their length.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import warnings
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedTokenizerBase

from memsinks.data.documents import Document, cut_documents, require_unique_keys, write_documents
from memsinks.data.identity import document_id, equal_repetition, exposures, identify, order_of
from memsinks.data.packing import Rows, pack
from memsinks.data.readers import read_documents
from memsinks.data.synthetic import corpus
from memsinks.data.token_store import StoredTokens, write_tokens
from memsinks.data.tokens import encode, load_tokenizer, train_tokenizer
from memsinks.errors import CheckpointError, ConfigError, DataError
from memsinks.files import file_hash, written_beside
from memsinks.runs.recipe import BackgroundRecipe, DataRecipe, Recipe
from memsinks.runs.sections import differing
from memsinks.sinks.families import ISOLATES_PACKED

AUDITED = "audited"
"""The kind of the documents that ``data.repeat`` chose."""

FACTS = "data.json"
BATCH = 1000
"""Background documents that are read and encoded at a time."""
TAUGHT = 10_000
"""Background documents that a new tokenizer is trained on, besides the documents themselves."""


@dataclass(frozen=True)
class Corpus:
    """Documents as tokens, each once: the members, then the background.

    Attributes:
        tokens: integer [tokens] each.
        ids, groups, copies: int64 [documents].
        members: the documents of ``data.path`` that are trained on.
        controls: those held out.
        unseen: those set aside for settling.
    """

    tokens: Sequence[np.ndarray]
    ids: np.ndarray
    groups: np.ndarray
    copies: np.ndarray
    members: list[Document]
    controls: list[Document]
    unseen: list[Document]
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """The corpus of a run: training rows, the documents in them, the held-out documents, the tokenizer.

    `members` are those of ``data.path``; a background is in the rows only. `unseen`: rows of the texts set aside for
    settling, one text (or piece) a row; None if there are none.
    """

    rows: Rows
    members: list[Document]
    controls: list[Document]
    unseen: Rows | None
    tokenizer: PreTrainedTokenizerBase


def prepare(recipe: Recipe, one_document_per_row: bool = False, folder: Path | None = None) -> Prepared:
    """Documents -> identity -> training order -> exposures -> rows.

    Args:
        one_document_per_row: what is done where the recipe leaves it open.
        folder: keep the tokens there; what lies there already is used. None = keep them in memory.

    Raises:
        ConfigError, DataError: settings or documents that give no rows.
        CheckpointError: `folder` was made from other settings, is damaged or cannot be written.
    """
    data, training = recipe.data, recipe.training
    found = _read(recipe) if folder is None else _stored(recipe, folder)
    order = np.array(order_of(found.copies.tolist(), training.seed, training.epochs), np.int64)
    met = found.groups[order]
    same = equal_repetition(met)
    if same and recipe.sinks and recipe.sinks.shared == "decay" and recipe.sinks.shared_decay:
        warnings.warn(
            f"every document is met {same} times: w(c) is then nearly the same for all tokens of a step, and AdamW divides "
            "a common factor out, so shared_decay does little (plain multi-epoch training)",
            stacklevel=2,
        )
    own = one_document_per_row if data.one_document_per_row is None else data.one_document_per_row
    tokens = found.tokens
    rows = pack(
        tokens.in_order(order) if isinstance(tokens, StoredTokens) else [tokens[index] for index in order],
        found.ids[order],
        exposures(met),
        length=training.length,
        pad_id=int(found.tokenizer.pad_token_id),  # type: ignore[arg-type]
        apart_from=recipe.sinks.open_from if recipe.sinks and recipe.sinks.shared == "none" else None,
        one_document_per_row=own or _model_type(recipe) not in ISOLATES_PACKED,
        long=data.long,
    )
    if len(rows) < training.batch_rows:
        raise DataError(f"the corpus fills {len(rows)} rows, one step needs {training.batch_rows}; lower batch_rows")
    return Prepared(rows, found.members, found.controls, _unseen_rows(found, recipe), found.tokenizer)


def _unseen_rows(found: Corpus, recipe: Recipe) -> Rows | None:
    if not found.unseen:
        return None
    rows = pack(
        encode(found.tokenizer, [x.text for x in found.unseen]), identify(found.unseen)[0], [1] * len(found.unseen),
        length=recipe.training.length, pad_id=int(found.tokenizer.pad_token_id), one_document_per_row=True,  # type: ignore
        long="split" if recipe.data.long == "fill" else recipe.data.long,
    )  # fmt: skip
    longer = rows.segments[rows.segments["size"] > 1]
    return replace(rows, segments=longer, first=np.arange(len(longer) + 1))


def choose_documents(data: DataRecipe, seed: int) -> tuple[list[Document], list[Document]]:
    """Read the documents and give each its number of copies, held-out documents 0; and those set aside as unseen.

    Which are set aside hangs neither on the seed nor on anything else, and without them the others are chosen the same way.
    """
    unseen: list[Document] = []
    if data.path is None:
        documents = corpus(**data.synthetic)
    else:
        found = read_documents(
            _expanded(data.path, "data.path"), text_field=data.text_field, key_field=data.key_field,
            source_field=data.source_field, copies_field=data.copies_field, separator=data.separator, split=data.split,
            streaming=data.streaming,
        )  # fmt: skip
        if data.cut_characters is not None:
            found = cut_documents(found, data.cut_characters)
        documents = list(itertools.islice(found, None if data.limit is None else data.limit + data.unseen))
        trained = len(documents) - data.unseen
        if data.unseen and trained < (data.limit or 1):
            wanted = "leaves none" if data.limit is None else f"after data.limit ({data.limit}) is more than there is"
            raise ConfigError(f"data.unseen ({data.unseen}) {wanted} of {len(documents)} documents; lower it")
        documents, unseen = documents[:trained], documents[trained:]
        known = {document.text for document in documents}
        unseen = [replace(document, copies=0) for document in unseen if document.text not in known]
    if data.unique_keys:
        require_unique_keys(documents)
    rng = random.Random(seed)
    order = [index for index, document in enumerate(documents) if document.copies > 0]
    rng.shuffle(order)
    # A text that stands in the corpus twice cannot be held out by taking one of them.
    times = Counter(document.text for document in documents)
    held_out = [index for index in order if times[documents[index].text] == 1][: data.held_out]
    chosen = set(held_out)
    rest = [index for index in order if index not in chosen]
    repeated = data.repeat.documents if data.repeat else 0
    once = 0 if data.background else 1
    if len(held_out) < data.held_out or repeated > len(rest) - once:
        raise ConfigError(
            f"held_out ({data.held_out}) and repeat.documents ({repeated}) leave none of {len(order)} documents "
            f"({len(times)} different texts) to be seen once; lower them"
        )
    for index in held_out:
        documents[index] = replace(documents[index], copies=0)
    if data.repeat:
        copies = data.repeat.copies if isinstance(data.repeat.copies, list) else [data.repeat.copies]
        for place, index in enumerate(rest[:repeated]):
            documents[index] = replace(documents[index], copies=copies[place % len(copies)], kind=AUDITED)
    return documents, unseen


def _read(recipe: Recipe, file: Path | None = None) -> Corpus:
    """The corpus from its sources; its tokens are written to `file` as they come, or kept in memory."""
    data, seed = recipe.data, recipe.training.seed
    documents, unseen = choose_documents(data, seed)
    members = [document for document in documents if document.copies > 0]
    controls = [document for document in documents if document.copies == 0]
    tokenizer = load_tokenizer_of(recipe, members)
    member_ids, member_groups = identify(members, data.by)
    tokens = encode(tokenizer, [document.text for document in members])
    more_ids = array("q")
    everything: Iterator[np.ndarray] = iter(tokens)
    if data.background is not None:
        taken = sum(len(x) * document.copies for x, document in zip(tokens, members, strict=True))
        everything = itertools.chain(tokens, _background(data.background, taken, tokenizer, more_ids))
    kept: Sequence[np.ndarray]
    if file is None:
        kept = list(everything)
    else:
        kept = StoredTokens(file, write_tokens(file, everything))
    background = np.array(more_ids, np.int64)
    copies = np.array([document.copies for document in members], np.int64)
    return Corpus(
        kept, np.r_[member_ids, background], np.r_[member_groups, background], np.r_[copies, np.ones_like(background)],
        members, controls, unseen, tokenizer,
    )  # fmt: skip


def load_tokenizer_of(recipe: Recipe, members: Sequence[Document]) -> PreTrainedTokenizerBase:
    if recipe.tokenizer.path is not None:
        return load_tokenizer(_expanded(recipe.tokenizer.path, "tokenizer.path"))
    assert recipe.tokenizer.vocab_size is not None
    texts: list[str] = [document.text for document in members]
    if recipe.data.background is not None:
        texts += [x.text for x in itertools.islice(_background_documents(recipe.data.background), TAUGHT)]
    return train_tokenizer(texts, recipe.tokenizer.vocab_size)


def _background_documents(background: BackgroundRecipe) -> Iterator[Document]:
    return read_documents(
        _expanded(background.path, "data.background.path"), text_field=background.text_field,
        separator=background.separator, split=background.split, streaming=background.streaming,
    )  # fmt: skip


def _background(
    background: BackgroundRecipe, taken: int, tokenizer: PreTrainedTokenizerBase, ids: array[int]
) -> Iterator[np.ndarray]:
    """The tokens of background documents until all is full; their ids are appended to `ids`."""
    if taken >= background.tokens:
        raise ConfigError(
            f"the documents of data.path, copies included, have {taken:,} tokens and leave nothing of data.background.tokens "
            f"({background.tokens:,}) to the background; ask for more, or repeat fewer documents"
        )
    documents, told = _background_documents(background), taken
    while batch := list(itertools.islice(documents, BATCH)):
        for document, tokens in zip(batch, encode(tokenizer, [x.text for x in batch]), strict=True):
            ids.append(document_id(document.text))
            yield tokens
            taken += len(tokens)
            if taken >= background.tokens:
                return
        if taken - told >= 20_000_000:
            told = taken
            print(f"background: {taken:,} of {background.tokens:,} tokens", flush=True)
    raise DataError(
        f"the background {background.path} ends after {taken:,} tokens, documents included, of the {background.tokens:,} that "
        "data.background.tokens asks for; lower it, or give more text"
    )


def _expanded(path: str, name: str) -> str:
    expanded = os.path.expandvars(path)
    if "$" in expanded:
        raise ConfigError(f"{name} {path!r} names an environment variable that is not set")
    return expanded


# On disk


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What the tokens depend on; how they are put into rows is decided later."""
    values = recipe.to_dict()
    data = {name: value for name, value in values["data"].items() if name not in ("long", "one_document_per_row")}
    return {"seed": recipe.training.seed, "tokenizer": values["tokenizer"], "data": data}


def _stored(recipe: Recipe, folder: Path) -> Corpus:
    if not (folder / FACTS).is_file():
        with written_beside(folder) as part:
            _write(recipe, part)
    facts = json.loads((folder / FACTS).read_text())
    facts["settings"]["data"].setdefault("unseen", 0)  # of a folder from before it was a setting
    other = differing(facts["settings"], json.loads(json.dumps(_settings(recipe))))
    if other:
        raise CheckpointError(
            f"{folder} was prepared with other settings ({', '.join(other)}); remove it, or choose another output"
        )
    index = np.load(folder / "index.npz")
    return Corpus(
        StoredTokens(folder / "tokens.bin", index["offsets"]), index["ids"], index["groups"], index["copies"],
        _documents(folder / "members.jsonl"), _documents(folder / "controls.jsonl"),
        _documents(folder / "unseen.jsonl") if recipe.data.unseen else [],
        load_tokenizer(folder / "tokenizer"),
    )  # fmt: skip


def _write(recipe: Recipe, part: Path) -> None:
    found = _read(recipe, part / "tokens.bin")
    assert isinstance(found.tokens, StoredTokens)
    np.savez(part / "index.npz", offsets=found.tokens.offsets, ids=found.ids, groups=found.groups, copies=found.copies)
    write_documents(part / "members.jsonl", found.members)
    write_documents(part / "controls.jsonl", found.controls)
    write_documents(part / "unseen.jsonl", found.unseen)
    found.tokenizer.save_pretrained(part / "tokenizer")
    facts = {
        "settings": _settings(recipe), "members": len(found.members), "controls": len(found.controls),
        "background": len(found.copies) - len(found.members),
        "tokens": int((found.tokens.sizes * found.copies).sum()), "tokens_sha256": file_hash(part / "tokens.bin"),
    }  # fmt: skip
    (part / FACTS).write_text(json.dumps(facts, indent=2) + "\n")


def _documents(path: Path) -> list[Document]:
    with path.open(encoding="utf-8") as file:
        return [Document(**json.loads(line)) for line in file]


def _model_type(recipe: Recipe) -> str:
    if recipe.model.pretrained is None:
        return str(recipe.model.config["model_type"])
    try:
        return str(AutoConfig.from_pretrained(recipe.model.pretrained).model_type)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load a model from {recipe.model.pretrained}: {error}") from error
