"""From the values of each document to figures with intervals: a line for each number of copies, each attack, each test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from memsinks.auditing.attacks import is_supervised
from memsinks.auditing.attacks_supervised import labeled_members
from memsinks.auditing.corpus import Corpus
from memsinks.auditing.extraction import canary_exposure, log10_queries
from memsinks.auditing.forgetting import counterfactual_closure, gap_closed, loss_gap, price
from memsinks.auditing.measure import NOT_ASKED, Measurement
from memsinks.auditing.membership import auc, blind_scores, tokenizer_attack, tpr_at_fpr, weighted_auc, word_numbers
from memsinks.auditing.model_result import Attack, AuditLine, ExtractionLine, Forgetting, ModelResult, Probe, SinkLine
from memsinks.auditing.result import gap_after
from memsinks.auditing.settings import AuditSettings
from memsinks.auditing.uncertainty import (
    AT_ONCE,
    ENOUGH,
    UNKNOWN,
    Equivalence,
    Estimate,
    Resamples,
    equivalence,
    estimate,
    strata,
    wilson,
)

FPRS = (0.01, 0.001)
QUERIES = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
FEW = 30
"""Documents below which an interval over documents is called out."""
FOLDS = 5
"""Of the blind attack; fewer documents on a side are too few for it."""


def _recited(hits: np.ndarray) -> tuple[int, Estimate]:
    """How many documents were asked and the share of them that came out; hits: 1 / 0 / NOT_ASKED."""
    asked = int((hits != NOT_ASKED).sum())
    return asked, wilson(int((hits == 1).sum()), asked)


class Sampled(NamedTuple):
    """A figure, and its value in each resample, [resamples]."""

    value: float
    resampled: np.ndarray


def combined(figure: Callable[..., Any], *parts: Sampled) -> Sampled:
    """A figure of figures, in each resample too."""
    return Sampled(float(figure(*(x.value for x in parts))), figure(*(x.resampled for x in parts)))


class Figures:
    """Computes results of models over one corpus, all on the same resamples."""

    def __init__(self, corpus: Corpus, settings: AuditSettings) -> None:
        self.corpus, self.settings = corpus, settings
        self.is_control, self.is_target = corpus.control, corpus.target
        groups = strata(np.where(self.is_control, -1, corpus.copies), ~self.is_target)
        self.resamples = Resamples(groups, settings.resamples, settings.seed)
        self.enough = min(self.is_target.sum(), self.is_control.sum()) >= ENOUGH
        self._aucs: dict[int, tuple[Measurement, dict[str, Sampled]]] = {}

    def auc(self, values: np.ndarray) -> Sampled:
        """AUC of target documents against controls; values [n]."""
        chosen = [values[self.is_target], values[self.is_control]]
        weights = [self.resamples.weights[:, x] for x in (self.is_target, self.is_control)]
        parts = [
            weighted_auc(*chosen, *(x[at : at + AT_ONCE] for x in weights)) for at in range(0, len(weights[0]), AT_ONCE)
        ]
        return Sampled(auc(*chosen), np.concatenate(parts))

    def attack(self, name: str, values: np.ndarray, sampled: Sampled | None = None) -> Attack:
        """AUC (`sampled`, if it is known already) and true positive rates of one attack; values [n]."""
        sides = values[self.is_target], values[self.is_control]
        return Attack(
            name=name,
            auc=estimate(*(sampled or self.auc(values))),
            tpr={f"{fpr:.1%}": tpr_at_fpr(*sides, fpr) for fpr in FPRS},
            labeled=labeled_members(len(sides[0])) if is_supervised(name) else 0,
        )

    def aucs(self, one: Measurement) -> dict[str, Sampled]:
        """AUC of each attack on a model, computed once."""
        if id(one) not in self._aucs:
            self._aucs[id(one)] = one, {name: self.auc(values) for name, values in one.attacks.items()}
        return self._aucs[id(one)][1]

    def blind(self) -> tuple[Attack, ...]:
        """The attacks that ask no model: on the texts alone, on the tokenizer alone; none with too few documents."""
        corpus = self.corpus
        target, control = np.flatnonzero(self.is_target), np.flatnonzero(self.is_control)
        if min(len(target), len(control)) < FOLDS:
            return ()
        words = word_numbers(document.text for document in corpus.documents)
        values = np.zeros(len(corpus.tokens))
        values[target], values[control] = blind_scores(
            *([words[x] for x in side] for side in (target, control)), folds=FOLDS
        )
        lengths = [
            tokenizer_attack(len(x), document.text) for x, document in zip(corpus.tokens, corpus.documents, strict=True)
        ]
        return self.attack("texts alone", values), self.attack("tokenizer alone", np.array(lengths))

    def mean(self, values: np.ndarray, chosen: np.ndarray) -> Sampled:
        """Mean over the chosen documents; values, chosen [n]."""
        return Sampled(float(values[chosen].mean()), self.resamples.means(values, chosen))

    def gap(self, one: Measurement) -> Sampled:
        """Loss gap of one model, nats per token."""
        return combined(loss_gap, self.mean(one.loss, self.is_control), self.mean(one.loss, self.is_target))

    def gap_of_probe(self, values: np.ndarray) -> Sampled:
        """Loss gap of a changed copy, over the texts it was asked for; values [n], nan where not."""
        asked = ~np.isnan(values)
        sides = self.is_control & asked, self.is_target & asked
        if not all(side.any() for side in sides):
            return Sampled(np.nan, np.full(self.settings.resamples, np.nan))
        return combined(loss_gap, *(self.mean(values, side) for side in sides))

    def _probe(self, name: str, values: np.ndarray) -> Probe:
        documents, controls = (int((~np.isnan(values) & side).sum()) for side in (self.is_target, self.is_control))
        return Probe(name, estimate(*self.gap_of_probe(values)), documents, controls)

    def model(
        self, one: Measurement, against: Measurement | None, twin: Measurement | None, fair: Sequence[Measurement]
    ) -> ModelResult:
        """All figures of one model; `fair`: the models that it should be equivalent to."""
        copies = np.where(self.is_control, 0, self.corpus.copies)
        levels = [int(level) for level in np.unique(copies)]
        return ModelResult(
            name=one.name,
            role=one.role,
            state=one.state,
            facts=one.facts,
            lines=tuple(self._line(one, level, copies == level) for level in levels),
            extraction=tuple(
                ExtractionLine(level, prefix, offset, *_recited(one.grid[prefix, offset][copies == level]))
                for prefix, offset in sorted(one.grid, key=lambda place: place[::-1])
                for level in levels
            ),
            queries={str(level or "controls"): self._queries(one.log_p[copies == level]) for level in levels},
            documents=estimate(*self.mean(one.loss, self.is_target)),
            controls=estimate(*self.mean(one.loss, self.is_control)),
            gap=estimate(*self.gap(one)),
            attacks=tuple(self.attack(name, one.attacks[name], auc) for name, auc in self.aucs(one).items()),
            probes=tuple(self._probe(name, values) for name, values in one.probes.items()),
            forgetting=None if against is None or one is against else self._forgetting(one, against, twin),
            equivalences=tuple(test for other in fair if other is not one for test in self._equivalences(one, other)),
            generated=one.generated,
            sinks=self._sinks(one, copies),
            collateral=one.collateral,
        )

    def _line(self, one: Measurement, level: int, chosen: np.ndarray) -> AuditLine:
        asked, extracted = _recited(one.recited[chosen])
        runs = one.run[chosen]
        return AuditLine(
            copies=level,
            documents=int(chosen.sum()),
            loss=estimate(*self.mean(one.loss, chosen)),
            asked=asked,
            extracted=extracted,
            longest_run=(float(runs.mean()), int(runs.max())),
            canary_exposure=self._exposure(one, chosen),
        )

    def _exposure(self, one: Measurement, chosen: np.ndarray) -> float | None:
        canary = np.array([document.kind == "canary" for document in self.corpus.documents])
        candidates = one.loss[canary & self.is_control]
        inserted = one.loss[canary & chosen & ~self.is_control]
        if not len(candidates) or not len(inserted):
            return None
        return float(np.mean([canary_exposure(loss, candidates) for loss in inserted]))

    def _queries(self, log_p: np.ndarray) -> dict[int, float]:
        """Share of documents that n samples recite at least once with probability `queries_p`, by n."""
        asked = log_p[~np.isnan(log_p)]
        needed = np.array([log10_queries(x, self.settings.queries_p) for x in asked])
        return {n: float((needed <= np.log10(n) + 1e-9).mean()) if len(asked) else float("nan") for n in QUERIES}

    def _forgetting(self, one: Measurement, against: Measurement, twin: Measurement | None) -> Forgetting:
        documents, standard = (self.mean(x.loss, self.is_target) for x in (one, against))
        controls, standard_controls = (self.mean(x.loss, self.is_control) for x in (one, against))
        closure = None
        if twin is not None:
            unseen = self.mean(twin.loss, self.is_target)
            closure = estimate(*combined(counterfactual_closure, documents, standard, unseen))
        before = self.gap(against)
        there = estimate(*before).low > 0  # a gap of the ordinary model, as far as its interval shows
        return Forgetting(
            gap_closed=estimate(*combined(gap_closed, self.gap(one), before)) if there else UNKNOWN,
            price=estimate(*combined(price, controls, standard_controls)),
            closure=closure,
        )

    def _equivalences(self, one: Measurement, other: Measurement) -> list[Equivalence]:
        """Whether `one` is as `other` within the margins: in loss, in its gap, under every attack and in every changed copy.

        An attack that takes `other` as its reference cannot be made on it: by chance alone it would have an AUC of 1/2.
        """
        margin_loss, margin_auc = self.settings.margin_loss, self.settings.margin_auc
        pairs = [
            ("loss on the documents", [self.mean(x.loss, self.is_target) for x in (one, other)], margin_loss),
            ("loss gap", [self.gap(x) for x in (one, other)], margin_loss),
        ]
        its, chance = self.aucs(other), Sampled(0.5, np.full(self.settings.resamples, 0.5))
        for name, value in self.aucs(one).items():
            pairs.append((f"AUC of the {name} attack", [value, its.get(name, chance)], margin_auc))
        unknown = np.full(len(one.loss), np.nan)  # of a model that gives no changed copies: never equivalent
        for name, values in one.probes.items():
            gaps = [self.gap_of_probe(x) for x in (values, other.probes.get(name, unknown))]
            if not np.isnan(gaps[0].value):
                pairs.append((gap_after(name), gaps, margin_loss))
        tests = [equivalence(name, other.name, *combined(np.subtract, *pair), margin) for name, pair, margin in pairs]
        return tests if self.enough else [replace(test, p=1.0) for test in tests]

    def _sinks(self, one: Measurement, copies: np.ndarray) -> tuple[SinkLine, ...] | None:
        if one.sink_losses is None or one.own_recited is None:
            return None
        levels = copies[: self.corpus.members]
        return tuple(
            SinkLine(
                int(level),
                int((levels == level).sum()),
                **{which: float(values[levels == level].mean()) for which, values in one.sink_losses.items()},
                recited=_recited(one.own_recited[levels == level])[1],
            )
            for level in np.unique(levels)
        )
