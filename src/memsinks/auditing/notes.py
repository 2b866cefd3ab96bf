"""What limits the figures of an audit, one sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from memsinks.auditing.attacks import HIDDEN_STATES, is_supervised
from memsinks.auditing.attacks_supervised import LEAST
from memsinks.auditing.figures import FEW, FPRS, Figures
from memsinks.auditing.hidden_states import LEAST as ANCHORED
from memsinks.auditing.measure import Measurement
from memsinks.auditing.model_result import Attack
from memsinks.auditing.uncertainty import ENOUGH, estimate

BLIND_NOTES = {
    "texts alone": "Members and controls differ in their texts alone (AUC {} without any model): loss gap and membership "
    "are not evidence of memory here. Choose controls from the same source.",
    "tokenizer alone": "The tokenizer alone tells members from controls (AUC {}): it cuts them into fewer tokens per "
    "character, as one does that was trained on their copies. Losses per token of both sides are not of one kind.",
}
FAIR = ("twin", "seen once")
"""Roles of models that an audited one should be as."""
BLIND_AUC = 0.55
"""The lower limit of the blind attack's AUC from which members and controls are said to differ."""


def limits(figures: Figures, measured: Sequence[Measurement], blind: Sequence[Attack]) -> tuple[str, ...]:
    """All notes; `measured`: the audited model first."""
    return (
        *_of_the_corpus(figures),
        *_of_blind_attacks(blind),
        *_of_the_models(figures, measured),
        *_of_the_attacks(figures, measured[0], [one for one in measured if one.role in FAIR]),
    )


def _of_the_corpus(figures: Figures) -> Iterator[str]:
    corpus, sides = figures.corpus, (figures.is_target, figures.is_control)
    controls = int(figures.is_control.sum())
    for side, what in zip(sides, ("target documents", "controls"), strict=True):
        if side.sum() < FEW:
            yield f"Only {side.sum()} {what}: intervals over so few documents are rough."
    if not figures.enough:
        yield f"Fewer than {ENOUGH} target documents or controls: only what comes out verbatim is judged, no attack and no gap."
    for fpr in FPRS:
        if controls < 1 / fpr:
            yield f"A true positive rate at {fpr:.1%} needs {round(1 / fpr)} controls, there are {controls}."
    target, control = (float(np.mean([len(corpus.tokens[x]) for x in np.flatnonzero(side)])) for side in sides)
    if not 0.8 < target / control < 1.25:
        yield f"Documents have {target:.0f} tokens on average, controls {control:.0f}: not of one kind."


def _of_blind_attacks(blind: Sequence[Attack]) -> Iterator[str]:
    if not blind:
        yield "Too few documents to ask whether the texts alone tell members from controls."
    for attack in blind:
        if attack.auc.low > BLIND_AUC:
            yield BLIND_NOTES[attack.name].format(attack.auc)


def _of_the_models(figures: Figures, measured: Sequence[Measurement]) -> Iterator[str]:
    vocabulary = 1 + max(int(tokens.max()) for tokens in figures.corpus.tokens)
    audited = _kind(measured[0])
    for one in measured:
        if one.loss[figures.is_control].mean() > np.log(max(2, vocabulary)):
            yield f"{one.name} is worse than guessing evenly on the controls: do weights and tokenizer belong to it?"
        if one.role in FAIR and _kind(one) != audited:
            yield f"The model given as {one.role} ({_kind(one)}) is not of the audited one's architecture ({audited})."
    if len(measured) > 1:
        yield "Intervals are over documents, for these training runs; how much another seed would change is not in them."


def _kind(one: Measurement) -> str:
    return f"{one.facts['model_type']}, {one.facts['parameters']:,} parameters"


def _of_the_attacks(figures: Figures, audited: Measurement, fair: Sequence[Measurement]) -> Iterator[str]:
    if "reference" not in audited.attacks:
        yield "No reference attack: it needs a twin."
    aucs = {name: estimate(*auc) for name, auc in figures.aucs(audited).items() if not is_supervised(name)}
    if not fair and any(auc.high < 0.5 for auc in aucs.values()):
        yield (
            "Members are told from controls in the other direction, as texts that the model knows less of: without a twin it "
            "cannot be said whether they are harder or were pushed away."
        )
    if "supervised" not in audited.attacks:
        yield f"No supervised attack: it needs {LEAST} target documents and {LEAST} controls."
    for one in fair:
        if audited.probes and not one.probes:
            yield f"No changed copies of {one.name}: the audited model's are not shown equivalent to anything."
    if not audited.probes:
        why = "its sinks are open" if audited.state == "open" else "its weights are not floating point numbers"
        yield f"No changed copies of {audited.name}: {why}."
    if "reference" in audited.attacks and HIDDEN_STATES not in audited.attacks:
        yield f"No attack on hidden states: it needs {ANCHORED} controls, and models that give them."
    asked = (audited.recited[figures.is_target] >= 0).mean()
    if asked < 1:
        yield f"{1 - asked:.0%} of the documents are too short for the extraction asked and are left out of it."
