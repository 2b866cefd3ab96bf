"""The audit: what does this model remember, and what did removal take away?"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memsinks._version import versions
from memsinks.auditing.figures import FEW, FPRS, Figures
from memsinks.auditing.measure import AuditSettings, Corpus, Measured, measure, read_corpus, token_probabilities
from memsinks.auditing.pictures import require_matplotlib
from memsinks.auditing.relearning import Relearning, RelearningCurve, compare, relearn
from memsinks.auditing.report import write_report
from memsinks.auditing.result import Attack, Audit, Example
from memsinks.auditing.subjects import Role, State, Subject
from memsinks.data.documents import Document
from memsinks.data.tokens import encode, token_offsets
from memsinks.errors import CheckpointError, ConfigError, DataError
from memsinks.files import written_beside

Model = PreTrainedModel | str | os.PathLike[str] | Subject
ROLE_NAMES: dict[Role, str] = {
    "audited": "audited model", "against": "ordinary model", "twin": "twin", "seen once": "seen-once model",
    "other": "other model",
}  # fmt: skip
BLIND_NOTES = {
    "texts alone": "Members and controls differ in their texts alone (AUC {} without any model): loss gap and membership "
    "are not evidence of memory here. Choose controls from the same source.",
    "tokenizer alone": "The tokenizer alone tells members from controls (AUC {}): it cuts them into fewer tokens per "
    "character, as one does that was trained on their copies. Losses per token of both sides are not of one kind.",
}  # fmt: skip
BLIND_AUC = 0.55
"""The lower limit of the blind attack's AUC from which members and controls are said to differ."""


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
    relearn_steps: int = 0,
    relearn_lr: float = 3e-4,
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Audit:
    """What a model remembers of documents, beside controls of the same kind that it never saw.

    Any causal language model will do, live or a path, one that memsinks never touched too. Models given as paths are
    loaded one after the other.

    Args:
        model: the audited one.
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
        document_ids: int64, the id each document and then each control had in training; default: made from their texts, keys
            or sources, as ``settings.identity`` says. For texts that are given cut.
        relearn_steps: fine-tune copies of the audited model and the twin on half of the documents for so many steps;
            needs `against` and `twin`. 0 = not.
        relearn_lr: learning rate of that.
        out: folder for report.html, audit.json, documents.jsonl and the tables of tokens; an audit that was interrupted
            goes on from the tables there.
        progress: say on stderr which model is looked at; show bars where there is a terminal.

    Raises:
        DataError: an empty side; a document with 0 copies; a text on both sides; NaN losses; a model whose tokenizer
            gives other tokens.
        ConfigError: `state` missing or not possible; no tokenizer, or one that does not fit; `relearn_steps` without
            `against` and `twin`.
        CheckpointError: a path that cannot be loaded; `out` holds something else or cannot be written.
    """
    settings = settings or AuditSettings()
    subjects = _subjects(model, state, against, twin, seen_once, others)
    configs = [subject.config() for _, subject in subjects]
    states: list[State] = [subject.checked_state() for _, subject in subjects]
    if relearn_steps and (against is None or twin is None or states[0] == "open"):
        raise ConfigError(
            "relearning compares the audited model, sinks closed or absent, with the twin, and needs `against` to know how "
            "far is back; give both, or relearn_steps=0"
        )
    tokenizer = tokenizer or subjects[0][1].tokenizer()
    if tokenizer is None:
        raise ConfigError(
            f"no tokenizer lies beside {subjects[0][1].path or 'a live model'}; give the model's tokenizer"
        )
    for (role, _), config in zip(subjects, configs, strict=True):
        vocabulary = config.get_text_config().vocab_size
        if len(tokenizer) > vocabulary:
            raise ConfigError(
                f"the tokenizer has {len(tokenizer)} tokens, the {ROLE_NAMES[role]} {vocabulary}; give the model's tokenizer"
            )
    corpus = read_corpus(documents, controls, tokenizer, settings, private_start, document_ids)
    _check_tokenizers(subjects, corpus, tokenizer, settings)
    if "open" in states and (corpus.ids < 0).any():
        raise DataError(f"identity={settings.identity!r} needs a {settings.identity} for every document and control")
    if relearn_steps and corpus.target.sum() < 2:
        raise DataError("relearning halves the target documents and needs at least 2, there is 1")
    with ExitStack() as stack:
        if out is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memsinks-audit-")))
        else:
            require_matplotlib()
            folder = _claimed(Path(out))
        names = _names(subjects)
        found: dict[int, Measured] = {}
        curves: dict[Role, RelearningCurve] = {}
        # The twin first: its losses are the reference of the others.
        for place in sorted(range(len(subjects)), key=lambda place: subjects[place][0] != "twin"):
            role, subject = subjects[place]
            if progress:
                print(f"audit: {names[place]}, {len(found) + 1} of {len(subjects)}", file=sys.stderr, flush=True)
            with subject.loaded() as loaded:
                reference = next((x.loss for x in found.values() if x.role == "twin"), None)
                found[place] = measure(
                    loaded, corpus, settings, folder / "tokens" / f"{place}-{role.replace(' ', '-')}", name=names[place],
                    role=role, state=states[place], reference=reference, generated=role in ("audited", "against"),
                    progress=progress,
                )  # fmt: skip
                if relearn_steps and role in ("audited", "against", "twin"):
                    curves[role] = relearn(
                        loaded, [corpus.tokens[x] for x in np.flatnonzero(corpus.target)], corpus.start, name=names[place],
                        steps=0 if role == "against" else relearn_steps, lr=relearn_lr, batch_size=8, seed=settings.seed,
                    )  # fmt: skip
        measured = [found[place] for place in range(len(subjects))]
        relearning = compare(curves["audited"], curves["against"], curves["twin"]) if curves else None
        result = _result(measured, corpus, settings, tokenizer, private_start is not None, relearning, relearn_lr)
        if out is not None:
            _write(result, Path(out))
    return result


