"""The corpus of a run: documents -> tokens -> rows; in memory, or in a folder that many runs share.

folder/tokens.bin       int32, the tokens of every document once, members first, then the background
folder/index.npz        offsets, document ids, groups and copies, int64; where not all tokens of the members are targets, which
                        ones, uint8, eight tokens each
folder/members.jsonl    the documents of data.path that are trained on; folder/controls.jsonl the held-out ones;
                        folder/unseen.jsonl those set aside for settling, folder/fresh.jsonl those that stand in for copies
folder/tokenizer/       the tokenizer
folder/data.json        the settings and files it was made from, the tombstones it was compared with, counts, SHA-256 of
                        tokens.bin; written with the rest or not at all, so a folder that has it is whole

Rows are cut from these tokens when they are asked for, so memory follows the number of documents (about 100 bytes each),
not their length; of members of which not all tokens are targets, a byte for each token more.
"""

from __future__ import annotations

import itertools
import json
import logging
import warnings
import zipfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from memsinks.data.chat import encode_documents
from memsinks.data.documents import Document, load_documents, write_documents
from memsinks.data.identity import equal_repetition, identify
from memsinks.data.isolation import isolation_of
from memsinks.data.packing import Rows, pack
from memsinks.data.rows import rows_of
from memsinks.data.targets import as_bits, from_bits
from memsinks.data.token_store import StoredTokens, write_tokens
from memsinks.data.tokenized import TokenizedDocuments
from memsinks.data.tokens import load_tokenizer, pad_token, save_tokenizer, start_tokens
from memsinks.errors import CheckpointError, ConfigError, DataError
from memsinks.files import file_hash, file_hashes, verify_files, written_beside
from memsinks.provenance import refuse_other_settings
from memsinks.removal.tombstone import Tombstone, refuse_tombstoned
from memsinks.runs.background import background_tokens, refuse_shared, refuse_tombstoned_background
from memsinks.runs.corpus import choose_documents, known_among, source_hashes, tombstones_of
from memsinks.runs.data_recipe import DataRecipe
from memsinks.runs.recipe import Recipe
from memsinks.runs.stored import Members, stored_of
from memsinks.runs.tokenizer import load_tokenizer_of
from memsinks.sinks.checkpoint import load_config
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.families import ISOLATES_PACKED
from memsinks.training.shadow import shadow_rows

logger = logging.getLogger(__name__)

FACTS = "data.json"
OF_ROWS = ("long", "one_document_per_row", "shadow", "tombstones")
"""Settings of the section `data` on which the tokens do not depend."""


@dataclass(frozen=True)
class TokenizedCorpus:
    """The corpus of a run before it is ordered.

    Attributes:
        documents: the members, then the background, as tokens.
        members: the documents of ``data.path`` that are trained on.
        controls: those held out.
        unseen: those set aside for settling; fresh: those that stand in for copies.
        left_out: background documents that have a text of these.
    """

    documents: TokenizedDocuments
    members: Sequence[Document]
    controls: list[Document]
    unseen: list[Document]
    fresh: list[Document]
    tokenizer: PreTrainedTokenizerBase
    left_out: int = 0


@dataclass(frozen=True)
class PreparedCorpus:
    """The corpus of a run: training rows, the documents in them, the held-out documents, the tokenizer.

    `members` are those of ``data.path``; a background is in the rows only. `unseen`, `fresh`: rows of the texts set aside for
    settling, and of those that stand in for copies, one text (or piece) a row; None if there are none.
    """

    rows: Rows
    members: Sequence[Document]
    controls: list[Document]
    unseen: Rows | None
    fresh: Rows | None
    tokenizer: PreTrainedTokenizerBase


def prepare(recipe: Recipe, one_document_per_row: bool = False, folder: Path | None = None) -> PreparedCorpus:
    """Documents -> identity -> tokens -> training order -> exposures -> rows.

    Args:
        one_document_per_row: what is done where the recipe leaves it open.
        folder: keep the tokens there; what lies there already is used. None = keep them in memory.

    Raises:
        ConfigError, DataError: settings or documents that give no rows.
        CheckpointError: `folder` was made from other settings or from files that have changed since, is damaged or cannot
            be written.
    """
    data, training = recipe.data, recipe.training
    stored = stored_of(recipe)
    if stored is not None:
        if folder is not None:
            raise ConfigError(
                f"data.path {data.path} is a finished corpus; a comparison makes its own, give the documents"
            )
        corpus = TokenizedCorpus(stored.tokenized(data.by), Members(stored), stored.controls, [], [], stored.tokenizer)
    else:
        tombstones = tombstones_of(recipe)
        corpus = _tokenize(recipe, tombstones) if folder is None else _from_folder(recipe, folder, tombstones)
    _warn_of_equal_repetition(recipe, corpus.documents)
    rows = rows_of(
        corpus.documents,
        seed=training.seed,
        epochs=training.epochs,
        length=training.length,
        pad_id=pad_token(corpus.tokenizer),
        apart_from=_apart_from(recipe.sinks, corpus.documents),
        one_document_per_row=data.alone(one_document_per_row) or _model_type(recipe) not in ISOLATES_PACKED,
        long=data.long,
    )
    if len(rows) < training.batch_rows:
        raise DataError(f"the corpus fills {len(rows)} rows, one step needs {training.batch_rows}; lower batch_rows")
    if data.shadow and recipe.sinks is not None:
        rows = shadow_rows(rows, recipe.sinks)
    unseen, fresh = (_rows_aside(documents, corpus, recipe) for documents in (corpus.unseen, corpus.fresh))
    return PreparedCorpus(rows, corpus.members, corpus.controls, unseen, fresh, corpus.tokenizer)


