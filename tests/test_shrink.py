"""A recipe made smaller stays that recipe: shares, steps, and everything valid."""

from __future__ import annotations

import copy
from fractions import Fraction
from pathlib import Path

import pytest

from memsinks.errors import ConfigError
from memsinks.research.compare.comparison import read_comparison
from memsinks.runs.estimate import meta_model, size_of
from memsinks.runs.recipe import parse_recipe, read_recipe, read_sections
from memsinks.runs.shrink import parse_scale, shrink

ROOT = Path(__file__).parents[1]
PAPER = sorted((ROOT / "recipes" / "paper").glob("*.yaml"))
PLAIN = {
    "output": "runs/x",
    "data": {"path": "d.jsonl", "limit": 1200, "held_out": 100, "repeat": {"documents": 100, "copies": [1, 16]}},
    "model": {"config": {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8,
                         "num_attention_heads": 8}},
    "sinks": {"neurons": 1024, "active": 256, "block_size": 64, "intermediate_size": 1024},
    "training": {"length": 256, "batch_rows": 64, "accumulate": 8, "lr": "1e-3"},
}  # fmt: skip


@pytest.mark.parametrize("scale", ["1", "1/4", "1/64", "1/512"])
@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_recipes_of_the_paper_stay_valid(path, scale) -> None:
    full, small = read_comparison(path), read_comparison(path, scale=parse_scale(scale))
    assert [(arm.name, arm.rival) for arm in small.arms] == [(arm.name, arm.rival) for arm in full.arms]
    meta_model(small.recipe)  # the architecture takes these heads and widths
    for before, after in zip(full.arms, small.arms, strict=True):
        if before.training.sinks:
            assert after.training.sinks is not None
            share = before.training.sinks.active / before.training.sinks.neurons
            assert after.training.sinks.active / after.training.sinks.neurons == pytest.approx(share, abs=0.15)
    if full.recipe.data.background:
        assert size_of(small.recipe).steps == pytest.approx(size_of(full.recipe).steps, rel=0.15)


def test_shares_stay() -> None:
    small = parse_recipe(shrink(PLAIN, Fraction(1, 16)))
    data, training = small.data, small.training
    assert (data.repeat.documents, data.repeat.copies, data.held_out) == (25, [1, 4], 25)  # type: ignore[union-attr]
    assert data.limit == 25 + 25 + 62  # 1,000 seen once
    config = small.model.config
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (128, 256, 2)
    assert (training.length, training.batch_rows, training.accumulate) == (128, 8, 2)
    assert training.lr == pytest.approx(4e-3)
    assert small.sinks is not None
    assert (small.sinks.neurons, small.sinks.active, small.sinks.block_size, small.sinks.intermediate_size) == (
        256,
        64,
        16,
        None,
    )
    assert small.output == "runs/x-scale-1-16"
    assert small.tokenizer.vocab_size == 12_544


def test_nothing_is_changed_in_place_and_the_same_comes_out() -> None:
    before = copy.deepcopy(PLAIN)
    assert shrink(PLAIN, Fraction(1, 4)) == shrink(PLAIN, Fraction(1, 4))
    assert before == PLAIN


def test_what_is_set_comes_after(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "output: o\ndata: {limit: 64, path: hub/name}\nmodel: {config: {model_type: gpt2, n_embd: 256, n_head: 4}}\n"
    )
    recipe = read_recipe(path, {"data.path": "mine.jsonl", "data.limit": "50", "output": "here"}, Fraction(1, 4))
    assert (recipe.data.path, recipe.data.limit, recipe.output) == ("mine.jsonl", 50, "here")
    assert recipe.model.config["n_embd"] == 128


@pytest.mark.parametrize(
    ("changes", "scale", "part"),
    [({}, "1/100000", "data.held_out 100 becomes 0; data.repeat.documents 100 becomes 0; the 1000 documents seen once become 0"),
     ({"data": {"path": "d.jsonl"}}, "1/4", "data.limit is missing"),
     ({"model": {"pretrained": "gpt2"}}, "1/4", "not a pretrained one"),
     ({"model": {"config": {"model_type": "llama"}}}, "1/4", "model.config.hidden_size is missing"),
     ({"data": {"path": "d", "limit": 100, "background": {"path": "b", "tokens": 10_000}}}, "1/64",
      "background.tokens becomes 156")],
)  # fmt: skip
def test_what_cannot_be_smaller_is_said(changes, scale, part) -> None:
    with pytest.raises(ConfigError) as caught:
        shrink(PLAIN | changes, parse_scale(scale))
    assert part in str(caught.value)


def test_a_wrong_recipe_is_refused_before_it_is_made_smaller(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("output: o\nmodel: {config: {model_type: llama, hidden_size: 64}}\ntraining: {length: long}\n")
    with pytest.raises(ConfigError, match="training.length must be int, got 'long'"):
        read_sections(path, scale=Fraction(1, 4))


@pytest.mark.parametrize(
    ("text", "part"), [("0", "(0, 1]"), ("-1/2", "(0, 1]"), ("2", "(0, 1]"), ("1/0", "1/64"), ("x", "1/64")]
)
def test_scales(text, part) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_scale(text)
    assert part in str(caught.value)