def _subjects(
    model: Model, state: State | None, against: Model | None, twin: Model | None, seen_once: Model | None,
    others: Sequence[Model],
) -> list[tuple[Role, Subject]]:  # fmt: skip
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


def _names(subjects: list[tuple[Role, Subject]]) -> list[str]:
    """A name for each model, all different: the one given, the last part of its path, or its role."""
    names: list[str] = []
    for role, subject in subjects:
        name = subject.name or (subject.path.name if subject.path else ROLE_NAMES[role])
        if name in names:
            name = f"{name} ({subject.state or role})"
        while name in names:
            name += "'"
        names.append(name)
    return names


def _check_tokenizers(
    subjects: list[tuple[Role, Subject]], corpus: Corpus, tokenizer: PreTrainedTokenizerBase, settings: AuditSettings
) -> None:
    """DataError if a model's own tokenizer cuts the texts differently: losses per token would not be comparable."""
    sample = slice(0, 64)
    texts = [document.text for document in corpus.documents[sample]]
    for role, subject in subjects:
        own = subject.tokenizer()
        if own is None or own is tokenizer:
            continue
        for mine, its in zip(corpus.tokens[sample], encode(own, texts, end=settings.end), strict=True):
            if mine.tolist() != its.tolist():
                raise DataError(
                    f"the tokenizer of {role} ({subject.path}) gives other tokens than that of the audit; losses per token "
                    "cannot be compared. Audit it on its own"
                )


def _claimed(folder: Path) -> Path:
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give a folder for the report")
    mark = folder / "tokens" / "README"
    if folder.is_dir() and any(folder.iterdir()) and not mark.is_file():
        raise CheckpointError(f"{folder} is not empty and not an earlier audit; choose another folder")
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text("What each model said to each token, for a memsinks audit that goes on. May be deleted.\n")
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error}") from error
    return folder


def _result(
    measured: list[Measured], corpus: Corpus, settings: AuditSettings, tokenizer: PreTrainedTokenizerBase, private: bool,
    relearning: Relearning | None, relearn_lr: float,
) -> Audit:  # fmt: skip
    figures = Figures(corpus, settings)
    role = {one.role: one for one in reversed(measured)}
    against, twin, once = role.get("against"), role.get("twin"), role.get("seen once")
    fair = [one for one in (twin, once) if one is not None]
    models = tuple(figures.model(one, against, twin, fair) for one in measured)
    blind = figures.blind()
    packages = ("torch", "transformers", "tokenizers", "numpy")
    return Audit(
        models, corpus.target_name, corpus.members, len(corpus.tokens) - corpus.members, blind,
        tuple(_notes(figures, measured, blind)), relearning,
        dataclasses.asdict(settings) | {
            "private_part": private, "start_token": bool(len(corpus.start)),
            "relearn_lr": relearn_lr if relearning else None,
        },
        versions(*packages),
        {"texts_sha256": corpus.sha256, "tokens": int(sum(len(x) for x in corpus.tokens))},
        tuple(measured), corpus, tuple(_examples(measured, corpus, settings, tokenizer)),
    )  # fmt: skip


