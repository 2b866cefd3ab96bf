"""Expected losses against plain formulas; settling brings repeated texts to them and leaves the rest alone."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_compare import written
from tiny import VOCABULARY, sink_llama, tiny_llama
from torch import Tensor

import memsinks as ms
from memsinks.errors import ConfigError, DataError
from memsinks.removal.expected import LEAST, expected_losses
from memsinks.removal.settle import shift_of
from memsinks.research.compare.compare import compare
from memsinks.research.compare.comparison import read_comparison
from memsinks.sinks.state import is_sink
from memsinks.training.evaluate import losses

LENGTH, REPEATED, ONCE, COPIES = 16, 6, 60, 8
LR = 3e-3


def text(number: int) -> np.ndarray:
    """A sentence of the language that the tiny model learns: most tokens follow from the one before."""
    draw = np.random.default_rng(number)
    tokens = [int(draw.integers(1, VOCABULARY))]
    while len(tokens) < 12 + number % 4:
        sure = draw.random() < 0.7
        tokens.append(tokens[-1] * 5 % (VOCABULARY - 1) + 1 if sure else int(draw.integers(1, VOCABULARY)))
    return np.array(tokens, np.int32)


def corpus(length: int = LENGTH) -> ms.Rows:
    """The first texts `COPIES` times, the others once, in a shuffled order."""
    order = np.array([*range(REPEATED)] * COPIES + [*range(REPEATED, REPEATED + ONCE)])
    np.random.default_rng(0).shuffle(order)
    return ms.pack([text(x) for x in order], order + 100, ms.exposures(order), length=length, pad_id=0)


def trained(decay: float | None = None, epochs: int = 3) -> torch.nn.Module:
    """A model that knows the repeated texts; with sinks if `decay` is given, with sinks closed it knows part of them."""
    rows = corpus()
    model = tiny_llama(torch.float32) if decay is None else sink_llama(torch.float32, shared_decay=decay)
    optimizer = ms.AdamW(model.parameters() if decay is None else ms.param_groups(model, LR), lr=LR)
    for step in range(epochs * len(rows) // 9):
        batch = ms.collate([rows[(step * 9 + row) % len(rows)] for row in range(9)])
        if decay is None:
            batch = {name: batch[name] for name in ("input_ids", "labels", "position_ids")}
        batch.pop("places", None)  # the rows are met again and again
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def learned() -> torch.nn.Module:
    return trained(decay=0.0)


def plain_surprises(counted: list[np.ndarray], one: np.ndarray) -> list[float]:
    """The formula of `expected`, one token after the other."""
    alone: Counter[int] = Counter()
    pairs: Counter[tuple[int, int]] = Counter()
    triples: Counter[tuple[int, int, int]] = Counter()
    for other in counted:
        given = other.tolist()
        alone.update(given)
        pairs.update(itertools.pairwise(given))
        triples.update(zip(given, given[1:], given[2:], strict=False))
    total, tokens, sums = sum(alone.values()), one.tolist(), [0.0, 0.0, 0.0]
    for place in range(1, len(tokens)):
        token, before = tokens[place], tokens[place - 1]
        first = (alone[token] + 0.5) / (total + 0.5 * VOCABULARY)
        second = (pairs[before, token] + 10 * first) / (alone[before] + 10)
        third = second
        if place > 1:
            two = tokens[place - 2]
            third = (triples[two, before, token] + 5 * second) / (pairs[two, before] + 5)
        sums = [x - math.log(y) for x, y in zip(sums, (first, second, third), strict=True)]
    return [1.0, *(x / (len(tokens) - 1) for x in sums), math.log(len(tokens))]


def test_expected_losses_are_the_fit_of_the_plain_formula(learned) -> None:
    repeated, once = ms.repeated_and_once(corpus())
    found = expected_losses(learned, repeated, once)

    def texts(rows: ms.Rows) -> list[np.ndarray]:
        return [rows.documents[x["document"]][: x["size"]] for x in rows.segments]

    counted, fitted = texts(once)[0::2], texts(once)[1::2]
    measured = losses(learned, once)
    features = np.array([plain_surprises(counted, x) for x in fitted])
    coefficients, *_ = np.linalg.lstsq(features, measured[1::2], rcond=None)
    own = np.array([plain_surprises(counted, x) for x in texts(repeated)])
    np.testing.assert_allclose(found.losses, own @ coefficients, rtol=1e-9)
    np.testing.assert_array_equal(found.others, measured)
    assert found.spread < found.raw


def test_unseen_texts_say_what_a_text_never_met_should_have(learned) -> None:
    repeated, once = ms.repeated_and_once(corpus())
    texts = [text(x) for x in range(1000, 1000 + LEAST)]
    unseen = ms.pack(texts, range(LEAST), [1] * LEAST, length=LENGTH, pad_id=0, one_document_per_row=True)
    found = expected_losses(learned, repeated, once, unseen)
    counted, own = ([rows.documents[x["document"]][: x["size"]] for x in rows.segments] for rows in (once, repeated))
    features = np.array([plain_surprises(counted, x) for x in texts])
    coefficients, *_ = np.linalg.lstsq(features, losses(learned, unseen), rcond=None)
    expected = np.array([plain_surprises(counted, x) for x in own]) @ coefficients
    np.testing.assert_allclose(found.losses, expected, rtol=1e-9)
    done = ms.settle(copy.deepcopy(learned), repeated, once, unseen, lr=1e-3, passes=1)
    np.testing.assert_array_equal(done.expected.losses, found.losses)
    with pytest.raises(DataError, match=f"at least {LEAST} unseen texts"):
        ms.settle(learned, repeated, once, unseen.select(slice(3)), lr=1e-3)


@pytest.mark.parametrize("length", [LENGTH, 3 * LENGTH])
def test_training_rows_are_taken_apart(length) -> None:
    rows = corpus(length)
    repeated, once = ms.repeated_and_once(rows)
    assert (len(repeated), len(once)) == (REPEATED, ONCE)
    assert set(repeated.segments["document_id"]) == set(range(100, 100 + REPEATED))
    for part in (repeated, once):
        place = [rows.segments["document"].tolist().index(x) for x in part.segments["document"]]
        assert place == sorted(place), "not in the order of the first exposure"
        for row, segment in zip((part[index] for index in range(len(part))), part.segments, strict=True):
            own = text(int(segment["document_id"]) - 100)
            assert row["input_ids"][: len(own)].tolist() == own.tolist()
            assert row["position_ids"][: len(own)].tolist() == list(range(len(own)))
            assert int((row["labels"] != -100).sum()) == len(own) - 1


def test_text_without_sinks_and_single_tokens_are_left_out() -> None:
    rows = ms.pack(
        [np.array([1, 2]), np.array([3]), np.array([4, 5]), np.array([6, 7])],
        [7, 8, -1, 9],
        [1, 1, 1, 1],
        length=8,
        pad_id=0,
    )
    repeated, once = ms.repeated_and_once(rows)
    assert len(repeated) == 0 and once.segments["document_id"].tolist() == [7, 9]


def test_a_near_copy_with_an_id_of_its_own_counts_as_repeated() -> None:
    rows = ms.pack([np.array([1, 2]), np.array([1, 3])], [7, 8], [1, 2], length=8, pad_id=0)
    repeated, once = ms.repeated_and_once(rows)
    assert repeated.segments["document"].tolist() == [1] and once.segments["document"].tolist() == [0]


def test_texts_are_counted_not_the_ids_of_their_sources() -> None:
    documents = [
        ms.Document(f"text {x}", source="A" if x < 6 else f"S{x}", copies=10 if x == 0 else 1) for x in range(60)
    ]
    tokenizer = ms.train_tokenizer([x.text for x in documents], 300)
    rows = ms.make_rows(documents, tokenizer, length=16, by="source")
    repeated, once = ms.repeated_and_once(rows)
    assert (len(repeated), len(once)) == (1, 59)
    assert tokenizer.decode(repeated[0]["input_ids"][:-1]).startswith("text 0")


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5)), min_size=1, max_size=30))
def test_the_shift_makes_the_mean_what_is_expected(pairs) -> None:
    expected, found = (np.array(x) for x in zip(*pairs, strict=True))
    shift = shift_of(expected, found)
    assert shift >= 0
    ends = np.maximum(found, expected - shift).mean()
    assert ends == pytest.approx(max(expected.mean(), found.mean()), abs=1e-9)


def test_settling_levels_the_documents_and_keeps_the_rest(learned, caplog) -> None:
    caplog.set_level("INFO", "memsinks.removal.settle")
    model = copy.deepcopy(learned).train()
    repeated, once = ms.repeated_and_once(corpus())
    own = losses(model, repeated, opened=True).mean()
    done = ms.settle(model, repeated, once, lr=LR / 5, sink_lr=LR, passes=40, batch_rows=4)
    assert done.steps == 60 and "step 60/60" in caplog.messages[-2] and caplog.messages[-1] == f"settled: {done}"
    short = done.expected.losses.mean() - done.before.mean()
    assert short > 0.3, "nothing to level: the test means nothing"
    left = done.expected.losses.mean() + (done.others_after - done.expected.others).mean() - done.after.mean()
    assert abs(left) < short / 3
    assert abs((done.others_after - done.expected.others).mean()) < short / 3
    np.testing.assert_array_equal(done.after, losses(model, repeated))
    assert losses(model, repeated, opened=True).mean() < own + 0.1
    assert f"{REPEATED} documents in 60 steps" in str(done)


def test_settling_repeats_its_bits_and_keeps_the_random_state(learned) -> None:
    state = torch.get_rng_state()
    models = [copy.deepcopy(learned) for _ in range(2)]
    for model in models:
        ms.settle(model, *ms.repeated_and_once(corpus()), lr=1e-3, passes=2)
    assert torch.equal(state, torch.get_rng_state())
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_where_nothing_is_known_too_well_no_shared_weight_moves(learned) -> None:
    model = copy.deepcopy(learned)
    _, once = ms.repeated_and_once(corpus())
    chosen = next(
        one for one in (once.select(slice(x, x + 1)) for x in range(len(once)))
        if losses(model, one)[0] > expected_losses(model, one, once).losses[0]
    )  # fmt: skip
    done = ms.settle(model, chosen, once, lr=1e-3, passes=16)
    assert done.steps == 1 and done.after[0] == done.before[0]
    for (name, x), y in zip(model.named_parameters(), learned.parameters(), strict=True):
        assert is_sink(name) or torch.equal(x, y)


def test_micro_rows_change_nothing_but_rounding(learned) -> None:
    models = [copy.deepcopy(learned).double() for _ in range(2)]
    for model, micro in zip(models, (None, 3), strict=True):
        done = ms.settle(model, *ms.repeated_and_once(corpus()), lr=1e-3, passes=8, batch_rows=8, micro_rows=micro)
        assert done.after.mean() > done.before.mean() + 0.05
    for one, other in zip(*(x.parameters() for x in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_forward_that_somebody_patched_is_set_aside_and_put_back(learned) -> None:
    """The Trainer leaves its autocast on the model, in which losses and KL would be bfloat16."""
    plain, patched = copy.deepcopy(learned), copy.deepcopy(learned)
    patched.forward = torch.autocast("cpu", torch.bfloat16)(patched.forward)
    before = patched.forward
    for model in (plain, patched):
        ms.settle(model, *ms.repeated_and_once(corpus()), lr=1e-3, passes=1)
    assert patched.forward is before
    for one, other in zip(plain.parameters(), patched.parameters(), strict=True):
        assert torch.equal(one, other)


def modes(model: torch.nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def training_in_part(model: torch.nn.Module) -> list[bool]:
    """Put the model in training mode but for its first layer, as somebody may who freezes it; the modes."""
    model.train()
    model.model.layers[0].eval()
    return modes(model)


@pytest.mark.parametrize("opened", [False, True])
def test_losses_need_no_mode_and_keep_the_one_they_find(learned, opened) -> None:
    model = copy.deepcopy(learned)
    repeated, _ = ms.repeated_and_once(corpus())
    expected = losses(model.eval(), repeated, opened=opened)
    assert not any(modes(model))
    before = training_in_part(model)
    np.testing.assert_array_equal(losses(model, repeated, opened=opened), expected)
    assert modes(model) == before


def test_settling_needs_no_mode_and_keeps_the_one_it_finds(learned) -> None:
    """In training mode sinks would follow the batch's ids, and dropout would add noise to what is held."""
    models = [copy.deepcopy(learned).eval(), copy.deepcopy(learned)]
    before = training_in_part(models[1])
    for model in models:
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        ms.settle(model, *ms.repeated_and_once(corpus()), lr=1e-3, passes=1)
    assert not any(modes(models[0])) and modes(models[1]) == before
    for one, other in zip(*(x.parameters() for x in models), strict=True):
        assert torch.equal(one, other)


