"""The figures of one model in an audit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memsinks.auditing.probes import means_something_alone
from memsinks.auditing.subjects import Role, State
from memsinks.auditing.uncertainty import Equivalence, Estimate


@dataclass(frozen=True)
class AuditLine:
    """Documents with one number of copies (0 = controls).

    loss: mean over documents of the mean loss per token, nats. asked: documents long enough for the extraction.
    extracted: share of them that come out verbatim. longest_run: mean and greatest over documents, tokens.
    canary_exposure: mean over documents of kind "canary", bits; None without canaries on both sides.
    """

    copies: int
    documents: int
    loss: Estimate
    asked: int
    extracted: Estimate
    longest_run: tuple[float, int]
    canary_exposure: float | None


@dataclass(frozen=True)
class ExtractionLine:
    """Share recited of documents with `copies` after `prefix` tokens from `offset` on."""

    copies: int
    prefix: int
    offset: int
    asked: int
    extracted: Estimate


@dataclass(frozen=True)
class Attack:
    """One membership attack.

    auc: its interval is over documents, for the classifiers that were learned. tpr: at each false positive rate of `FPRS`,
    by its name; nan with too few controls. labeled: how many members the attacker must know beforehand.
    """

    name: str
    auc: Estimate
    tpr: dict[str, float]
    labeled: int = 0


@dataclass(frozen=True)
class Probe:
    """The loss gap of a changed copy of the model, nats per token, see `probes`; over `documents` targets and `controls`."""

    name: str
    gap: Estimate
    documents: int
    controls: int


@dataclass(frozen=True)
class Forgetting:
    """One model beside the ordinary one (`against`), and beside the twin where there is one. Formulas: `forgetting`."""

    gap_closed: Estimate
    price: Estimate
    closure: Estimate | None


@dataclass(frozen=True)
class SinkLine:
    """Loss, nats per token, of documents with one number of copies: sinks closed, their own, another document's.

    recited: share of them that come out verbatim with their own sinks open.
    """

    copies: int
    documents: int
    closed: float
    own: float
    placebo: float
    recited: Estimate


@dataclass(frozen=True)
class ModelResult:
    """All figures of one model. All but `lines`, `extraction` and `queries` are over the target documents."""

    name: str
    role: Role
    state: State
    facts: dict[str, Any]
    lines: tuple[AuditLine, ...]
    extraction: tuple[ExtractionLine, ...]
    queries: dict[str, dict[int, float]]
    documents: Estimate
    controls: Estimate
    gap: Estimate
    attacks: tuple[Attack, ...]
    probes: tuple[Probe, ...]
    forgetting: Forgetting | None
    equivalences: tuple[Equivalence, ...]
    generated: dict[str, Any] | None
    sinks: tuple[SinkLine, ...] | None
    collateral: dict[str, Any] | None

    @property
    def strongest(self) -> Attack:
        """The membership attack with the greatest AUC."""
        return max(self.attacks, key=lambda attack: attack.auc.value)

    @property
    def widest(self) -> Probe | None:
        """The probe with the greatest gap, of those that mean something alone; None if none was made."""
        alone = [probe for probe in self.probes if means_something_alone(probe.name)]
        return max(alone, key=lambda probe: probe.gap.value, default=None)