def _notes(figures: Figures, measured: list[Measured], blind: Sequence[Attack]) -> list[str]:
    """What limits the figures."""
    corpus, notes = figures.corpus, []
    target, controls = int(figures.is_target.sum()), int(figures.is_control.sum())
    for count, what in ((target, "target documents"), (controls, "controls")):
        if count < FEW:
            notes.append(f"Only {count} {what}: intervals over so few documents are rough.")
    for fpr in FPRS:
        if controls < 1 / fpr:
            notes.append(f"A true positive rate at {fpr:.1%} needs {round(1 / fpr)} controls, there are {controls}.")
    if not blind:
        notes.append("Too few documents to ask whether the texts alone tell members from controls.")
    for attack in blind:
        if attack.auc.low > BLIND_AUC:
            notes.append(BLIND_NOTES[attack.name].format(attack.auc))
    lengths = [float(np.mean([len(corpus.tokens[x]) for x in np.flatnonzero(side)])) for side in
               (figures.is_target, figures.is_control)]  # fmt: skip
    if not 0.8 < lengths[0] / lengths[1] < 1.25:
        notes.append(f"Documents have {lengths[0]:.0f} tokens on average, controls {lengths[1]:.0f}: not of one kind.")
    audited = measured[0]
    uniform = np.log(max(2, 1 + max(int(tokens.max()) for tokens in corpus.tokens)))
    for one in measured:
        if one.loss[figures.is_control].mean() > uniform:
            notes.append(
                f"{one.name} is worse than guessing evenly on the controls: do weights and tokenizer belong to it?"
            )
        kinds = [f"{x.facts['model_type']}, {x.facts['parameters']:,} parameters" for x in (one, audited)]
        if one.role in ("twin", "seen once") and kinds[0] != kinds[1]:
            notes.append(
                f"The model given as {one.role} ({kinds[0]}) is not of the audited one's architecture ({kinds[1]})."
            )
    if len(measured) > 1:
        notes.append(
            "Intervals are over documents, for these training runs; how much another seed would change is not in them."
        )
    if audited.role == "audited" and "reference" not in audited.attacks:
        notes.append("No reference attack: it needs a twin.")
    asked = (audited.recited[figures.is_target] >= 0).mean()
    if asked < 1:
        notes.append(f"{1 - asked:.0%} of the documents are too short for the extraction asked and are left out of it.")
    return notes


def _examples(
    measured: list[Measured], corpus: Corpus, settings: AuditSettings, tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """The documents best known to the ordinary model where it is given, otherwise to the audited one."""
    before = next((one for one in measured if one.role == "against"), measured[0])
    examples = []
    for index in np.argsort(before.loss[: corpus.members], kind="stable")[: settings.shown]:
        document, tokens = corpus.documents[index], corpus.tokens[index]
        shown = {
            one.name: token_probabilities(one.table[int(index)], len(tokens))
            for role in ("against", "audited", "twin") for one in measured if one.role == role
        }  # fmt: skip
        pieces = _pieces(tokenizer, document.text, tokens)
        examples.append(Example(int(index), int(corpus.copies[index]), document.key, pieces, shown))
    return examples


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str, tokens: np.ndarray) -> tuple[str, ...]:
    """The text cut at its tokens; a character of several tokens stands with the last of them, the end token is named."""
    pieces, done = [], 0
    for start, end in token_offsets(tokenizer, text):
        following = max(done, end)
        pieces.append(text[done:following] if end > start else "")
        done = following if end > start else done
    if pieces:
        pieces[-1] += text[done:]
    pieces += [str(tokenizer.decode([int(token)])) for token in tokens[len(pieces) :]]
    return tuple(pieces)


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
                        "loss": float(one.loss[index]), "recited": [None, False, True][int(one.recited[index]) + 1],
                        "longest_run": int(one.run[index]),
                    } | {f"attack {name}": float(values[index]) for name, values in one.attacks.items()}
                    for one in result.measured
                }  # fmt: skip
                line = {"key": document.key, "copies": int(corpus.copies[index]), "tokens": len(corpus.tokens[index])}
                file.write(json.dumps({**line, "models": models}, ensure_ascii=False) + "\n")
