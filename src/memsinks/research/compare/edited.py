"""Arms that start from the trained model of another arm: post-hoc removal in a comparison."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from memsinks._version import versions
from memsinks.data.documents import Document, write_documents
from memsinks.data.identity import identify
from memsinks.data.packing import Rows, pack
from memsinks.data.tokens import encode
from memsinks.errors import CheckpointError
from memsinks.files import written_beside
from memsinks.research.compare.arm import RUN, SETTINGS, Arm, with_method
from memsinks.research.compare.comparison import Comparison
from memsinks.runs.prepare import AUDITED, Prepared, prepare
from memsinks.sinks.checkpoint import load_stock
from memsinks.training.evaluate import batches


def with_bases(arms: Sequence[Arm], known: Sequence[Arm]) -> list[Arm]:
    """The arms in the order in which they can be run: every other, then those that edit one; bases are added."""
    needed = {arm.method.after for arm in arms} | {arm.name for arm in arms if arm.method.after is None}
    return [arm for arm in known if arm.name in needed] + [arm for arm in arms if arm.method.after is not None]


def edit_arm(comparison: Comparison, arm: Arm, seed: int, steps: int | None = None) -> dict[str, Any]:
    """Edit the model of the arm `after` and write one model for each value of the sweep; returns the facts.

    Args:
        steps: if given, nothing is edited: the facts say 0 steps.

    Raises:
        CheckpointError: the base has not been trained.
    """
    made = arm.method
    base = next(x for x in comparison.arms if x.name == made.after)
    facts: dict[str, Any] = {
        "arm": arm.name, "rival": arm.rival, "settings": arm.settings, "seed": seed, "steps": 0, "seconds": 0.0,
        "seconds_per_step": 0.0, "curve": [],
    }  # fmt: skip
    if steps is not None:
        return facts
    finished = comparison.finished(base, seed)
    if finished is None:
        raise CheckpointError(f"{arm.name} edits the model of {base.name}, which has no finished run with seed {seed}; "
                              f"train it first: --arms {base.name!r} --seeds {seed}")  # fmt: skip
    folder = comparison.folder(arm, seed)
    recipe = with_method(comparison.recipe, base.method, seed, folder)
    if recipe.training.threads:
        torch.set_num_threads(recipe.training.threads)
    prepared = prepare(recipe, one_document_per_row=True, folder=folder.parent / "data")
    audited = [x for x in prepared.members if x.kind == AUDITED and x.copies > 1]
    others = [x for x in prepared.members if x.kind != AUDITED][: len(audited)]
    size = recipe.training.batch_rows
    device = "cuda" if torch.cuda.is_available() else "cpu"
    forget, retain = (
        list(batches(_rows(side, prepared, recipe.training.length), size, device)) for side in (audited, others)
    )
    model = load_stock(comparison.folder(base, seed) / "model").to(device).eval()  # type: ignore[arg-type]
    facts["parameters"] = finished["parameters"]
    facts["threads"] = torch.get_num_threads()
    facts["versions"] = versions("torch", "transformers", "numpy")
    started = time.perf_counter()
    assert made.edit is not None
    with written_beside(folder) as part:
        for name, edited in zip(made.sweep, made.edit(model, forget, retain, seed), strict=True):
            print(f"{arm.name}, seed {seed}: {name}, {time.perf_counter() - started:.0f} s", flush=True)
            edited.save_pretrained(part / name)
            prepared.tokenizer.save_pretrained(part / name)
        facts["seconds"] = round(time.perf_counter() - started, 1)
        write_documents(part / "documents.jsonl", [x for x in prepared.members if x.kind == AUDITED])
        write_documents(part / "controls.jsonl", prepared.controls)
        (part / SETTINGS).write_text(json.dumps(comparison.settings(arm), indent=2) + "\n")
        (part / RUN).write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _rows(documents: Sequence[Document], prepared: Prepared, length: int) -> Rows:
    """One document a row, cut to a row, once each."""
    tokens = [x[:length] for x in encode(prepared.tokenizer, [document.text for document in documents])]
    return pack(
        tokens, identify(documents)[0], np.ones(len(tokens), np.int64), length=length,
        pad_id=int(prepared.tokenizer.pad_token_id), one_document_per_row=True,  # type: ignore[arg-type]
    )  # fmt: skip