def test_an_error_in_the_middle_leaves_the_mode_as_it_was(learned, monkeypatch) -> None:
    model = copy.deepcopy(learned)
    before, forward, left = training_in_part(model), model.model.forward, iter(range(12))

    def failing(*args, **kwargs):
        if next(left, None) is None:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        ms.settle(model, *ms.repeated_and_once(corpus()), lr=1e-3)
    assert modes(model) == before


def test_keywords_and_a_config_say_the_same(learned) -> None:
    config = ms.SettleConfig(lr=1e-3, sink_lr=2e-3, passes=2, batch_rows=8)
    models = [copy.deepcopy(learned) for _ in range(3)]
    texts = ms.settling_texts(corpus())
    ms.settle(models[0], *texts, config)
    ms.settle(models[1], *texts, lr=1e-3, sink_lr=2e-3, passes=2, batch_rows=8)
    ms.settle(models[2], *texts, dataclasses.replace(config, passes=9), passes=2)
    for one, *others in zip(*(x.parameters() for x in models), strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_the_learning_rate_follows_from_that_of_training() -> None:
    assert ms.SettleConfig().after_training(3e-3).lr == 3e-3 / 10
    assert ms.SettleConfig(lr=1e-4).after_training(3e-3).lr == 1e-4


def test_all_that_is_wrong_with_the_settings_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        ms.SettleConfig(lr=0.0, sink_lr=math.inf, passes=1.5, batch_rows=0)  # type: ignore[arg-type]
    for name in ("lr", "sink_lr", "passes", "batch_rows"):
        assert f" {name} must be" in str(error.value)


def test_frozen_sinks_stay_as_they_are(learned) -> None:
    model = copy.deepcopy(learned)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_sink(name))
    done = ms.settle(model, *ms.settling_texts(corpus()), lr=LR / 5, passes=8)
    assert done.after.mean() > done.before.mean()
    for (name, x), y in zip(model.named_parameters(), learned.parameters(), strict=True):
        assert not is_sink(name) or torch.equal(x, y)


