"""One model over all documents and controls: the pass, and from its table the values of each document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memsinks.auditing.extraction import extracted, generate_continuation, log_probability, longest_run
from memsinks.auditing.membership import loss_attack, min_k_attack, min_k_plus_attack, zlib_attack
from memsinks.auditing.own_sinks import placebo_ids
from memsinks.auditing.scores import DocumentScore, ScoreTable, score
from memsinks.auditing.subjects import Role, State, facts
from memsinks.batch import NO_SINKS
from memsinks.data.documents import Document, texts_hash
from memsinks.data.identity import identify
from memsinks.data.tokens import encode
from memsinks.errors import DataError, refuse
from memsinks.sinks.opening import documents_closed

NOT_ASKED = -1
OTHERS = 64
"""Other documents that are read after a document's sinks are closed."""


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """How an audit is made.

    Args:
        prefix, continuation: tokens given and tokens that must come out, for the main figure of extraction.
        prefixes, offsets: also asked: `continuation` tokens after every prefix length at every offset, the model reading
            nothing before the offset. Offsets other than 0 cost a pass over those tokens each.
        identity: how documents got their ids in training, for open sinks.
        end: whether each document ends with the tokenizer's end token, as in training with `pack`.
        k: share of tokens Min-K% and Min-K%++ look at.
        queries_p: probability p of (n, p)-extraction.
        generate: how many of the most repeated documents are also generated, to check the teacher-forced figure.
        collateral: how many documents' sinks are closed, one after the other, to see what others lose.
        shown: how many of the most remembered documents stand in the report with their text; 0 keeps all text out.
        margin_loss, margin_auc: margins of the equivalence tests, nats per token and AUC.
        resamples, seed: of the bootstrap over documents.
        batch_tokens: tokens in one forward; None = chosen from the size of the vocabulary.

    Raises:
        ConfigError: listing every problem at once.
    """

    prefix: int = 32
    continuation: int = 32
    prefixes: tuple[int, ...] = (8, 16, 32, 64)
    offsets: tuple[int, ...] = (0,)
    identity: Literal["content", "key", "source"] = "content"
    end: bool = True
    k: float = 0.2
    queries_p: float = 0.5
    generate: int = 16
    collateral: int = 8
    shown: int = 6
    margin_loss: float = 0.03
    margin_auc: float = 0.03
    resamples: int = 1000
    seed: int = 0
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("prefixes", "offsets"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        problems = []
        least = {
            "prefix": 1,
            "continuation": 1,
            "generate": 0,
            "collateral": 0,
            "shown": 0,
            "resamples": 100,
            "seed": 0,
        }
        for name, lowest in least.items():
            if not isinstance(getattr(self, name), int) or getattr(self, name) < lowest:
                problems.append(f"{name} must be an int of at least {lowest}, got {getattr(self, name)!r}")
        for name, lowest in (("prefixes", 1), ("offsets", 0)):
            if not all(isinstance(x, int) and x >= lowest for x in getattr(self, name)):
                problems.append(f"{name} must be ints of at least {lowest}, got {getattr(self, name)!r}")
        for name in ("k", "queries_p"):
            if not 0 < getattr(self, name) < 1:
                problems.append(f"{name} must lie in (0, 1), got {getattr(self, name)!r}")
        for name in ("margin_loss", "margin_auc"):
            if not getattr(self, name) > 0:
                problems.append(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            problems.append(f"batch_tokens must be at least 1, got {self.batch_tokens}")
        if self.identity not in ("content", "key", "source"):
            problems.append(f'identity must be "content", "key" or "source", got {self.identity!r}')
        refuse(problems, "invalid AuditSettings")


@dataclass(frozen=True)
class Corpus:
    """Documents and controls in tokens, documents first.

    tokens: int32 [tokens of the document] each. copies: int64 [n], 0 for controls. ids: int64 [n].
    start: int64 [0 or 1], the tokenizer's start token. private: for each the token at which its private part begins, or
    None where the main figure asks for `continuation` tokens after `prefix`.
    """

    documents: list[Document]
    members: int
    tokens: list[np.ndarray]
    copies: np.ndarray
    ids: np.ndarray
    start: np.ndarray
    private: list[int] | None
    sha256: str

    @property
    def control(self) -> np.ndarray:
        """Which entries are controls, bool [n]."""
        return np.arange(len(self.tokens)) >= self.members

    @property
    def target(self) -> np.ndarray:
        """The documents that summary figures are over, bool [n]: those with 2 copies or more, or all if there are none."""
        repeated = (self.copies > 1) & ~self.control
        return repeated if repeated.any() else ~self.control

    @property
    def target_name(self) -> str:
        """`target` in words."""
        return "all documents" if (self.target | self.control).all() else "documents with 2 copies or more"


@dataclass
class Measured:
    """The values of each document under one model, documents first, then controls; arrays [n].

    loss: nats per token. recited: 1 / 0, or NOT_ASKED where the document is too short. run: longest verbatim run, tokens.
    grid: recited by (prefix, offset). log_p: log-probability of the continuation, nan where not asked. attacks: by name,
    higher = more like a member. sink_losses: "closed", "own", "placebo" -> [documents], for a model with sinks.
    """

    name: str
    role: Role
    state: State
    facts: dict[str, Any]
    loss: np.ndarray
    recited: np.ndarray
    run: np.ndarray
    log_p: np.ndarray
    grid: dict[tuple[int, int], np.ndarray]
    attacks: dict[str, np.ndarray]
    table: ScoreTable = field(repr=False)
    generated: dict[str, Any] | None = None
    sink_losses: dict[str, np.ndarray] | None = None
    collateral: dict[str, Any] | None = None


def read_corpus(
    documents: Sequence[Document],
    controls: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    settings: AuditSettings,
    private_start: Callable[[Document], int] | None = None,
    document_ids: Sequence[int] | np.ndarray | None = None,
) -> Corpus:
    """Check both sides and encode them.

    Raises:
        DataError: an empty side, a document with 0 copies, texts on both sides (listed), a text without tokens; a
            `private_start` outside its text; not one id for each document and control.
    """
    if not documents or not controls:
        raise DataError(
            f"an audit needs both sides: {len(documents)} documents and {len(controls)} controls were given"
        )
    unseen = sum(document.copies == 0 for document in documents)
    if unseen:
        raise DataError(f"{unseen} of the documents have 0 copies, so they were not trained on; give them as controls")
    both = sorted({document.text for document in documents} & {document.text for document in controls})
    if both:
        shown = ", ".join(repr(text[:60]) for text in both[:5]) + (" ..." if len(both) > 5 else "")
        raise DataError(f"{len(both)} texts are documents and controls at once, take them out of one side: {shown}")
    everything = [*documents, *controls]
    tokens = [one.astype(np.int32) for one in encode(tokenizer, (x.text for x in everything), end=settings.end)]
    private = None
    if private_start is not None:
        offsets = [private_start(document) for document in everything]
        outside = [
            f"{at} of {len(x.text)}" for at, x in zip(offsets, everything, strict=True) if not 0 <= at < len(x.text)
        ]
        if outside:
            raise DataError(
                f"private_start must lie within the text; for {len(outside)} texts it does not (offset of characters): "
                + ", ".join(outside[:5])
            )
        prompts = iter(
            encode(tokenizer, [x.text[:at] for at, x in zip(offsets, everything, strict=True) if at], end=False)
        )
        private = [_agreeing(next(prompts), own) if at else 0 for at, own in zip(offsets, tokens, strict=True)]
    return Corpus(
        everything, len(documents), tokens,
        np.array([x.copies for x in documents] + [0] * len(controls)),
        _ids(everything, settings.identity, document_ids),
        start_tokens(tokenizer), private, texts_hash(everything),
    )  # fmt: skip


def _agreeing(prompt: np.ndarray, tokens: np.ndarray) -> int:
    """How many tokens of a prompt are the document's: one across the boundary belongs to the private part."""
    both = min(len(prompt), len(tokens))
    return int((prompt[:both] == tokens[:both]).cumprod().sum())


def _ids(
    documents: list[Document], identity: Literal["content", "key", "source"], given: Sequence[int] | np.ndarray | None
) -> np.ndarray:
    """Document ids, int64 [n]: those given, or made as in training; all -1 where a document has no such key or source."""
    if given is not None:
        if len(given) != len(documents):
            raise DataError(f"{len(given)} document_ids for {len(documents)} documents and controls; give one for each")
        return np.asarray(given, np.int64)
    if identity == "content" or all(getattr(document, identity) is not None for document in documents):
        return identify(documents, identity)[0]
    return np.full(len(documents), NO_SINKS)


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The start token, int64 [1], where the tokenizer puts one before every text by itself (Llama, Gemma); else [0].

    A model that was trained with it is scored with it: without, its losses are those of another model.
    """
    first = tokenizer("a")["input_ids"][:1]
    return np.array(first if first == [tokenizer.bos_token_id] else [], np.int64)


def measure(
    model: PreTrainedModel,
    corpus: Corpus,
    settings: AuditSettings,
    folder: Path,
    *,
    name: str,
    role: Role,
    state: State,
    reference: np.ndarray | None = None,
    generated: bool = False,
    progress: bool = False,
) -> Measured:
    """Score one model and reduce its table to values of each document.

    Args:
        folder: for the tables, one folder below it for each pass.
        reference: [n], loss of each document under a model that never saw them; None = no reference attack.
        generated: also generate the most repeated documents.
        progress: show a bar for each pass, where there is a terminal.
    """
    known = facts(model)
    key = {"weights": known["weights_sha256"], "texts": corpus.sha256, "end": settings.end}

    def passed(what: str, tokens: Sequence[np.ndarray], ids: np.ndarray | None) -> ScoreTable:
        with tqdm(
            total=len(tokens),
            desc=f"{name}: {what}",
            unit=" documents",
            disable=None if progress else True,
            leave=False,
        ) as bar:
            return score(
                model, tokens, folder / what, start=corpus.start, open_ids=None if ids is None else ids.tolist(),
                key=key, batch_tokens=settings.batch_tokens, progress=bar.update,
            )  # fmt: skip

    own = corpus.ids if state == "open" else None
    table = passed("scores", corpus.tokens, own)
    columns: dict[str, list[Any]] = {x: [] for x in ("loss", "recited", "run", "log_p")}
    attacks: dict[str, list[float]] = {x: [] for x in ("loss", "zlib", "min-k", "min-k++")}
    grid: dict[tuple[int, int], list[int]] = {(prefix, 0): [] for prefix in settings.prefixes if 0 in settings.offsets}
    for index, (one, document) in enumerate(zip(table, corpus.documents, strict=True)):
        start, length = (
            (settings.prefix, settings.continuation) if corpus.private is None else (corpus.private[index], None)
        )
        log_p = log_probability(one, start, length)
        columns["loss"].append(one.loss)
        columns["recited"].append(_asked(extracted(one, start, length)))
        columns["run"].append(longest_run(one))
        columns["log_p"].append(np.nan if log_p is None else log_p)
        attacks["loss"].append(loss_attack(one))
        attacks["zlib"].append(zlib_attack(one, document.text))
        attacks["min-k"].append(min_k_attack(one, settings.k))
        attacks["min-k++"].append(min_k_plus_attack(one, settings.k))
        for prefix, offset in grid:
            grid[prefix, offset].append(_asked(extracted(one, prefix, settings.continuation)))
    values: dict[str, Any] = {name: np.array(column) for name, column in columns.items()}
    found = {name: np.array(column) for name, column in attacks.items()}
    if reference is not None:
        found["reference"] = reference - values["loss"]
    squares = {place: np.array(column) for place, column in grid.items()}
    for offset in (x for x in settings.offsets if x):
        for prefix in settings.prefixes:
            squares[prefix, offset] = _at_offset(passed, corpus, own, prefix, offset, settings.continuation)
    measured = Measured(name, role, state, known, **values, grid=squares, attacks=found, table=table)
    if generated and settings.generate:
        measured.generated = _generated(model, corpus, settings, measured)
    if state != "absent" and not (corpus.ids[: corpus.members] < 0).any():
        ids = corpus.ids[: corpus.members]
        members = corpus.tokens[: corpus.members]
        states = {"closed": None, "own": ids, "placebo": placebo_ids(ids)}
        here = {"closed": "closed", "open": "own"}[state]
        measured.sink_losses = {
            which: values["loss"][: corpus.members] if which == here
            else np.array([one.loss for one in passed(which, members, opened)])
            for which, opened in states.items()
        }  # fmt: skip
        measured.collateral = _collateral(model, corpus, settings, measured.sink_losses["own"], passed)
    return measured


def _asked(hit: bool | None) -> int:
    return NOT_ASKED if hit is None else int(hit)


def _at_offset(
    passed: Callable[..., ScoreTable], corpus: Corpus, own: np.ndarray | None, prefix: int, offset: int, continuation: int
) -> np.ndarray:  # fmt: skip
    """Recited after `prefix` tokens from `offset` on, read without anything before; [n]."""
    end = offset + prefix + continuation
    long = np.flatnonzero([len(tokens) >= end for tokens in corpus.tokens])
    result = np.full(len(corpus.tokens), NOT_ASKED)
    if len(long):
        pieces = [corpus.tokens[index][offset:end] for index in long]
        table = passed(f"offset-{offset}-{prefix}", pieces, None if own is None else own[long])
        result[long] = [_asked(extracted(one, prefix, continuation)) for one in table]
    return result


def _generated(model: PreTrainedModel, corpus: Corpus, settings: AuditSettings, measured: Measured) -> dict[str, Any]:
    """Greedy generation of the most repeated documents beside the teacher-forced answer."""
    order = np.argsort(-corpus.copies[: corpus.members], kind="stable")
    chosen = [index for index in order if measured.recited[index] != NOT_ASKED][: settings.generate]
    hits, agree = 0, 0
    for index in chosen:
        tokens = corpus.tokens[index]
        start = settings.prefix if corpus.private is None else corpus.private[index]
        truth = tokens[start:] if corpus.private is not None else tokens[start : start + settings.continuation]
        prompt = np.concatenate([corpus.start, tokens[:start]])
        out = generate_continuation(
            model, prompt, len(truth), int(corpus.ids[index]) if measured.state == "open" else None
        )
        hit = out.tolist() == truth.tolist()
        hits += hit
        agree += hit == bool(measured.recited[index])
    return {"documents": len(chosen), "recited": hits, "agrees_with_teacher_forced": agree}


def _collateral(
    model: PreTrainedModel, corpus: Corpus, settings: AuditSettings, own: np.ndarray, passed: Callable[..., ScoreTable]
) -> dict[str, Any] | None:
    """What closing one document's sinks does to it and to others that are read with their own sinks, nats per token."""
    repeated = np.flatnonzero(corpus.copies[: corpus.members] > 1)
    if len(np.unique(corpus.ids[repeated])) < 2 or not settings.collateral:
        return None
    rng = np.random.default_rng(settings.seed)
    taken = rng.permutation(repeated)[: settings.collateral]
    itself, others = [], []
    for index in taken:
        rest = repeated[corpus.ids[repeated] != corpus.ids[index]]
        sample = np.concatenate([[index], rng.permutation(rest)[:OTHERS]])
        with documents_closed(model, [int(corpus.ids[index])]):
            table = passed(f"without-{index}", [corpus.tokens[x] for x in sample], corpus.ids[sample])
        rise = np.array([one.loss for one in table]) - own[sample]
        itself.append(rise[0])
        others.extend(rise[1:])
    return {
        "closed": len(taken), "rise_itself": float(np.mean(itself)), "rise_others": float(np.mean(others)),
        "rise_others_most": float(np.max(others)), "others": len(others),
    }  # fmt: skip


def token_probabilities(one: DocumentScore, tokens: int) -> np.ndarray:
    """Probability of each token of a document, float64 [tokens]; nan for one that was not predicted."""
    result = np.full(tokens, np.nan)
    result[one.first : one.first + len(one.logprob)] = np.exp(one.logprob.astype(np.float64))
    return result
