"""The audit: what does this model remember, and what did removal take away?"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memsinks._version import versions
from memsinks.auditing.corpus import Corpus, read_corpus, without_start
from memsinks.auditing.examples import examples
from memsinks.auditing.figures import Figures
from memsinks.auditing.measure import Measurement, measure
from memsinks.auditing.notes import limits
from memsinks.auditing.pictures import require_matplotlib
from memsinks.auditing.probes import probed_texts
from memsinks.auditing.report import write_report
from memsinks.auditing.result import Audit
from memsinks.auditing.scores import TOKENS_MARK
from memsinks.auditing.settings import AuditSettings
from memsinks.auditing.subjects import Role, State, Subject
from memsinks.data.chat import encode_documents
from memsinks.data.documents import Document
from memsinks.data.tokens import start_tokens
from memsinks.errors import CheckpointError, ConfigError, DataError
from memsinks.files import written_beside

logger = logging.getLogger(__name__)

Model = PreTrainedModel | str | os.PathLike[str] | Subject
ROLE_NAMES: dict[Role, str] = {
    "audited": "audited model",
    "against": "ordinary model",
    "twin": "twin",
    "seen once": "seen-once model",
    "other": "other model",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model of an audit: what it is there for, in which state it is looked at, and what it is called."""

    role: Role
    subject: Subject
    state: State
    name: str