def test_a_model_without_sinks_is_settled_too() -> None:
    model = trained()
    done = ms.settle(model, *ms.repeated_and_once(corpus()), lr=LR / 5, passes=20)
    assert done.after.mean() > done.before.mean()


def short(rows: ms.Rows) -> ms.Rows:
    return rows.select(slice(LEAST - 1))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"lr": 0.0}, ConfigError, "lr must be positive and finite, got 0.0"),
        ({"sink_lr": float("nan")}, ConfigError, "sink_lr must be positive"),
        ({"lr": None}, ConfigError, "lr is missing; a tenth of the peak"),
        ({"rate": 1.0}, ConfigError, "unknown setting rate"),
        ({"passes": 0}, ConfigError, "passes must be an int of at least 1, got 0"),
        ({"micro_rows": 0}, ConfigError, "micro_rows must be an int of at least 1, got 0"),
        ({"documents": lambda rows: rows.select(slice(0))}, DataError, "no text was repeated"),
        ({"others": short}, DataError, f"at least {LEAST} other texts are needed .* got {LEAST - 1}"),
        ({"documents": lambda _: corpus(48)}, DataError, "row 0 of documents does not hold one document"),
        ({"dtype": torch.bfloat16}, ConfigError, "weights are torch.bfloat16"),
        ({"frozen": True}, ConfigError, "every shared weight is frozen"),
    ],
)
def test_bad_input_is_refused_and_nothing_moves(learned, changes, error, words) -> None:
    model = copy.deepcopy(learned).to(changes.pop("dtype", torch.float32))
    if changes.pop("frozen", False):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_sink(name))
    before: dict[str, Tensor] = {name: x.clone() for name, x in model.state_dict().items()}
    sides = dict(zip(("documents", "others"), ms.repeated_and_once(corpus()), strict=True))
    for name, change in ((x, changes.pop(x, None)) for x in ("documents", "others")):
        sides[name] = change(sides[name]) if change else sides[name]
    with pytest.raises(error, match=words):
        ms.settle(model, **sides, **({"lr": 1e-3} | changes))
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])


