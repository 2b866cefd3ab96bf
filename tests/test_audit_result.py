"""Figures from hand-made values of each document: closed forms at both ends, the choice of documents, JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from memsinks.auditing import figures as module
from memsinks.auditing.corpus import Corpus
from memsinks.auditing.figures import QUERIES, Figures
from memsinks.auditing.measure import NOT_ASKED, Measurement
from memsinks.auditing.membership import auc, tpr_at_fpr
from memsinks.auditing.probes import BEGINNINGS, HALF
from memsinks.auditing.result import Audit, outcome, verdict
from memsinks.auditing.settings import AuditSettings
from memsinks.auditing.uncertainty import equivalence, wilson
from memsinks.data.documents import Document

SETTINGS = AuditSettings(resamples=200)
COPIES = [1] * 4 + [2] * 6 + [16] * 10
CONTROLS = 20
TARGET = slice(4, 20)


def corpus(
    copies: list[int] = COPIES, controls: int = CONTROLS, kinds: dict[int, str] | None = None, seed: int = 0
) -> Corpus:
    """Documents of random tokens; `kinds`: of some, by index."""
    rng = np.random.default_rng(seed)
    count = len(copies) + controls
    documents = [
        Document(f"secret text {index}", copies=number, kind=(kinds or {}).get(index, "text"))
        for index, number in enumerate([*copies, *[0] * controls])
    ]
    tokens = [rng.integers(0, 50, 12).astype(np.int32) for _ in range(count)]
    return Corpus(
        documents, len(copies), tokens, np.array([*copies, *[0] * controls]), np.arange(count), np.zeros(0), None, "x"
    )


def measured(loss: np.ndarray, name: str = "model", role: str = "audited", **changes) -> Measurement:
    """A model of these losses that recites nothing."""
    count = len(loss)
    values = {
        "facts": {}, "recited": np.zeros(count, int), "run": np.zeros(count, int), "log_p": np.full(count, -50.0),
        "grid": {}, "attacks": {"loss": -loss}, "table": SimpleNamespace(), "state": "absent",
    }  # fmt: skip
    return Measurement(name=name, role=role, loss=loss, **(values | changes))


def some_losses(seed: int, known: float) -> np.ndarray:
    """About 3 nats, repeated documents `known` nats lower."""
    loss = 3 + 0.1 * np.random.default_rng(seed).normal(size=len(COPIES) + CONTROLS)
    loss[TARGET] -= known
    return loss


ORDINARY, TWIN = measured(some_losses(0, 2.5), "o", "against"), measured(some_losses(1, 0.0), "t", "twin")


def result(loss: np.ndarray, figures: Figures | None = None, **changes):
    figures = figures or Figures(corpus(), SETTINGS)
    return figures.model(measured(loss, **changes), ORDINARY, TWIN, [TWIN])


# Forgetting


def test_the_ordinary_model_beside_itself_has_forgotten_nothing() -> None:
    found = result(ORDINARY.loss)
    for figure, value in (
        (found.forgetting.gap_closed, 0.0),
        (found.forgetting.price, 0.0),
        (found.forgetting.closure, 0.0),
    ):
        assert (figure.value, figure.low, figure.high) == pytest.approx((value, value, value), abs=1e-12)
    assert found.gap.value == pytest.approx(2.5, abs=0.1)
    assert not any(test.equivalent for test in found.equivalences)


def test_the_losses_of_the_twin_are_as_if_never_seen() -> None:
    found = result(TWIN.loss)
    assert found.forgetting.closure.value == pytest.approx(1.0, abs=1e-12)
    assert (found.forgetting.closure.low, found.forgetting.closure.high) == pytest.approx((1.0, 1.0), abs=1e-12)
    assert found.forgetting.gap_closed.value == pytest.approx(1.0, abs=0.05)
    assert [test.name for test in found.equivalences] == ["loss on the documents", "loss gap", "AUC of the loss attack"]
    assert all(test.equivalent and test.difference == 0.0 and test.other == "t" for test in found.equivalences)


def test_no_gap_left_is_all_of_it_closed() -> None:
    loss = np.full(40, 3.0)
    found = result(loss)
    assert found.gap.value == found.gap.low == found.gap.high == 0.0
    assert found.forgetting.gap_closed.value == 1.0
    assert found.attacks[0].auc.value == 0.5


def test_nothing_memorized_leaves_no_gap_to_close() -> None:
    figures, even = Figures(corpus(), SETTINGS), measured(np.full(40, 3.0), "o", "against")
    found = figures.model(measured(np.full(40, 3.0)), even, None, [])
    closed = found.forgetting.gap_closed
    assert all(math.isnan(x) for x in (closed.value, closed.low, closed.high))
    assert found.forgetting.closure is None


def test_figures_are_those_of_the_means() -> None:
    loss, target, control = some_losses(5, 1.0), np.zeros(40, bool), np.arange(40) >= 20
    target[TARGET] = True
    found = result(loss)
    mean = {name: (x[target].mean(), x[control].mean()) for name, x in
            (("one", loss), ("ordinary", ORDINARY.loss), ("twin", TWIN.loss))}  # fmt: skip
    gaps = {name: control - documents for name, (documents, control) in mean.items()}
    assert found.documents.value == pytest.approx(mean["one"][0])
    assert found.controls.value == pytest.approx(mean["one"][1])
    assert found.gap.value == pytest.approx(gaps["one"])
    assert found.forgetting.price.value == pytest.approx(mean["one"][1] - mean["ordinary"][1])
    assert found.forgetting.gap_closed.value == pytest.approx(1 - gaps["one"] / gaps["ordinary"])
    closure = (mean["one"][0] - mean["ordinary"][0]) / (mean["twin"][0] - mean["ordinary"][0])
    assert found.forgetting.closure.value == pytest.approx(closure)
    for figure in (found.documents, found.controls, found.gap, found.forgetting.price, found.forgetting.closure):
        assert figure.low < figure.value < figure.high
    tests = {test.name: test for test in found.equivalences}
    assert tests["loss on the documents"].difference == pytest.approx(mean["one"][0] - mean["twin"][0])
    assert tests["loss gap"].difference == pytest.approx(gaps["one"] - gaps["twin"])
    areas = [auc(-x[target], -x[control]) for x in (loss, TWIN.loss)]
    assert tests["AUC of the loss attack"].difference == pytest.approx(areas[0] - areas[1])
    assert (tests["loss gap"].margin, tests["AUC of the loss attack"].margin) == (0.03, 0.03)


def test_every_attack_must_be_equivalent() -> None:
    """Attacks on both models are set beside each other; one that takes the twin as its reference, beside chance."""
    both = {"loss": -TWIN.loss, "spread": np.arange(40.0), "reference": np.where(np.arange(40) < 20, 1.0, 0.0)}
    twin = measured(TWIN.loss, "t", "twin", attacks={"loss": -TWIN.loss, "spread": np.arange(40.0)})
    once = measured(TWIN.loss, "once", "seen once", attacks=both | {"reference": np.zeros(40)})
    found = Figures(corpus(), SETTINGS).model(measured(TWIN.loss, attacks=both), ORDINARY, twin, [twin, once])
    for other in ("t", "once"):
        tests = {x.name: x for x in found.equivalences if x.other == other and x.name.startswith("AUC")}
        assert list(tests) == [f"AUC of the {name} attack" for name in both]
        reference = tests["AUC of the reference attack"]
        assert (reference.difference, reference.interval, reference.equivalent) == (0.5, (0.5, 0.5), False)
        assert all(x.equivalent and x.difference == 0.0 for x in tests.values() if x is not reference)


def probed(gap: float, seed: int = 0) -> np.ndarray:
    """Losses of a changed copy with this gap; some texts were not asked."""
    values = some_losses(seed, gap)
    values[[2, 5, 19, 30]] = np.nan
    return values


def test_the_gap_of_a_changed_copy_is_over_the_texts_that_were_asked() -> None:
    values = probed(1.0)
    (probe,) = result(TWIN.loss, probes={HALF: values}).probes
    asked = ~np.isnan(values)
    control, target = np.arange(40) >= 20, np.zeros(40, bool)
    target[TARGET] = True
    assert probe.gap.value == pytest.approx(values[control & asked].mean() - values[target & asked].mean())
    assert probe.gap.low < probe.gap.value < probe.gap.high
    assert (probe.name, probe.documents, probe.controls) == (HALF, 14, 19)


def test_equivalent_needs_every_changed_copy() -> None:
    """A model that is as its twin until it is trained further is not equivalent, and a trace is found."""
    twin = measured(TWIN.loss, "t", "twin", probes={HALF: probed(0.0), BEGINNINGS: probed(0.5)})
    figures = Figures(corpus(), AuditSettings(resamples=200, margin_auc=0.2))
    for gaps, equivalent, found in (((0.0, 0.5), True, "not recovered"), ((0.3, 0.5), False, "traces"),
                                    ((0.0, 0.9), False, "traces")):  # fmt: skip
        one = measured(TWIN.loss, probes={HALF: probed(gaps[0]), BEGINNINGS: probed(gaps[1])})
        model = figures.model(one, None, twin, [twin])
        tests = {test.name: test for test in model.equivalences}
        assert tests[f"gap, {HALF}"].difference == pytest.approx(gaps[0], abs=1e-6)
        assert tests[f"gap, {BEGINNINGS}"].difference == pytest.approx(gaps[1] - 0.5, abs=1e-6)
        assert all(test.equivalent for test in model.equivalences) == equivalent
        assert model.widest is not None and model.widest.name == HALF
        audit = whole(models=(model, figures.model(twin, None, twin, [])))
        assert outcome(audit) == found
        assert any(sentence.startswith("Widest gap of 2 changed copies: half relearned") for sentence in verdict(audit))


def test_what_is_mostly_unknown_is_not_shown_equivalent() -> None:
    resampled = np.zeros(200)
    assert equivalence("x", "y", 0.0, resampled, 0.03).equivalent
    resampled[:10] = np.nan
    assert equivalence("x", "y", 0.0, resampled, 0.03).equivalent
    resampled[:40] = np.nan
    assert not equivalence("x", "y", 0.0, resampled, 0.03).equivalent


def test_a_gap_of_beginnings_alone_is_no_trace() -> None:
    """Learning how a text begins helps with the rest also where nothing is known; it needs a model beside it."""
    figures = Figures(corpus(), SETTINGS)
    even = measured(np.full(40, 3.0), attacks={"loss": np.zeros(40)}, probes={BEGINNINGS: probed(0.5)})
    model = figures.model(even, None, None, [])
    assert model.widest is None
    assert outcome(whole(models=(model,))) == "not recovered"


def test_how_many_members_a_supervised_attack_must_know() -> None:
    attacks = {name: np.arange(40.0) for name in ("loss", "supervised", "reference, supervised")}
    found = result(np.ones(40), attacks=attacks)
    assert {attack.name: attack.labeled for attack in found.attacks} == {
        "loss": 0, "supervised": 12, "reference, supervised": 12,
    }  # fmt: skip
    assert found.strongest.auc.value == max(attack.auc.value for attack in found.attacks)


def test_margins_are_those_of_the_settings() -> None:
    settings = AuditSettings(resamples=200, margin_loss=5.0, margin_auc=0.001)
    found = result(ORDINARY.loss, Figures(corpus(), settings))
    assert [(test.margin, test.equivalent) for test in found.equivalences] == [(5.0, True), (5.0, True), (0.001, False)]


def test_a_constant_shift_beside_another_model_is_known_exactly() -> None:
    """Documents are paired between models: what they have in common drops out."""
    found = result(TWIN.loss + 0.01)
    test = found.equivalences[0]
    assert test.difference == pytest.approx(0.01)
    assert test.interval == pytest.approx((0.01, 0.01))
    assert test.equivalent


def test_what_is_compared_with_whom() -> None:
    figures = Figures(corpus(), SETTINGS)
    once = dataclasses.replace(TWIN, name="once", role="seen once")
    assert figures.model(ORDINARY, ORDINARY, TWIN, [TWIN, once]).forgetting is None
    assert figures.model(TWIN, ORDINARY, TWIN, [TWIN, once]).forgetting.closure.value == pytest.approx(1.0)
    assert {test.other for test in figures.model(TWIN, ORDINARY, TWIN, [TWIN, once]).equivalences} == {"once"}
    assert [test.other for test in figures.model(ORDINARY, None, TWIN, [TWIN, once]).equivalences] == ["t"] * 3 + [
        "once"
    ] * 3
    alone = figures.model(ORDINARY, None, None, [])
    assert alone.forgetting is None
    assert alone.equivalences == ()


# Which documents


@pytest.mark.parametrize(
    ("copies", "target", "words"),
    [([1, 1, 2, 8], [2, 3], "documents with 2 copies or more"), ([1, 1, 1], [0, 1, 2], "all documents"),
     ([2, 4, 8], [0, 1, 2], "all documents")],
)  # fmt: skip
def test_summary_figures_are_over_the_repeated_documents_if_there_are_any(copies, target, words) -> None:
    figures = Figures(corpus(copies, 5), SETTINGS)
    assert np.flatnonzero(figures.is_target).tolist() == target
    assert np.flatnonzero(figures.is_control).tolist() == [*range(len(copies), len(copies) + 5)]
    assert figures.corpus.target_name == words
    loss = np.arange(len(copies) + 5.0)
    assert figures.model(measured(loss), None, None, []).documents.value == loss[target].mean()


def test_a_line_for_each_number_of_copies() -> None:
    loss = np.arange(40.0)
    recited = np.array([0, 1, 1, NOT_ASKED] + [1] * 6 + [0] * 10 + [NOT_ASKED] * 19 + [1])
    lines = result(loss, recited=recited, run=np.arange(40) // 2).lines
    assert [(line.copies, line.documents, line.asked) for line in lines] == [
        (0, 20, 1),
        (1, 4, 3),
        (2, 6, 6),
        (16, 10, 10),
    ]
    assert [line.extracted for line in lines] == [wilson(1, 1), wilson(2, 3), wilson(6, 6), wilson(0, 10)]
    assert [line.loss.value for line in lines] == [29.5, 1.5, 6.5, 14.5]
    assert [line.longest_run for line in lines] == [(14.5, 19), (0.5, 1), (3.0, 4), (7.0, 9)]
    nothing = result(loss, recited=np.full(40, NOT_ASKED)).lines
    assert all(line.asked == 0 and math.isnan(line.extracted.value) for line in nothing)


def test_extraction_by_prefix_and_offset() -> None:
    grid = {
        (64, 0): np.full(40, NOT_ASKED), (8, 5): np.ones(40, int), (8, 0): np.array([1] * 20 + [0] * 20),
        (64, 5): np.zeros(40, int),
    }  # fmt: skip
    found = result(np.ones(40), grid=grid).extraction
    assert [(x.prefix, x.offset) for x in found[::4]] == [(8, 0), (64, 0), (8, 5), (64, 5)]
    assert [x.copies for x in found] == [0, 1, 2, 16] * 4
    assert [(x.asked, x.extracted.value) for x in found[:4]] == [(20, 0.0), (4, 1.0), (6, 1.0), (10, 1.0)]
    assert all(x.asked == 0 and math.isnan(x.extracted.value) for x in found[4:8])
    assert found[8].extracted == wilson(20, 20)


def test_sampling_by_number_of_copies() -> None:
    log_p = np.full(40, np.nan)
    log_p[:4] = 0.0  # at the first try
    log_p[4:10] = [math.log(0.5), math.log(0.1), math.log(0.1), -1000.0, -1000.0, np.nan]
    log_p[10:20] = -1000.0
    found = result(np.ones(40), log_p=log_p).queries
    assert list(found) == ["controls", "1", "2", "16"]
    assert list(found["2"]) == list(QUERIES) == [10**power for power in range(7)]
    assert all(math.isnan(x) for x in found["controls"].values())
    assert set(found["1"].values()) == {1.0}
    assert list(found["2"].values()) == [0.2] + [0.6] * 6
    assert set(found["16"].values()) == {0.0}
    certain = Figures(corpus(), AuditSettings(resamples=100, queries_p=0.9999))
    assert list(result(np.ones(40), certain, log_p=log_p).queries["2"].values()) == [0.0, 0.0, 0.6, 0.6, 0.6, 0.6, 0.6]


def test_canaries_rank_among_those_that_were_not_inserted() -> None:
    kinds = dict.fromkeys([0, 1, 4, 5, *range(33, 40)], "canary")
    loss = np.full(40, 0.001)  # other documents have no part in it
    loss[[0, 1, 4, 5]] = [0.5, 9.0, 0.1, 0.2]
    loss[33:] = np.arange(1.0, 8.0)
    lines = result(loss, Figures(corpus(kinds=kinds), SETTINGS)).lines
    assert [line.canary_exposure for line in lines] == [None, (3.0 + 0.0) / 2, 3.0, None]
    for kinds in ({0: "canary"}, {39: "canary"}, {}):
        lines = result(loss, Figures(corpus(kinds=kinds), SETTINGS)).lines
        assert {line.canary_exposure for line in lines} == {None}


# Attacks


def test_attacks_at_both_ends() -> None:
    known, even = np.full(40, 3.0), np.full(40, 3.0)
    known[TARGET] = 0.1
    for loss, area, low, high in ((known, 1.0, 1.0, 1.0), (even, 0.5, 0.5, 0.5), (-known, 0.0, 0.0, 0.0)):
        (attack,) = result(loss).attacks
        assert (attack.auc.value, attack.auc.low, attack.auc.high) == (area, low, high)


def test_attacks_are_over_target_documents_and_controls() -> None:
    values = {"loss": np.random.default_rng(0).normal(size=40), "zlib": np.arange(40.0)}
    values["loss"][:4] = 1000.0
    found = result(np.ones(40), attacks=values).attacks
    assert [attack.name for attack in found] == ["loss", "zlib"]
    for attack, one in zip(found, values.values(), strict=True):
        assert attack.auc.value == auc(one[TARGET], one[20:])
        assert attack.auc.low <= attack.auc.value <= attack.auc.high
        assert list(attack.tpr) == ["1.0%", "0.1%"]
        assert all(math.isnan(x) for x in attack.tpr.values())
    many = corpus([2] * 10, 1000)
    one = np.random.default_rng(1).normal(size=1010)
    attack = Figures(many, SETTINGS).attack("loss", one)
    assert attack.tpr == {"1.0%": tpr_at_fpr(one[:10], one[10:], 0.01), "0.1%": tpr_at_fpr(one[:10], one[10:], 0.001)}


def test_resamples_of_the_auc_are_taken_a_part_at_a_time(monkeypatch) -> None:
    values = np.random.default_rng(0).normal(size=40)
    found = Figures(corpus(), SETTINGS).auc(values)
    monkeypatch.setattr(module, "AT_ONCE", 7)
    again = Figures(corpus(), SETTINGS).auc(values)
    assert found[1].shape == (200,)
    assert (found[1] == again[1]).all()
    assert found[1].std() > 0.01


def worded(copies: list[int], controls: int, first: str = "", cut: int = 0) -> Corpus:
    """Documents of random words; of the first 50 documents the texts begin with `first` and have `cut` tokens fewer."""
    text, rng = corpus(copies, controls), np.random.default_rng(0)
    for index, document in enumerate(text.documents):
        own = index < 50
        words = [first] * own + [f"word{x}" for x in rng.integers(0, 99, 20)]
        text.documents[index] = dataclasses.replace(document, text=" ".join(words))
        text.tokens[index] = np.zeros(rng.integers(30, 50) - cut * own, np.int32)
    return text


@pytest.mark.parametrize(("copies", "controls"), [([2] * 4, 30), ([1] * 20 + [2] * 4, 30), ([2] * 30, 4)])
def test_attacks_without_a_model_need_five_documents_on_both_sides(copies, controls) -> None:
    assert Figures(corpus(copies, controls), SETTINGS).blind() == ()
    assert len(Figures(corpus([2] * 5, 5), SETTINGS).blind()) == 2


def test_attacks_without_a_model_find_what_the_texts_and_the_tokenizer_give_away() -> None:
    for changes, told in (({}, (False, False)), ({"first": "zebra"}, (True, False)), ({"cut": 15}, (False, True))):
        attacks = Figures(worded([2] * 50 + [1] * 7, 50, **changes), SETTINGS).blind()
        assert [attack.name for attack in attacks] == ["texts alone", "tokenizer alone"]
        for attack, found in zip(attacks, told, strict=True):
            assert attack.auc.value > 0.9 if found else 0.3 < attack.auc.value < 0.65, (changes, attack)
            assert attack.auc.low < attack.auc.value < attack.auc.high or attack.auc.value == 1.0


def test_the_tokenizer_alone_is_judged_by_tokens_per_character() -> None:
    text = worded([2] * 50, 50)
    shares = np.array([-len(x) / len(y.text) for x, y in zip(text.tokens, text.documents, strict=True)])
    assert Figures(text, SETTINGS).blind()[1].auc.value == pytest.approx(auc(shares[:50], shares[50:]))


# Sinks


def test_losses_of_sinks_by_number_of_copies() -> None:
    values = {"closed": np.arange(20.0), "own": np.arange(20.0) / 10, "placebo": np.arange(20.0) * 2}
    found = result(
        np.ones(40), sink_losses=values, own_recited=np.array([0] * 4 + [1, NOT_ASKED] * 3 + [1] * 5 + [0] * 5),
        collateral={"rise_itself": 1.5}, generated={"documents": 3},
    )  # fmt: skip
    assert [(x.copies, x.documents) for x in found.sinks] == [(1, 4), (2, 6), (16, 10)]
    assert [x.closed for x in found.sinks] == [1.5, 6.5, 14.5]
    assert [x.own for x in found.sinks] == pytest.approx([0.15, 0.65, 1.45])
    assert [x.placebo for x in found.sinks] == [3.0, 13.0, 29.0]
    assert [x.recited for x in found.sinks] == [wilson(0, 4), wilson(3, 3), wilson(5, 10)]
    assert (found.collateral, found.generated) == ({"rise_itself": 1.5}, {"documents": 3})
    assert result(np.ones(40)).sinks is None


# The whole


def whole(**changes) -> Audit:
    figures, text = Figures(corpus(), SETTINGS), corpus()
    one = measured(
        some_losses(2, 1.0), log_p=np.full(40, np.nan), recited=np.full(40, NOT_ASKED), facts={"parameters": np.int64(3)},
        grid={(8, 0): np.zeros(40, int)}, probes={HALF: np.full(40, np.nan)},
        generated={"documents": 2}, collateral={"rise_itself": np.float32(0.5)},
        sink_losses={name: np.ones(20) for name in ("closed", "own", "placebo")}, own_recited=np.zeros(20, int),
    )  # fmt: skip
    models = tuple(figures.model(x, ORDINARY, TWIN, [TWIN]) for x in (one, ORDINARY, TWIN))
    values = {
        "models": models, "target": figures.corpus.target_name, "documents": 20, "controls": 20, "blind": figures.blind(),
        "notes": ("a note",), "settings": {"prefixes": (8, 16)}, "versions": {"torch": "2"},
        "data": {"tokens": 480}, "measured": (one, ORDINARY, TWIN), "corpus": text,
    }  # fmt: skip
    return Audit(**(values | changes))


def test_the_result_as_json() -> None:
    found = whole().to_dict()
    text = json.dumps(found, allow_nan=False)
    assert json.loads(text) == found
    assert "secret" not in text
    assert found["models"][0]["queries"]["2"] == {str(n): None for n in QUERIES}
    assert found["models"][0]["lines"][0]["extracted"] == {"value": None, "low": None, "high": None}
    assert found["models"][0]["facts"] == {"parameters": 3}
    assert found["models"][0]["collateral"] == {"rise_itself": 0.5}
    assert found["models"][0]["attacks"][0]["tpr"] == {"1.0%": None, "0.1%": None}
    assert found["models"][0]["probes"] == [
        {"name": HALF, "gap": {"value": None, "low": None, "high": None}, "documents": 0, "controls": 0}
    ]
    assert found["settings"] == {"prefixes": [8, 16]}
    assert (found["documents"], found["controls"], found["notes"]) == (20, 20, ["a note"])
    assert [attack["name"] for attack in found["blind"]] == ["texts alone", "tokenizer alone"]
    assert whole(blind=()).to_dict()["blind"] == []


def test_models_are_found_by_their_role() -> None:
    found = whole()
    assert found.audited is found.models[0]
    assert found.lines is found.audited.lines
    assert found.state == "absent"
    assert found.model("against").name == "o"
    assert found.model("twin").name == "t"
    assert found.model("seen once") is None


def test_the_same_seed_gives_the_same_figures() -> None:
    assert json.dumps(whole().to_dict()) == json.dumps(whole().to_dict())
    other = Figures(corpus(), dataclasses.replace(SETTINGS, seed=1)).model(ORDINARY, None, None, [])
    mine = Figures(corpus(), SETTINGS).model(ORDINARY, None, None, [])
    assert other.gap != mine.gap
    assert other.gap.value == mine.gap.value