def audit(
    model: Model,
    documents: Sequence[Document],
    controls: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    state: State | None = None,
    against: Model | None = None,
    twin: Model | None = None,
    seen_once: Model | None = None,
    others: Sequence[Model] = (),
    settings: AuditSettings | None = None,
    private_start: Callable[[Document], int] | None = None,
    document_ids: Sequence[int] | np.ndarray | None = None,
    harmless: Sequence[Document] | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Audit:
    """What a model remembers of documents, beside controls of the same kind that it never saw.

    Any causal language model will do, live or a path, one that memsinks never touched too. Models given as paths are
    loaded one after the other.

    Args:
        model: the audited one; in any mode, which is kept, and also inside torch.compile, DDP or a PeftModel.
        documents: what it may remember, with their `copies`.
        controls: documents of the same kind that were not trained on; reported as 0 copies.
        tokenizer: the model's; default: the one beside its checkpoint.
        state: of the audited model's sinks: ``"open"`` (each document's own) or ``"closed"``; required where there are
            sinks. Other models with sinks are given as ``Subject(model, state)``.
        against: the ordinary model, or the one before removal: what gap closed and price are measured against, and the
            positive control of the attacks.
        twin: a model trained without the documents: "as if never seen"; also the reference of the reference attack.
        seen_once: a model that saw each document once.
        others: more models, for the table and the pictures.
        settings: see `AuditSettings`.
        private_start: character offset at which the private part of a document begins; then that part, to the end, is
            what must come out, instead of `continuation` tokens after `prefix`.
        document_ids: integers, the id each document and then each control had in training, -1 for none; default: made from
            their texts, keys or sources, as ``settings.by`` says. For texts that are given cut.
        harmless: other texts, which no model here was trained on, for the attacks that train (``settings.attacks``); None = a
            third of the controls, which are then set aside.
        out: folder for report.html, audit.json, documents.jsonl and the tables of tokens; an audit that was interrupted
            goes on from the tables there.

    Raises:
        DataError: an empty side; a document with 0 copies; a text on both sides, or one that is harmless too; too few texts for
            the attacks that train; ids that are no integers or cannot be
            those of training; NaN losses; a model whose tokenizer gives other tokens.
        ConfigError: `state` missing or not possible; no tokenizer, or one that does not fit; a PeftModel with learned prompts.
        CheckpointError: a path that cannot be loaded; `out` holds something else or cannot be written.
    """
    settings = settings or AuditSettings()
    if isinstance(others, str | os.PathLike):
        raise ConfigError(f"others are several models; put {str(others)!r} into a list")
    entries = _entries(_subjects(model, state, against, twin, seen_once, others))
    tokenizer = _tokenizer(entries, tokenizer)
    corpus = read_corpus(documents, controls, tokenizer, settings, private_start, document_ids, harmless)
    _check_tokenizers(entries, corpus, tokenizer, settings)
    _check_ids(entries, corpus, settings, document_ids is not None)
    probed_texts(corpus, settings)  # what is missing for them is said before hours of scoring
    with _folder(out) as folder:
        measured = _measured(entries, corpus, settings, folder)
        used = dataclasses.asdict(settings) | {
            "private_part": private_start is not None,
            "start_token": bool(len(corpus.start)),
            "harmless": "a third of the controls" if harmless is None else f"{len(harmless)} texts given",
        }
        result = _result(measured, Figures(corpus, settings), used)
        result = dataclasses.replace(result, examples=examples(measured, corpus, tokenizer, settings.shown))
        if out is not None:
            _write(result, Path(out))
    return result


def _result(measured: list[Measurement], figures: Figures, settings: dict[str, Any]) -> Audit:
    """The figures of all models together; `settings`: what stands in the result as its settings."""
    corpus, blind = figures.corpus, figures.blind()
    by_role = {one.role: one for one in reversed(measured)}
    fair = [by_role[role] for role in ("twin", "seen once") if role in by_role]
    return Audit(
        models=tuple(figures.model(one, by_role.get("against"), by_role.get("twin"), fair) for one in measured),
        target=corpus.target_name,
        documents=corpus.members,
        controls=len(corpus.tokens) - corpus.members,
        blind=blind,
        notes=limits(figures, measured, blind),
        settings=settings,
        versions=versions("torch", "transformers", "tokenizers", "numpy"),
        data={"texts_sha256": corpus.sha256, "tokens": int(sum(len(x) for x in corpus.tokens))},
        measured=tuple(measured),
        corpus=corpus,
    )


def _measured(entries: Sequence[Entry], corpus: Corpus, settings: AuditSettings, folder: Path) -> list[Measurement]:
    """Each model loaded and measured, in the order of `entries`."""
    found: dict[int, Measurement] = {}
    reference: Measurement | None = None
    # The twin first: it is the reference of the others.
    for place, entry in sorted(enumerate(entries), key=lambda item: item[1].role != "twin"):
        logger.info("audit: %s, %d of %d", entry.name, len(found) + 1, len(entries))
        with entry.subject.loaded() as model:
            found[place] = measure(
                model,
                corpus,
                settings,
                folder / "tokens" / f"{place}-{entry.role.replace(' ', '-')}",
                name=entry.name,
                role=entry.role,
                state=entry.state,
                reference=reference,
                generated=entry.role in ("audited", "against"),
                models=len(entries),
            )
        if entry.role == "twin":
            reference = found[place]
    return [found[place] for place in range(len(entries))]


def _subjects(
    model: Model,
    state: State | None,
    against: Model | None,
    twin: Model | None,
    seen_once: Model | None,
    others: Sequence[Model],
) -> list[tuple[Role, Subject]]:
    given: list[tuple[Role, Model | None]] = [("audited", model), ("against", against), ("twin", twin)]
    given += [("seen once", seen_once), *(("other", other) for other in others)]
    found = []
    for role, one in given:
        if one is None:
            continue
        if isinstance(one, Subject):
            if role == "audited" and state is not None:
                one = dataclasses.replace(one, state=state)
            found.append((role, one))
        else:
            found.append((role, Subject(one, state if role == "audited" else None)))
    return found


def _entries(subjects: Sequence[tuple[Role, Subject]]) -> list[Entry]:
    """Each model with its state and a name, all different: the one given, the last part of its path, or its role."""
    entries: list[Entry] = []
    for role, subject in subjects:
        subject.config()  # a path where no model lies is said before its state
        state, taken = subject.checked_state(), {entry.name for entry in entries}
        name = subject.name or (subject.path.name if subject.path else ROLE_NAMES[role])
        if name in taken:
            name = f"{name} ({subject.state or role})"
        while name in taken:
            name += "'"
        entries.append(Entry(role, subject, state, name))
    return entries


def _tokenizer(entries: Sequence[Entry], given: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer given, or the one beside the audited model; ConfigError if there is none or a model has too few tokens."""
    audited = entries[0].subject
    tokenizer = given or audited.tokenizer()
    if tokenizer is None:
        raise ConfigError(f"no tokenizer lies beside {audited.path or 'a live model'}; give the model's tokenizer")
    for entry in entries:
        vocabulary = entry.subject.config().get_text_config().vocab_size
        if len(tokenizer) > vocabulary:
            raise ConfigError(
                f"the tokenizer has {len(tokenizer)} tokens, the {ROLE_NAMES[entry.role]} {vocabulary}; give the model's "
                "tokenizer"
            )
    return tokenizer


def _check_tokenizers(
    entries: Sequence[Entry], corpus: Corpus, tokenizer: PreTrainedTokenizerBase, settings: AuditSettings
) -> None:
    """DataError if a model's own tokenizer cuts the texts differently: losses per token would not be comparable."""
    sample = slice(0, 64)
    for entry in entries:
        own = entry.subject.tokenizer()
        if own is None or own is tokenizer:
            continue
        start = start_tokens(own)
        others = without_start(start, encode_documents(own, corpus.documents[sample], settings.end)[0])
        for mine, its in zip(corpus.tokens[sample], others, strict=True):
            if mine.tolist() != its.tolist() or start.tolist() != corpus.start.tolist():
                raise DataError(
                    f"the tokenizer of {entry.role} ({entry.subject.path}) gives other tokens than that of the audit; losses "
                    "per token cannot be compared. Audit it on its own"
                )


def _check_ids(entries: Sequence[Entry], corpus: Corpus, settings: AuditSettings, given: bool) -> None:
    """DataError if sinks are to be open and a document has no id."""
    if any(entry.state == "open" for entry in entries) and (corpus.ids < 0).any():
        missing = int((corpus.ids < 0).sum())
        raise DataError(
            f"document_ids are -1 for {missing} documents or controls, whose own sinks cannot be opened"
            if given
            else f"by={settings.by!r} needs a {settings.by} for every document and control"
        )


@contextmanager
def _folder(out: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Where the tables of tokens are kept: in the folder of the report, or for as long as the audit takes."""
    if out is not None:
        require_matplotlib()
        yield _claimed(Path(out))
        return
    with tempfile.TemporaryDirectory(prefix="memsinks-audit-") as scratch:
        yield Path(scratch)


def _claimed(folder: Path) -> Path:
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give a folder for the report")
    mark = folder / "tokens" / "README"
    if folder.is_dir() and any(folder.iterdir()) and not mark.is_file():
        raise CheckpointError(f"{folder} is not empty and not an earlier audit; choose another folder")
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(TOKENS_MARK)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error}") from error
    return folder


def _write(result: Audit, folder: Path) -> None:
    """report.html, audit.json and documents.jsonl, written beside and moved into the folder."""
    with written_beside(folder) as part:
        write_report(result, part / "report.html")
        (part / "audit.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
        corpus = result.corpus
        assert corpus is not None
        with (part / "documents.jsonl").open("w", encoding="utf-8") as file:
            for index, document in enumerate(corpus.documents):
                models = {
                    one.name: {
                        "loss": float(one.loss[index]),
                        "recited": [None, False, True][int(one.recited[index]) + 1],
                        "longest_run": int(one.run[index]),
                    }
                    | {f"attack {name}": float(values[index]) for name, values in one.attacks.items()}
                    | {
                        f"loss, {name}": float(values[index])
                        for name, values in one.probes.items()
                        if not np.isnan(values[index])
                    }
                    for one in result.measured
                }
                line = {"key": document.key, "copies": int(corpus.copies[index]), "tokens": len(corpus.tokens[index])}
                file.write(json.dumps({**line, "models": models}, ensure_ascii=False) + "\n")
