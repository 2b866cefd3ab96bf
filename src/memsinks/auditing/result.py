"""The result of an audit: its figures, and in words the verdict and the table.

Never "removed": an audit can only fail to find."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from memsinks.auditing.corpus import Corpus
from memsinks.auditing.measure import Measurement
from memsinks.auditing.model_result import Attack, AuditLine, ModelResult
from memsinks.auditing.probes import BEGINNINGS, means_something_alone
from memsinks.auditing.subjects import Role, State
from memsinks.auditing.uncertainty import ENOUGH, LEVEL, UNKNOWN, Equivalence, Estimate, Z


@dataclass(frozen=True)
class Example:
    """A document as text: pieces, one a token, and the probability each model gave it (nan = not predicted)."""

    index: int
    copies: int
    key: str | None
    pieces: tuple[str, ...]
    probabilities: dict[str, np.ndarray] = field(repr=False)


@dataclass(frozen=True)
class Audit:
    """The result of `audit`. The audited model comes first in `models`.

    target: which documents the summary figures are over. blind: the attacks that look at no model. notes: what limits
    the figures, one sentence each.
    """

    models: tuple[ModelResult, ...]
    target: str
    documents: int
    controls: int
    blind: tuple[Attack, ...]
    notes: tuple[str, ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    data: dict[str, Any]
    measured: tuple[Measurement, ...] = field(repr=False, default=())
    corpus: Corpus | None = field(repr=False, default=None)
    examples: tuple[Example, ...] = field(repr=False, default=())

    @property
    def audited(self) -> ModelResult:
        return self.models[0]

    @property
    def state(self) -> State:
        """Of the audited model's sinks."""
        return self.audited.state

    @property
    def lines(self) -> tuple[AuditLine, ...]:
        """Of the audited model."""
        return self.audited.lines

    def model(self, role: Role) -> ModelResult | None:
        """The first model of a role."""
        return next((model for model in self.models if model.role == role), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: figures, settings, versions and hashes, no text of any document."""
        values = {
            name: getattr(self, name)
            for name in ("target", "documents", "controls", "notes", "settings", "versions", "data")
        }
        values |= {"outcome": outcome(self), "verdict": verdict(self)}
        values["models"] = [asdict(model) for model in self.models]
        values["blind"] = [asdict(attack) for attack in self.blind]
        return _plain(values)

    def __str__(self) -> str:
        tables = [table(model, self.target) for model in self.models]
        return "\n\n".join([*tables, "\n".join([*verdict(self), *(f"note: {x}" for x in self.notes)])])


def _plain(value: Any) -> Any:
    """JSON-ready: nan and infinity as null, tuples as lists, keys as text."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


Outcome = Literal["recited", "traces", "not recovered"]
HEADLINES: dict[Outcome, str] = {
    "recited": "Documents come out verbatim.",
    "traces": "Traces are found: members can still be told from controls.",
    "not recovered": "Not recovered by the attacks listed, at this budget.",
}
CAVEAT = (
    "An audit can show that a text is still there, never that it is gone: another attack or more of it may find more."
)


def outcome(audit: Audit) -> Outcome:
    """Of the audited model: what the strongest evidence says.

    ``"recited"``: target documents come out verbatim, after the prefix or another one that was asked, and no control does, or
    a share of them above the upper limit of the controls'; of all of them together or with one number of copies. ``"traces"``:
    an attack's AUC, or the loss gap, of the model itself or of a changed copy (`probes`), is above chance with 95% confidence,
    and not shown equivalent to every fair model that is given (twin, seen once); without such a model also an AUC below chance.
    The confidence is shared out over all of them (Bonferroni), intervals taken as normal. Equivalent needs every attack and
    every probe. With fewer than `ENOUGH` target documents or controls traces are not judged.
    """
    model = audit.audited
    if recited_places(audit, model):
        return "recited"
    if min(sum(line.documents for line in _targets(audit, model)), audit.controls) < ENOUGH:
        return "not recovered"
    gaps = [model.gap, *(probe.gap for probe in model.probes if means_something_alone(probe.name))]
    beside = [x for x in model.equivalences if x.name == gap_after(BEGINNINGS) and x.difference == x.difference]
    tests = len(gaps) + len(model.attacks) + len(beside)
    found = any(_above(gap, 0.0, tests) for gap in gaps)
    found = found or any(_above(attack.auc, 0.5, tests) for attack in model.attacks)
    found = found or any(_above_a_model(test, tests) for test in beside)
    fair = [test for test in model.equivalences if test.name != "loss on the documents"]
    one_sided = [attack.auc for attack in model.attacks if not attack.labeled]  # what learned its side has no other one
    found = found or (not fair and any(_below(auc, 0.5, tests) for auc in one_sided))
    return "traces" if found and not (fair and all(test.equivalent for test in fair)) else "not recovered"


def _above(value: Estimate, chance: float, tests: int) -> bool:
    """Whether a figure is above chance at 95% over so many tests."""
    wider = NormalDist().inv_cdf(1 - (1 - LEVEL) / 2 / tests) / Z
    return value.value - (value.value - value.low) * wider > chance


def _below(value: Estimate, chance: float, tests: int) -> bool:
    """Whether a figure is below chance at 95% over so many tests."""
    return _above(Estimate(-value.value, -value.high, -value.low), -chance, tests)


def _above_a_model(test: Equivalence, tests: int) -> bool:
    """Whether a difference to a fair model is above 0 at 95% over so many tests."""
    normal = NormalDist()
    wider = normal.inv_cdf(1 - (1 - LEVEL) / 2 / tests) / normal.inv_cdf(0.95)
    return test.difference - (test.difference - test.interval[0]) * wider > 0


def gap_after(probe: str) -> str:
    """The name of the test of a probe's gap."""
    return f"gap, {probe}"


def verdict(audit: Audit) -> list[str]:
    """The verdict as sentences, the headline first and the caveat last."""
    return [
        HEADLINES[outcome(audit)],
        _extraction(audit),
        _gap(audit),
        _strongest_attack(audit),
        *_probes(audit),
        *_forgetting(audit),
        *_equivalences(audit),
        CAVEAT,
    ]


def _targets(audit: Audit, model: ModelResult) -> list[AuditLine]:
    return [line for line in model.lines if line.copies >= (2 if audit.target != "all documents" else 1)]


def recited_places(audit: Audit, model: ModelResult) -> list[str]:
    """From where more target documents come out than controls: "after 32 tokens", ...; see `outcome`."""
    wanted = [line.copies for line in _targets(audit, model)]
    places = {"after the prefix": {line.copies: (line.asked, line.extracted) for line in model.lines}}
    for line in model.extraction:
        from_where = f"after {line.prefix} tokens" + (f" from token {line.offset} on" if line.offset else "")
        places.setdefault(from_where, {})[line.copies] = (line.asked, line.extracted)
    found = []
    for name, levels in places.items():
        asked_controls, controls = levels.get(0, (0, UNKNOWN))
        known = [levels[copies] for copies in wanted if copies in levels and levels[copies][0]]
        hits, asked = sum(round(share.value * count) for count, share in known), sum(count for count, _ in known)
        most = controls.high if asked_controls and controls.value > 0 else 0.0
        if hits and max([hits / asked, *(share.value for _, share in known)]) > most:
            found.append(name)
    return found


def recited(audit: Audit, model: ModelResult) -> tuple[int, int]:
    """How many target documents a model recites, and of how many that are long enough to ask."""
    lines = [line for line in _targets(audit, model) if line.asked]
    return round(sum(x.extracted.value * x.asked for x in lines)), sum(x.asked for x in lines)


def _extraction(audit: Audit) -> str:
    hits, asked = recited(audit, audit.audited)
    before, usual = audit.model("against"), f"after {audit.settings.get('prefix')} tokens"
    said = {"after the prefix", "" if audit.settings.get("private_part") else usual}
    elsewhere = [place for place in recited_places(audit, audit.audited) if place not in said]
    more = f" More documents than controls come out {', '.join(elsewhere)}." if elsewhere else ""
    if not asked:
        return f"No document is long enough for the extraction asked, so none was: lower prefix or continuation.{more}"
    control = next(line for line in audit.audited.lines if line.copies == 0)
    beside = f", {round(control.extracted.value * control.asked)} of {control.asked} controls" if control.asked else ""
    beside += f"; {recited(audit, before)[0]} in {before.name}." if before else "."
    return f"Verbatim: {hits} of {asked} documents{beside}{more}"


def _gap(audit: Audit) -> str:
    before = audit.model("against")
    gap = f"Loss gap to controls, {audit.target}: {_nats(audit.audited.gap)}"
    return gap + (f"; {_nats(before.gap)} in {before.name}." if before else ".")


def _strongest_attack(audit: Audit) -> str:
    model, before = audit.audited, audit.model("against")
    best = model.strongest
    sentence = f"Best of {len(model.attacks)} membership attacks: {best.name}, AUC {_short(best.auc)}"
    sentence += f" with {best.labeled} labeled members" if best.labeled else ""
    if before:
        positive = before.strongest
        sentence += f"; {positive.name}, {_short(positive.auc)} in {before.name}"
        if positive.auc.low <= 0.5:
            sentence += ", where they find nothing either, so they are no evidence"
    return sentence + "."


def _forgetting(audit: Audit) -> list[str]:
    found, before = audit.audited.forgetting, audit.model("against")
    if found is None:
        return []
    name = before.name if before else "the ordinary model"
    closed = f"Gap closed against {name}: {_percent(found.gap_closed)}"
    if found.gap_closed.value != found.gap_closed.value:
        closed = f"No gap to close: {name} was not shown to know the documents better than the controls"
    if found.closure:
        closed += f"; closure against the twin (1 = as if never seen): {_short(found.closure)}"
    return [f"{closed}; price on controls: {_nats(found.price)}."]


def _equivalences(audit: Audit) -> list[str]:
    """A sentence for each fair model."""
    sentences = []
    for other in dict.fromkeys(test.other for test in audit.audited.equivalences):
        tests = [test for test in audit.audited.equivalences if test.other == other]
        kinds = {
            "attacks": [test for test in tests if test.name.startswith("AUC")],
            "changed copies": [test for test in tests if test.name.startswith(gap_after(""))],
        }
        words = [
            f"{test.name} {'equivalent' if test.equivalent else 'not shown equivalent'} ({test.difference:+.3f}, margin "
            f"{test.margin:g})"
            for test in tests
            if not any(test in several for several in kinds.values())
        ]
        for kind, several in kinds.items():
            if several:
                words.append(f"{sum(test.equivalent for test in several)} of {len(several)} {kind} equivalent")
            if known := [test for test in several if test.difference == test.difference]:
                farthest = max(known, key=lambda test: abs(test.difference))
                words[-1] += f", the farthest: {farthest.name} ({farthest.difference:+.3f}, margin {farthest.margin:g})"
        sentences.append(f"Beside {other}: {'; '.join(words)}.")
    return sentences


def _probes(audit: Audit) -> list[str]:
    """The widest gap of a changed copy; nothing where none was made."""
    model, before = audit.audited, audit.model("against")
    widest = model.widest
    if widest is None:
        return []
    sentence = f"Widest gap of {len(model.probes)} changed copies: {widest.name}, {_nats(widest.gap)}"
    same = next((x for x in before.probes if x.name == widest.name), None) if before else None
    return [sentence + (f"; {_nats(same.gap)} in {before.name}." if before and same else ".")]


def _short(value: Estimate) -> str:
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _nats(value: Estimate) -> str:
    return f"{value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}] nats"


def _percent(value: Estimate) -> str:
    return f"{value.value:.1%} [{value.low:.1%}, {value.high:.1%}]"


def table(model: ModelResult, target: str) -> str:
    """One model as plain text: a line for each number of copies, then the attacks."""
    columns = f"{'copies':>8} {'documents':>10} {'loss (nats)':>22} {'recited':>26} {'longest run':>12}"
    lines = [f"{model.name}, sinks {model.state}", columns]
    for line in model.lines:
        name = "control" if line.copies == 0 else str(line.copies)
        share = f"{_percent(line.extracted)}" if line.asked else "too short"
        exposure = "" if line.canary_exposure is None else f"  canary_exposure {line.canary_exposure:.1f} bits"
        lines.append(
            f"{name:>8} {line.documents:>10} {line.loss!s:>22} {share:>26} {line.longest_run[1]:>12}{exposure}"
        )
    lines.append(f"membership ({target}), AUC: " + ", ".join(f"{x.name} {_short(x.auc)}" for x in model.attacks))
    if model.probes:
        lines.append("gap of changed copies, nats: " + ", ".join(f"{x.name} {x.gap.value:+.3f}" for x in model.probes))
    if model.sinks:
        cells = ", ".join(
            f"{x.copies}: {x.closed:.2f} / {x.own:.2f} / {x.placebo:.2f}, {x.recited.value:.0%} recited with their own"
            for x in model.sinks
        )
        lines.append(f"loss with sinks closed / own / placebo by copies: {cells}")
    if model.collateral:
        found = model.collateral
        lines.append(
            f"closing one document's sinks costs it {found['rise_itself']:+.3f} nats, others {found['rise_others']:+.3f}"
        )
    return "\n".join(lines)
