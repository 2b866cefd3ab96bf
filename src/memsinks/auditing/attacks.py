"""All membership attacks of the audit, from the token scores of a model and of a reference.

None of these costs a forward pass beyond those tables; the one on `hidden_states`, which is made beside them, costs one. For
10,000 documents of 200 tokens the others and their intervals together take about 15 s a model on one core.
"""

from __future__ import annotations

import numpy as np

from memsinks.auditing.attacks_reference import (
    differences,
    error_zone_attack,
    reference_attack,
    spread_attack,
    two_sided_attack,
    window_votes_attack,
)
from memsinks.auditing.attacks_supervised import (
    DIFFERENCE_RANGE,
    LEAST,
    LOSS_RANGE,
    summary,
    supervised_attack,
)
from memsinks.auditing.corpus import Corpus
from memsinks.auditing.membership import loss_attack, min_k_attack, min_k_plus_attack, zlib_attack
from memsinks.auditing.scores import ScoreTable
from memsinks.auditing.settings import AuditSettings

HIDDEN_STATES = "reference, hidden states"
ATTACKS = {
    "loss": "mean log-probability of a token",
    "zlib": "log-probability of the text over the bytes it compresses to",
    "min-k": "mean log-probability of the least likely tokens",
    "min-k++": "the same, against what the model expects at each place",
    "supervised": "logistic regression on how the token losses lie, learned from other members and controls",
    "reference": "mean of the token differences to the twin",
    "reference, two-sided": "distance of that mean from the controls' median, in either direction",
    "reference, spread": "standard deviation of the token differences",
    "reference, error zone": "gains over gains and losses, of the tokens that are not the first choice (EZ-MIA)",
    "reference, window votes": "share of windows of tokens in which the model is surer than the twin",
    HIDDEN_STATES: "distance of the mean hidden states from the twin's, as seen from other texts",
    "reference, supervised": "logistic regression on how the token differences lie, learned from other members and controls",
}
"""Name of each attack, in the order of the report, and what it looks at. Those named "reference" need a twin."""


def uses_reference(name: str) -> bool:
    """Whether an attack needs a twin."""
    return name.startswith("reference")


def is_supervised(name: str) -> bool:
    """Whether an attack needs labeled members."""
    return name.endswith("supervised")


def attack_scores(
    table: ScoreTable, reference: ScoreTable | None, corpus: Corpus, settings: AuditSettings
) -> dict[str, np.ndarray]:
    """The score of each document under each attack that can be made, [n] by name; higher = more like a member.

    Args:
        reference: scores of the corpus under a model that never saw the documents; None = no attack that needs them. The
            supervised attacks need `LEAST` target documents and as many controls.
    """
    scores = _alone(table, corpus, settings)
    if reference is not None:
        scores |= _against(table, reference, corpus, settings)
    return {name: scores[name] for name in ATTACKS if name in scores}


def _alone(table: ScoreTable, corpus: Corpus, settings: AuditSettings) -> dict[str, np.ndarray]:
    rows, features = [], []
    for one, document in zip(table, corpus.documents, strict=True):
        rows.append(
            (
                loss_attack(one),
                zlib_attack(one, document.text),
                min_k_attack(one, settings.k),
                min_k_plus_attack(one, settings.k),
            )
        )
        features.append(summary(-one.logprob.astype(np.float64), *LOSS_RANGE))
    scores: dict[str, np.ndarray] = dict(zip(("loss", "zlib", "min-k", "min-k++"), np.array(rows).T, strict=True))
    return scores | _supervised("supervised", features, corpus, settings)


def _against(
    table: ScoreTable, reference: ScoreTable, corpus: Corpus, settings: AuditSettings
) -> dict[str, np.ndarray]:
    rows, features = [], []
    for one, other in zip(table, reference, strict=True):
        difference = differences(one, other)
        rows.append(
            (
                reference_attack(one, other),
                spread_attack(difference),
                error_zone_attack(one, difference),
                window_votes_attack(difference),
            )
        )
        features.append(summary(difference, *DIFFERENCE_RANGE))
    names = ("reference", "reference, spread", "reference, error zone", "reference, window votes")
    scores: dict[str, np.ndarray] = dict(zip(names, np.array(rows).T, strict=True))
    if corpus.control.sum() > 1:
        scores["reference, two-sided"] = two_sided_attack(scores["reference"], corpus.control)
    return scores | _supervised("reference, supervised", features, corpus, settings)


def _supervised(
    name: str, features: list[np.ndarray], corpus: Corpus, settings: AuditSettings
) -> dict[str, np.ndarray]:
    """The supervised attack of this name; none with too few documents."""
    if min(corpus.target.sum(), corpus.control.sum()) < LEAST:
        return {}
    return {name: supervised_attack(np.array(features), corpus.target, corpus.control, settings.seed)}
