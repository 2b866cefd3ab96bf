"""The audit of a seed: all its arms in one, so that every comparison is paired over documents."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from memsinks.auditing.audit import audit
from memsinks.auditing.measure import AuditSettings
from memsinks.auditing.result import Audit
from memsinks.auditing.subjects import Subject
from memsinks.data.documents import Document, load_documents
from memsinks.data.identity import identify
from memsinks.data.readers import read_documents
from memsinks.data.tokens import load_tokenizer, start_tokens, token_offsets
from memsinks.research.compare.arm import Arm
from memsinks.research.compare.comparison import Comparison
from memsinks.runs.recipe import Recipe

logger = logging.getLogger(__name__)


def audit_seed(
    comparison: Comparison, arms: Sequence[Arm], seed: int, attacks: Literal["forward", "all"] = "forward"
) -> Audit:
    """Audit the models of finished arms; the report goes into the folder of the seed.

    Attacks that train do so on the texts set aside as unseen, where there are any.
    """
    by_name = {arm.name: arm for arm in arms}
    subjects: dict[str, Subject] = {}
    for name, arm in by_name.items():
        folder = comparison.folder(arm, seed)
        if arm.editing is None:
            subjects[name] = Subject(folder / "model", "closed" if arm.training.sinks else None, name)
        subjects |= {title: Subject(folder / x, None, title) for x, title in arm.models.items()}
    first = comparison.folder(by_name[comparison.roles["audited"]], seed)
    documents, controls, ids = audited_corpus(comparison.recipe, first)
    unseen = first.parent / "data" / "unseen.jsonl"
    known = {document.text for document in (*documents, *controls)}
    harmless = [x for x in load_documents(unseen) if x.text not in known] if comparison.recipe.data.unseen else None
    roles = {role: subjects.pop(name) for role, name in comparison.roles.items()}
    logger.info("audit of seed %d: %d models", seed, len(roles) + len(subjects))
    return audit(
        roles["audited"],
        documents,
        controls,
        against=roles["against"],
        twin=roles.get("twin"),
        seen_once=roles.get("seen_once"),
        others=list(subjects.values()),
        settings=AuditSettings(generate=0, collateral=0, end=False, seed=seed, attacks=attacks),
        document_ids=ids,
        harmless=harmless,
        out=Path(comparison.recipe.output) / f"seed-{seed}" / "report",
    )


def audited_corpus(recipe: Recipe, folder: Path) -> tuple[list[Document], list[Document], np.ndarray]:
    """Documents and controls of a finished run, cut as they were trained on, and the ids of both, int64."""
    documents = list(read_documents(folder / "documents.jsonl", copies_field="copies"))
    controls = [Document(x.text) for x in read_documents(folder / "controls.jsonl")]
    ids = identify([*documents, *controls], recipe.data.by)[0]
    if recipe.data.long == "truncate":
        tokenizer = load_tokenizer(folder / "model")
        documents, controls = (_trained_part(x, tokenizer, recipe.training.length) for x in (documents, controls))
    return documents, controls, ids


def _trained_part(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int) -> list[Document]:
    """Documents cut to the tokens that a row held."""
    cut, length = [], length - len(start_tokens(tokenizer))
    for document in documents:
        offsets = token_offsets(tokenizer, document.text)
        text = document.text[: offsets[length - 1][1]] if len(offsets) > length else document.text
        cut.append(dataclasses.replace(document, text=text))
    return cut