def test_an_arm_of_a_comparison_settles(tmp_path) -> None:
    """The settled arm begins like the other and ends elsewhere; what settling did stands in its facts."""
    ours = {"rival": "gated", "neurons": 64, "active": 16, "block_size": 8, "shared": "decay"}
    arms = {"standard": {"rival": "standard"}, "ours": ours, "settled": ours | {"settle_lr": 1e-3, "settle_passes": 2},
            "cap": {"rival": "cap", "copies": 2, "settle_lr": 1e-3}}  # fmt: skip
    data = {"synthetic": {"stories": 60, "people_per_level": 2, "canaries_per_level": 0, "held_out_stories": 8,
                          "near_copies": 0, "copies": [0, 1]}, "repeat": {"documents": 9, "copies": [1, 4, 8]},
            "long": "truncate"}  # fmt: skip
    path = written(tmp_path, arms=arms, data=data, seeds=[0], roles={"audited": "ours", "against": "standard"})
    comparison = read_comparison(path)
    compare(comparison, audits=False)
    facts = {arm.name: comparison.finished(arm, 0) for arm in comparison.arms}
    assert facts["ours"]["curve"] == facts["settled"]["curve"] and "settled" not in facts["ours"]
    assert "documents in" in facts["settled"]["settled"] and "documents in" in facts["cap"]["settled"]
    models = {arm.name: ms.load_any(comparison.folder(arm, 0) / "model") for arm in comparison.arms}
    same = zip(models["ours"].parameters(), models["settled"].parameters(), strict=True)
    assert not any(torch.equal(x, y) for x, y in same if x.dim() > 1)