def _apart_from(sinks: SinkConfig | None, documents: TokenizedDocuments) -> int | None:
    if sinks is None or (sinks.shared == "decay" and documents.isolation is None):
        return None
    return sinks.open_from


def _warn_of_equal_repetition(recipe: Recipe, documents: TokenizedDocuments) -> None:
    same = equal_repetition(np.repeat(documents.groups, documents.copies * recipe.training.epochs))
    if not same or recipe.sinks is None or not recipe.sinks.needs_exposures:
        return
    if recipe.sinks.shared == "none":
        why = "in exact mode the shared weights learn from the first time alone; train without sinks, or with shared_decay"
    elif recipe.sinks.shared_decay:
        why = (
            "w(c) is then nearly the same for all tokens of a step, and AdamW divides a common factor out, so shared_decay does "
            "little (plain multi-epoch training)"
        )
    else:
        return
    warnings.warn(f"every document is met {same} times: {why}", stacklevel=3)


def _rows_aside(documents: list[Document], corpus: TokenizedCorpus, recipe: Recipe) -> Rows | None:
    if not documents:
        return None
    tokens, targets = encode_documents(corpus.tokenizer, documents)
    rows = pack(
        tokens,
        identify(documents)[0],
        [1] * len(documents),
        targets=targets,
        length=recipe.training.length,
        pad_id=pad_token(corpus.tokenizer),
        one_document_per_row=True,
        long="split" if recipe.data.long == "fill" else recipe.data.long,
    )
    return rows.one_segment_each(rows.segments[rows.segment_targets > 0])


def _model_type(recipe: Recipe) -> str:
    if recipe.model.pretrained is None:
        return str(recipe.model.config["model_type"])
    return str(load_config(recipe.model.pretrained).model_type)


# Documents -> tokens


def _tokenize(recipe: Recipe, tombstones: Sequence[Tombstone], file: Path | None = None) -> TokenizedCorpus:
    """The corpus from its sources; its tokens are written to `file` as they come, or kept in memory."""
    data = recipe.data
    documents, unseen, fresh = choose_documents(data, recipe.training.seed)
    members = [document for document in documents if document.copies > 0]
    controls = [document for document in documents if document.copies == 0]
    refuse_tombstoned([*members, *unseen, *fresh], tombstones)
    known = known_among([*documents, *unseen, *fresh] if data.background is not None else (), data)
    tokenizer = load_tokenizer_of(recipe, members, known)
    ids, groups = identify(members, data.by)
    copies = np.array([document.copies for document in members], np.int64)
    (tokens, targets), more_ids, left_out = encode_documents(tokenizer, members), array("q"), array("q")
    everything: Iterable[np.ndarray] = tokens
    if data.background is not None:
        taken = sum(len(x) * number for x, number in zip(tokens, copies.tolist(), strict=True))
        more = background_tokens(data.background, taken, tokenizer, tombstones, more_ids, known, left_out)
        everything = itertools.chain(tokens, more)
    kept = list(everything) if file is None else StoredTokens(file, write_tokens(file, everything))
    background = np.array(more_ids, np.int64)
    found = TokenizedDocuments(
        kept,
        np.r_[ids, background],
        np.r_[groups, background],
        np.r_[copies, np.ones_like(background)],
        _isolation(members, len(background)),
        None if targets is None else [*targets, *[None] * len(background)],
    )
    return TokenizedCorpus(found, members, controls, unseen, fresh, tokenizer, len(left_out))


def _isolation(members: Sequence[Document], background: int) -> np.ndarray | None:
    """The isolation of all documents, int64 [documents]; background documents have none."""
    found = isolation_of(members)
    return None if found is None else np.r_[found, np.zeros(background, np.int64)]


