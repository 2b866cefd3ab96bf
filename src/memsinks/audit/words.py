"""The result in words: the verdict and the plain-text table. Never "removed": an audit can only fail to find."""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

from .result import AuditLine, ModelResult
from .uncertainty import LEVEL, Estimate, Z

if TYPE_CHECKING:
    from .result import Audit

Outcome = Literal["recited", "traces", "not recovered"]
HEADLINES: dict[Outcome, str] = {
    "recited": "Documents come out verbatim.",
    "traces": "Traces are found: nothing comes out verbatim, but members can still be told from controls.",
    "not recovered": "Not recovered by the attacks listed, at this budget.",
}
CAVEAT = (
    "An audit can show that a text is still there, never that it is gone: another attack or more of it may find more."
)


def outcome(audit: Audit) -> Outcome:
    """Of the audited model: what the strongest evidence says.

    ``"recited"``: more target documents come out verbatim than the upper limit of the controls' share. ``"traces"``: an
    attack's AUC, or the loss gap, is above chance with 95% confidence, and not shown equivalent to a model that never
    saw the documents (or once, if only that one is given). The confidence is shared out over all attacks and the gap
    (Bonferroni), intervals taken as normal.
    """
    model = audit.audited
    control = next(line for line in model.lines if line.copies == 0)
    for line in _targets(audit, model):
        if (
            line.asked
            and line.extracted.value > 0
            and line.extracted.value > (control.extracted.high if control.asked else 0)
        ):
            return "recited"
    tests = 1 + len(model.attacks)
    found = _above(model.gap, 0.0, tests) or any(_above(attack.auc, 0.5, tests) for attack in model.attacks)
    fair = [test for test in model.equivalences if test.name != "loss on the documents"]
    return "traces" if found and not (fair and all(test.equivalent for test in fair)) else "not recovered"


def _above(value: Estimate, chance: float, tests: int) -> bool:
    """Whether a figure is above chance at 95% over so many tests."""
    wider = NormalDist().inv_cdf(1 - (1 - LEVEL) / 2 / tests) / Z
    return value.value - (value.value - value.low) * wider > chance


def verdict(audit: Audit) -> list[str]:
    """The verdict as sentences, the headline first and the caveat last."""
    model, before = audit.audited, audit.model("against")
    sentences = [HEADLINES[outcome(audit)], *_extraction(audit, model, before)]
    gap = f"Loss gap to controls, {audit.target}: {_nats(model.gap)}"
    sentences.append(gap + (f"; {_nats(before.gap)} in {before.name}." if before else "."))
    best = max(model.attacks, key=lambda attack: attack.auc.value)
    sentence = f"Best of {len(model.attacks)} membership attacks: {best.name}, AUC {_short(best.auc)}"
    if before:
        positive = max(before.attacks, key=lambda attack: attack.auc.value)
        sentence += f"; {positive.name}, {_short(positive.auc)} in {before.name}"
        if positive.auc.low <= 0.5:
            sentence += ", where they find nothing either, so they are no evidence"
    sentences.append(sentence + ".")
    if model.forgetting:
        found = f"Gap closed against {before.name if before else 'the ordinary model'}: {_percent(model.forgetting.gap_closed)}"
        if model.forgetting.closure:
            found += f"; closure against the twin (1 = as if never seen): {_short(model.forgetting.closure)}"
        sentences.append(f"{found}; price on controls: {_nats(model.forgetting.price)}.")
    for other in dict.fromkeys(test.other for test in model.equivalences):
        tests = [test for test in model.equivalences if test.other == other]
        words = [
            f"{test.name} {'equivalent' if test.equivalent else 'not shown equivalent'} ({test.difference:+.3f}, margin "
            f"{test.margin:g})" for test in tests
        ]  # fmt: skip
        sentences.append(f"Beside {other}: {'; '.join(words)}.")
    sentences += _relearning(audit)
    return [*sentences, CAVEAT]


def _targets(audit: Audit, model: ModelResult) -> list[AuditLine]:
    return [line for line in model.lines if line.copies >= (2 if audit.target != "all documents" else 1)]


def _extraction(audit: Audit, model: ModelResult, before: ModelResult | None) -> list[str]:
    def count(which: ModelResult) -> tuple[int, int]:
        lines = _targets(audit, which)
        return round(sum(x.extracted.value * x.asked for x in lines if x.asked)), sum(x.asked for x in lines)

    hits, asked = count(model)
    if not asked:
        return ["No document is long enough for the extraction asked; lower prefix or continuation."]
    sentence = f"Verbatim: {hits} of {asked} documents"
    return [sentence + (f"; {count(before)[0]} in {before.name}." if before else ".")]


def _relearning(audit: Audit) -> list[str]:
    found = audit.relearning
    if found is None:
        return []
    words = []
    for half, ratio, steps in (
        ("the half that is trained on again", found.ratio_same, found.steps_same),
        ("the other half", found.ratio_other, found.steps_other),
    ):
        times = ", ".join(
            f"{name}: {'not reached' if step is None else f'{step:.0f} steps'}" for name, step in steps.items()
        )
        words.append(
            f"Relearning {half} ({times})" + (f": {ratio:.2f} of the twin's steps." if ratio is not None else ".")
        )
    return words


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
    if model.sinks:
        cells = ", ".join(f"{x.copies}: {x.closed:.2f} / {x.own:.2f} / {x.placebo:.2f}" for x in model.sinks)
        lines.append(f"loss with sinks closed / own / placebo by copies: {cells}")
    if model.collateral:
        found = model.collateral
        lines.append(
            f"closing one document's sinks costs it {found['rise_itself']:+.3f} nats, others {found['rise_others']:+.3f}"
        )
    return "\n".join(lines)
