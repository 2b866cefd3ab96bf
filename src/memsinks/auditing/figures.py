"""From the values of each document to figures with intervals: a line for each number of copies, each attack, each test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from memsinks.auditing.extraction import canary_exposure, log10_queries
from memsinks.auditing.forgetting import counterfactual_closure, gap_closed, loss_gap, price
from memsinks.auditing.measure import NOT_ASKED, AuditSettings, Corpus, Measured
from memsinks.auditing.membership import auc, blind_scores, tokenizer_attack, tpr_at_fpr, weighted_auc, word_numbers
from memsinks.auditing.result import Attack, AuditLine, ExtractionLine, Forgetting, ModelResult, SinkLine
from memsinks.auditing.uncertainty import AT_ONCE, Equivalence, Estimate, Resamples, equivalence, estimate, wilson

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


class Figures:
    """Computes results of models over one corpus, all on the same resamples."""

    def __init__(self, corpus: Corpus, settings: AuditSettings) -> None:
        self.corpus, self.settings = corpus, settings
        self.is_control, self.is_target = corpus.control, corpus.target
        groups = np.where(self.is_control, -1, corpus.copies)
        self.resamples = Resamples(groups, settings.resamples, settings.seed)

    def aucs(self, values: np.ndarray) -> tuple[float, np.ndarray]:
        """AUC of target documents against controls, and in each resample."""
        chosen = [values[self.is_target], values[self.is_control]]
        weights = [self.resamples.weights[:, x] for x in (self.is_target, self.is_control)]
        parts = [
            weighted_auc(*chosen, *(x[at : at + AT_ONCE] for x in weights)) for at in range(0, len(weights[0]), AT_ONCE)
        ]
        return auc(*chosen), np.concatenate(parts)

    def attack(self, name: str, values: np.ndarray) -> Attack:
        """AUC and true positive rates of one attack."""
        value, resampled = self.aucs(values)
        sides = values[self.is_target], values[self.is_control]
        return Attack(name, estimate(value, resampled), {f"{fpr:.1%}": tpr_at_fpr(*sides, fpr) for fpr in FPRS})

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

    def means(self, values: np.ndarray, chosen: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean over the chosen documents, and in each resample."""
        return float(values[chosen].mean()), self.resamples.means(values, chosen)

    def model(
        self, one: Measured, against: Measured | None, twin: Measured | None, fair: Sequence[Measured]
    ) -> ModelResult:
        """All figures of one model; `fair`: the models that it should be equivalent to."""
        copies = np.where(self.is_control, 0, self.corpus.copies)
        levels = [int(level) for level in np.unique(copies)]
        documents, controls = (self.means(one.loss, side) for side in (self.is_target, self.is_control))
        gap = loss_gap(controls[0], documents[0]), loss_gap(controls[1], documents[1])
        return ModelResult(
            one.name, one.role, one.state, one.facts,
            tuple(self._line(one, level, copies == level) for level in levels),
            tuple(
                ExtractionLine(level, prefix, offset, *_recited(hits[copies == level]))
                for (prefix, offset), hits in sorted(one.grid.items(), key=lambda item: item[0][::-1]) for level in levels
            ),
            {("controls" if level == 0 else str(level)): self._queries(one.log_p[copies == level]) for level in levels},
            estimate(*documents), estimate(*controls), estimate(*gap),
            tuple(self.attack(name, values) for name, values in one.attacks.items()),
            self._forgetting(one, against, twin) if against is not None and one is not against else None,
            tuple(test for other in fair if other is not one for test in self._equivalences(one, other)),
            one.generated, self._sinks(one, copies), one.collateral,
        )  # type: ignore[arg-type]  # fmt: skip

    def _line(self, one: Measured, level: int, chosen: np.ndarray) -> AuditLine:
        runs = one.run[chosen]
        return AuditLine(
            level, int(chosen.sum()), estimate(*self.means(one.loss, chosen)), *_recited(one.recited[chosen]),
            (float(runs.mean()), int(runs.max())), self._exposure(one, chosen),
        )  # fmt: skip

    def _exposure(self, one: Measured, chosen: np.ndarray) -> float | None:
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

    def _forgetting(self, one: Measured, against: Measured, twin: Measured | None) -> Forgetting:
        pairs = [[self.means(x.loss, side) for side in (self.is_control, self.is_target)] for x in (one, against)]
        (control, document), (standard_control, standard_document) = pairs

        def at(figure: Any, *values: tuple[float, np.ndarray]) -> Estimate:
            return estimate(figure(*(x[0] for x in values)), figure(*(x[1] for x in values)))

        closed = at(
            lambda a, b, c, d: gap_closed(loss_gap(a, b), loss_gap(c, d)),
            control, document, standard_control, standard_document,
        )  # fmt: skip
        closure = None
        if twin is not None:
            closure = at(counterfactual_closure, document, standard_document, self.means(twin.loss, self.is_target))
        return Forgetting(closed, at(price, control, standard_control), closure)

    def _equivalences(self, one: Measured, other: Measured) -> list[Equivalence]:
        sides = self.is_target, self.is_control
        (mine, my_control), (its, its_control) = ([self.means(x.loss, side) for side in sides] for x in (one, other))
        margin = self.settings.margin_loss
        tests = []
        for name, figure in (
            ("loss on the documents", lambda a, b, c, d: a - c),
            ("loss gap", lambda a, b, c, d: loss_gap(b, a) - loss_gap(d, c)),
        ):
            values, resampled = (figure(*(x[part] for x in (mine, my_control, its, its_control))) for part in (0, 1))
            tests.append(equivalence(name, other.name, values, resampled, margin))  # type: ignore
        found = [self.aucs(x.attacks["loss"]) for x in (one, other)]
        tests.append(equivalence(
            "AUC of the loss attack", other.name, found[0][0] - found[1][0], found[0][1] - found[1][1],
            self.settings.margin_auc,
        ))  # fmt: skip
        return tests

    def _sinks(self, one: Measured, copies: np.ndarray) -> tuple[SinkLine, ...] | None:
        if one.sink_losses is None:
            return None
        levels = copies[: self.corpus.members]
        return tuple(
            SinkLine(int(level), int((levels == level).sum()), **{
                which: float(values[levels == level].mean()) for which, values in one.sink_losses.items()
            })
            for level in np.unique(levels)
        )  # fmt: skip
