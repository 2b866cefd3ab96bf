"""Arms that start from the trained model of another arm: post-hoc removal in a comparison."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from memsinks._version import versions
from memsinks.data.chat import encode_documents
from memsinks.data.documents import Document, write_documents
from memsinks.data.identity import identify
from memsinks.data.packing import Rows, pack
from memsinks.data.tokens import pad_token, save_tokenizer
from memsinks.errors import CheckpointError
from memsinks.files import write_json, written_beside
from memsinks.research.compare.arm import RUN, SETTINGS, Arm, with_method
from memsinks.research.compare.comparison import Comparison
from memsinks.research.rivals.method import EditingMethod
from memsinks.runs.corpus import AUDITED
from memsinks.runs.prepare import PreparedCorpus, prepare
from memsinks.sinks.checkpoint import load_stock
from memsinks.training.evaluate import batches

logger = logging.getLogger(__name__)


def with_bases(arms: Sequence[Arm], known: Sequence[Arm]) -> list[Arm]:
    """The arms in the order in which they can be run: every other, then those that edit one; bases are added."""
    needed = {arm.editing.after if arm.editing else arm.name for arm in arms}
    return [arm for arm in known if arm.name in needed] + [arm for arm in arms if arm.editing]


def edit_arm(comparison: Comparison, arm: Arm, editing: EditingMethod, seed: int) -> dict[str, Any]:
    """Edit the model of another arm and write one model for each value of the sweep; returns the facts.

    Raises:
        CheckpointError: the other arm has not been trained.
    """
    base = next(x for x in comparison.arms if x.name == editing.after)
    finished = comparison.finished(base, seed)
    if finished is None:
        raise CheckpointError(
            f"{arm.name} edits the model of {base.name}, which has no finished run with seed {seed}; "
            f"train it first: --arms {base.name!r} --seeds {seed}"
        )
    folder = comparison.folder(arm, seed)
    recipe = with_method(comparison.recipe, base.training, seed, folder)
    if recipe.training.threads:
        torch.set_num_threads(recipe.training.threads)
    prepared = prepare(recipe, one_document_per_row=True, folder=folder.parent / "data")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    forget, retain = (
        list(batches(_rows(side, prepared, recipe.training.length), recipe.training.batch_rows, device))
        for side in _sides(prepared)
    )
    model = load_stock(comparison.folder(base, seed) / "model").to(device).eval()  # type: ignore[arg-type]
    started = time.perf_counter()
    with written_beside(folder) as part:
        for name, edited in zip(editing.sweep, editing.edit(model, forget, retain, seed), strict=True):
            logger.info("%s, seed %d: %s, %.0f s", arm.name, seed, name, time.perf_counter() - started)
            edited.save_pretrained(part / name)
            save_tokenizer(prepared.tokenizer, part / name)
        facts = {
            "arm": arm.name,
            "rival": arm.rival,
            "settings": arm.settings,
            "seed": seed,
            "steps": 0,
            "seconds": round(time.perf_counter() - started, 1),
            "seconds_per_step": 0.0,
            "curve": [],
            "parameters": finished["parameters"],
            "threads": torch.get_num_threads(),
            "versions": versions("torch", "transformers", "numpy"),
        }
        write_documents(part / "documents.jsonl", [x for x in prepared.members if x.kind == AUDITED])
        write_documents(part / "controls.jsonl", prepared.controls)
        write_json(part / SETTINGS, comparison.settings(arm))
        write_json(part / RUN, facts)
    return facts


def _sides(prepared: PreparedCorpus) -> tuple[list[Document], list[Document]]:
    """The documents to be forgotten, the audited ones with 2 copies or more, and as many of the others."""
    forget = [x for x in prepared.members if x.kind == AUDITED and x.copies > 1]
    return forget, [x for x in prepared.members if x.kind != AUDITED][: len(forget)]


def _rows(documents: Sequence[Document], prepared: PreparedCorpus, length: int) -> Rows:
    """One document a row, cut to a row, once each."""
    tokens, targets = encode_documents(prepared.tokenizer, documents)
    return pack(
        tokens,
        identify(documents)[0],
        np.ones(len(tokens), np.int64),
        targets=targets,
        long="truncate",
        length=length,
        pad_id=pad_token(prepared.tokenizer),
        one_document_per_row=True,
    )