# On disk


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What the tokens depend on, and how they are put into rows (`OF_ROWS`), which may change later."""
    values = recipe.to_dict()
    return {"seed": recipe.training.seed, "tokenizer": values["tokenizer"], "data": values["data"]}


def _from_folder(recipe: Recipe, folder: Path, tombstones: Sequence[Tombstone]) -> TokenizedCorpus:
    """The corpus in `folder`, made there first if it is not; it is compared with tombstones of after it was made."""
    if not (folder / FACTS).is_file():
        with written_beside(folder) as part:
            _write(recipe, tombstones, part)
    facts = _facts(folder)
    refuse_other_settings(
        facts["settings"],
        _settings(recipe),
        folder,
        kinds={"data": DataRecipe},
        ignored=[f"data.{name}" for name in OF_ROWS],
    )
    _refuse_changed(facts, source_hashes(recipe), folder)
    try:
        corpus = _load(folder, facts, recipe.data)
    except CheckpointError:
        raise
    except (EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{folder} is damaged ({error}); remove it, and it is made anew") from error
    start = start_tokens(corpus.tokenizer)
    chat = bool(corpus.members) and corpus.members[0].messages is not None
    if len(start) and not chat and int(corpus.documents.tokens[0][0]) != int(start[0]):
        raise CheckpointError(
            f"{folder} was prepared when texts did not begin with the tokenizer's start token; remove it, and it is made anew"
        )
    later = [x for x in tombstones if x.sha256 not in facts["tombstones"]]
    refuse_tombstoned([*corpus.members, *corpus.unseen, *corpus.fresh], later)
    if recipe.data.background is not None:
        others = [*corpus.members, *corpus.controls, *corpus.unseen, *corpus.fresh]
        background = corpus.documents.ids[len(corpus.members) :]
        if "background_left_out" not in facts:
            refuse_shared(others, background, folder)
            others = []
        if later:
            known = known_among(others, recipe.data)
            refuse_tombstoned_background(recipe.data.background, background, later, folder, known)
    return corpus


def _write(recipe: Recipe, tombstones: Sequence[Tombstone], part: Path) -> None:
    sources = source_hashes(recipe)
    corpus = _tokenize(recipe, tombstones, part / "tokens.bin")
    documents = corpus.documents
    assert isinstance(documents.tokens, StoredTokens)
    np.savez(
        part / "index.npz",
        offsets=documents.tokens.offsets,
        ids=documents.ids,
        groups=documents.groups,
        copies=documents.copies,
        targets=as_bits(documents.targets, documents.tokens.sizes[: len(corpus.members)]),
    )
    for name in ("members", "controls", "unseen", "fresh"):
        write_documents(part / f"{name}.jsonl", getattr(corpus, name))
    save_tokenizer(corpus.tokenizer, part / "tokenizer")
    facts = {
        "files": {name: digest for name, digest in file_hashes(part).items() if name != "tokens.bin"},
        "settings": _settings(recipe),
        "sources": sources,
        "tombstones": [x.sha256 for x in tombstones],
        "members": len(corpus.members),
        "controls": len(corpus.controls),
        "background": len(documents.copies) - len(corpus.members),
        "background_left_out": corpus.left_out,
        "tokens": int((documents.tokens.sizes * documents.copies).sum()),
        "tokens_sha256": file_hash(part / "tokens.bin"),
    }
    (part / FACTS).write_text(json.dumps(facts, indent=2) + "\n")


def _load(folder: Path, facts: dict[str, Any], data: DataRecipe) -> TokenizedCorpus:
    verify_files(folder, facts.get("files", {}), f"remove {folder}, and it is made anew")  # of before: no hashes
    with np.load(folder / "index.npz") as index:
        tokens = StoredTokens(folder / "tokens.bin", index["offsets"])
        documents = TokenizedDocuments(tokens, index["ids"], index["groups"], index["copies"])
        bits = index.get("targets", ())  # folders from before there were targets have none
    members, controls = (load_documents(folder / f"{name}.jsonl") for name in ("members", "controls"))
    masks = from_bits(bits, tokens.sizes[: len(members)], len(tokens))
    documents = replace(documents, isolation=_isolation(members, len(tokens) - len(members)), targets=masks)
    if (len(members), len(controls)) != (facts["members"], facts["controls"]):
        raise DataError("members.jsonl or controls.jsonl is cut short")
    unseen, fresh = (
        load_documents(folder / f"{name}.jsonl") if getattr(data, name) else [] for name in ("unseen", "fresh")
    )
    return TokenizedCorpus(documents, members, controls, unseen, fresh, load_tokenizer(folder / "tokenizer"))


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / FACTS).read_text())
        # folders from before there was a comparison have no tombstones
        return facts | {"settings": dict(facts["settings"]), "tombstones": list(facts.get("tombstones", ()))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / FACTS} is damaged ({error}); remove {folder}, and it is made anew") from error


def _refuse_changed(facts: dict[str, Any], now: dict[str, str], folder: Path) -> None:
    before = facts.get("sources", {})
    other = [name for name in before if now.get(name, before[name]) != before[name]]
    if other:
        said = ", ".join(f"{name} (SHA-256 {before[name][:12]}..., now {now[name][:12]}...)" for name in other)
        raise CheckpointError(
            f"files have changed since {folder} was prepared from them: {said}; restore them, or choose another output"
        )
