"""One model over all documents and controls: the passes, and from their tables the values of each document."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from memsinks.auditing.attacks import ATTACKS, HIDDEN_STATES, attack_scores
from memsinks.auditing.corpus import Corpus
from memsinks.auditing.extraction import extracted, generate_continuation, log_probability, longest_run
from memsinks.auditing.hidden_states import distances, relations
from memsinks.auditing.own_sinks import placebo_ids
from memsinks.auditing.probes import probe
from memsinks.auditing.scores import DocumentScore, ScoreTable, score
from memsinks.auditing.settings import AuditSettings
from memsinks.auditing.subjects import Role, State, computation_hash, facts
from memsinks.sinks.families import context_of
from memsinks.sinks.opening import documents_closed

logger = logging.getLogger(__name__)
NOT_ASKED = -1
OTHERS = 64
"""Other documents that are read after a document's sinks are closed."""
Grid = dict[tuple[int, int], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The values of each document under one model, documents first, then controls; arrays [n].

    loss: nats per token. recited: 1 / 0, or NOT_ASKED where the document is too short. run: longest verbatim run, tokens.
    log_p: log-probability of the continuation, nan where not asked. grid: recited by (prefix, offset). attacks: by name,
    higher = more like a member. probes: loss under each changed copy, nan where not asked, see `probes`. relations: see
    `hidden_states`. sink_losses: "closed", "own", "placebo" -> [documents], for a model with sinks; own_recited: `recited` with
    their own sinks open, [documents].
    """

    name: str
    role: Role
    state: State
    facts: dict[str, Any]
    loss: np.ndarray
    recited: np.ndarray
    run: np.ndarray
    log_p: np.ndarray
    grid: Grid
    attacks: dict[str, np.ndarray]
    table: ScoreTable = field(repr=False)
    probes: dict[str, np.ndarray] = field(default_factory=dict)
    relations: np.ndarray | None = field(repr=False, default=None)
    generated: dict[str, Any] | None = None
    sink_losses: dict[str, np.ndarray] | None = None
    own_recited: np.ndarray | None = None
    collateral: dict[str, Any] | None = None


Measured = Measurement


@dataclass(frozen=True)
class Passes:
    """Teacher-forced passes of one model over texts of the corpus, each kept in a folder of its own.

    weights: `computation_hash` of the model.
    own: int64 [n], the ids whose sinks are open in the state that is audited; None = closed, or no sinks.
    """

    model: PreTrainedModel
    corpus: Corpus
    settings: AuditSettings
    folder: Path
    name: str
    weights: str
    own: np.ndarray | None

    def __call__(self, what: str, tokens: Sequence[np.ndarray], ids: np.ndarray | None) -> ScoreTable:
        """Scores of `tokens`, with the sinks of `ids` open; int64, one for each."""
        return score(
            self.model,
            tokens,
            self.folder / what,
            start=self.corpus.start,
            open_ids=None if ids is None else ids.tolist(),
            key={"weights": self.weights, "texts": self.corpus.sha256, "end": self.settings.end},
            batch_tokens=self.settings.batch_tokens,
            label=f"{self.name}: {what}",
        )


def measure(
    model: PreTrainedModel,
    corpus: Corpus,
    settings: AuditSettings,
    folder: Path,
    *,
    name: str,
    role: Role,
    state: State,
    reference: Measurement | None = None,
    generated: bool = False,
    models: int = 1,
) -> Measurement:
    """Score one model and reduce its tables to values of each document.

    Args:
        folder: for the tables, one folder below it for each pass.
        reference: a model that never saw the documents; None = no attack that needs one.
        generated: also generate the most repeated documents.
        models: how many are measured, for the time that is said.
    """
    known = facts(model)
    own = corpus.ids if state == "open" else None
    passes = Passes(model, corpus, settings, folder, name, computation_hash(model, known["weights_sha256"]), own)
    table = passes("scores", corpus.tokens, own)
    values = _values(table, corpus, settings)
    stands = (
        relations(model, corpus, own=own, batch_tokens=settings.batch_tokens) if reference or role == "twin" else None
    )
    attacks = attack_scores(table, reference.table if reference else None, corpus, settings)
    if stands is not None and reference is not None and reference.relations is not None:
        attacks[HIDDEN_STATES] = distances(stands, reference.relations)
    sink_losses = own_recited = collateral = None
    if state != "absent" and not (corpus.ids[: corpus.members] < 0).any():
        sink_losses, own_recited = _of_sinks(passes, state, values)
        collateral = _collateral(passes, sink_losses["own"])
    return Measurement(
        name=name,
        role=role,
        state=state,
        facts=known,
        **values,
        grid=_grid(passes, table),
        attacks={name: attacks[name] for name in ATTACKS if name in attacks},
        table=table,
        probes={}
        if state == "open"
        else probe(model, corpus, settings, folder / "probes", name=name, weights=passes.weights, models=models),
        relations=stands,
        generated=_generated(passes, values["recited"]) if generated and settings.generate else None,
        sink_losses=sink_losses,
        own_recited=own_recited,
        collateral=collateral,
    )


def _values(table: ScoreTable, corpus: Corpus, settings: AuditSettings) -> dict[str, np.ndarray]:
    """Loss, recitation, longest run and log-probability of the continuation of each document; [n] each."""
    columns: dict[str, list[float]] = {name: [] for name in ("loss", "recited", "run", "log_p")}
    for index, one in enumerate(table):
        start, length = _continuation(corpus, settings, index)
        log_p = log_probability(one, start, length)
        columns["loss"].append(one.loss)
        columns["recited"].append(_asked(extracted(one, start, length)))
        columns["run"].append(longest_run(one))
        columns["log_p"].append(np.nan if log_p is None else log_p)
    return {name: np.array(column) for name, column in columns.items()}


def _continuation(corpus: Corpus, settings: AuditSettings, index: int) -> tuple[int, int | None]:
    """First token and number of tokens (None = to the end) of what must come out of a document."""
    return (settings.prefix, settings.continuation) if corpus.private is None else (corpus.private[index], None)


def _asked(hit: bool | None) -> int:
    return NOT_ASKED if hit is None else int(hit)


def _grid(passes: Passes, table: ScoreTable) -> Grid:
    """Recited after each prefix from each offset on; [n] by (prefix, offset)."""
    prefixes, continuation, grid = passes.settings.prefixes, passes.settings.continuation, {}
    if 0 in passes.settings.offsets and prefixes:
        hits = np.array([[_asked(extracted(one, prefix, continuation)) for prefix in prefixes] for one in table])
        grid = {(prefix, 0): hits[:, place] for place, prefix in enumerate(prefixes)}
    for offset in (x for x in passes.settings.offsets if x):
        for prefix in prefixes:
            grid[prefix, offset] = _at_offset(passes, prefix, offset)
    return grid


def _at_offset(passes: Passes, prefix: int, offset: int) -> np.ndarray:
    """Recited after `prefix` tokens from `offset` on, read without anything before; [n]."""
    tokens, own = passes.corpus.tokens, passes.own
    continuation = passes.settings.continuation
    end = offset + prefix + continuation
    long = np.flatnonzero([len(x) >= end for x in tokens])
    result = np.full(len(tokens), NOT_ASKED)
    if len(long):
        pieces = [tokens[index][offset:end] for index in long]
        table = passes(f"offset-{offset}-{prefix}", pieces, None if own is None else own[long])
        result[long] = [_asked(extracted(one, prefix, continuation)) for one in table]
    return result


def _generated(passes: Passes, recited: np.ndarray) -> dict[str, Any]:
    """Greedy generation of the most repeated documents beside the teacher-forced answer."""
    corpus, settings = passes.corpus, passes.settings
    order = np.argsort(-corpus.copies[: corpus.members], kind="stable")
    limit, ends = context_of(passes.model.config), {}
    for index in order:
        start, length = _continuation(corpus, settings, index)
        ends[index] = len(corpus.start) + (len(corpus.tokens[index]) if length is None else start + length)
    asked = [index for index in order if recited[index] != NOT_ASKED]
    chosen = [index for index in asked if ends[index] <= limit][: settings.generate]
    if len(chosen) < min(len(asked), settings.generate):
        logger.warning("%s: texts that end beyond the context of %d tokens are not generated", passes.name, limit)
    hits, agree = 0, 0
    for index in chosen:
        tokens = corpus.tokens[index]
        start, length = _continuation(corpus, settings, index)
        truth = tokens[start:] if length is None else tokens[start : start + length]
        prompt = np.concatenate([corpus.start, tokens[:start]])
        opened = None if passes.own is None else int(passes.own[index])
        hit = generate_continuation(passes.model, prompt, len(truth), opened).tolist() == truth.tolist()
        hits += hit
        agree += hit == bool(recited[index])
    return {"documents": len(chosen), "recited": hits, "agrees_with_teacher_forced": agree}


def _of_sinks(
    passes: Passes, state: State, values: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Loss of each document, controls apart, with sinks closed, with its own and with another document's open; and whether it
    is recited with its own."""
    members = passes.corpus.members
    ids = passes.corpus.ids[:members]
    opened = {"closed": None, "own": ids, "placebo": placebo_ids(ids)}
    here = {"closed": "closed", "open": "own"}[state]
    found = {
        which: values
        if which == here
        else _values(passes(which, passes.corpus.tokens[:members], wanted), passes.corpus, passes.settings)
        for which, wanted in opened.items()
    }
    return {which: one["loss"][:members] for which, one in found.items()}, found["own"]["recited"][:members]


def _collateral(passes: Passes, own: np.ndarray) -> dict[str, Any] | None:
    """What closing one document's sinks does to it and to others that are read with their own sinks, nats per token."""
    corpus, settings = passes.corpus, passes.settings
    repeated = np.flatnonzero(corpus.copies[: corpus.members] > 1)
    if len(np.unique(corpus.ids[repeated])) < 2 or not settings.collateral:
        return None
    rng = np.random.default_rng(settings.seed)
    taken = rng.permutation(repeated)[: settings.collateral]
    itself, others = [], []
    for index in taken:
        rest = repeated[corpus.ids[repeated] != corpus.ids[index]]
        sample = np.concatenate([[index], rng.permutation(rest)[:OTHERS]])
        with documents_closed(passes.model, [int(corpus.ids[index])]):
            table = passes(f"without-{index}", [corpus.tokens[x] for x in sample], corpus.ids[sample])
        rise = np.array([one.loss for one in table]) - own[sample]
        itself.append(rise[0])
        others.extend(rise[1:])
    return {
        "closed": len(taken),
        "rise_itself": float(np.mean(itself)),
        "rise_others": float(np.mean(others)),
        "rise_others_most": float(np.max(others)),
        "others": len(others),
    }


def token_probabilities(one: DocumentScore, tokens: int) -> np.ndarray:
    """Probability of each token of a document, float64 [tokens]; nan for one that was not predicted."""
    result = np.full(tokens, np.nan)
    result[one.first : one.first + len(one.logprob)] = np.exp(one.logprob.astype(np.float64))
    return result
