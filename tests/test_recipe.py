"""The YAML of a run: everything that is wrong with it is said at once, before anything starts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from memsinks.errors import ConfigError
from memsinks.runs.recipe import Recipe, parse_recipe, read_recipe
from memsinks.sinks.config import FORMAT_VERSION, SinkConfig

ROOT = Path(__file__).parents[1]
RECIPES = sorted(
    path for path in (ROOT / "recipes").glob("*.yaml") if not path.name.startswith(("compare-", "regimes"))
)
MODEL: dict[str, Any] = {"config": {"model_type": "llama", "hidden_size": 16}}
LEAST: dict[str, Any] = {"output": "runs/x", "model": MODEL}


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def message(**sections) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_recipe({**LEAST, **sections})
    return str(caught.value)


@pytest.mark.parametrize(("given", "updates"), [(True, 1), (False, 0), (1, 1), (0, 0), (16, 16)])
def test_sinks_first_may_be_said_as_yes_or_no(given, updates) -> None:
    sections = {"sinks": {"neurons": 64, "active": 32, "shared_decay": 1.0}, "training": {"sinks_first": given}}
    assert parse_recipe(LEAST | sections).training.sinks_first == updates


def test_the_least_recipe_gets_the_documented_defaults() -> None:
    recipe = parse_recipe(LEAST)
    assert recipe.sinks is None
    assert recipe.data.path is None
    assert recipe.tokenizer.vocab_size == 1024
    assert (recipe.training.length, recipe.training.precision) == (256, "fp32")
    assert recipe == Recipe(output="runs/x", model=recipe.model)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_recipes_of_the_repository_are_valid(path) -> None:
    recipe = read_recipe(path)
    assert recipe.sinks is not None
    assert parse_recipe(recipe.to_dict()) == recipe


def test_round_trip_of_everything() -> None:
    recipe = parse_recipe({
        "output": "o",
        "model": {"config": {"model_type": "gpt2", "n_embd": 16, "num_hidden_layers": 1}},
        "data": {"path": "d.jsonl", "key_field": "id", "limit": 9, "held_out": 2, "by": "key", "long": "truncate",
                 "repeat": {"documents": 3, "copies": [2, 4]}},
        "tokenizer": {"path": "t.json"},
        "sinks": {"neurons": 64, "active": 16, "block_size": 8, "layers": [0, 1], "shared": "none", "open_from": 3},
        "training": {"lr": 0.1, "betas": [0.8, 0.9], "precision": "bf16", "threads": 2, "save_every": 20},
    })  # fmt: skip
    written = yaml.safe_load(yaml.safe_dump(recipe.to_dict()))
    assert parse_recipe(written) == recipe
    assert written["sinks"]["format_version"] == FORMAT_VERSION
    assert recipe.sinks == SinkConfig(neurons=64, active=16, block_size=8, layers=(0, 1), shared="none", open_from=3)


def test_the_published_setting_can_be_written_as_a_recipe() -> None:
    published = SinkConfig.published(total=512)
    recipe = parse_recipe({**LEAST, "sinks": published.to_dict()})
    assert recipe.sinks == published


@pytest.mark.parametrize(
    ("sections", "name", "near"),
    [({"trainin": {}}, "trainin", "training"), ({"training": {"learning_rat": 1, "leng": 1}}, "training.leng", "length"),
     ({"data": {"heldout": 3}}, "data.heldout", "held_out"), ({"sinks": {"neurons": 8, "active": 8, "blocksize": 8}},
      "sinks.blocksize", "block_size"), ({"data": {"repeat": {"documents": 1, "copies": 2, "copy": 1}}},
      "data.repeat.copy", "copies"), ({"data": {"synthetic": {"storys": 3}}}, "data.synthetic.storys", "stories"),
     ({"model": {"config": {"model_type": "llama", "hiden_size": 16}}}, "model.config.hiden_size", "hidden_size"),
     ({"tokenizer": {"vocabsize": 300}}, "tokenizer.vocabsize", "vocab_size")],
)  # fmt: skip
def test_an_unknown_key_is_refused_with_the_nearest_name(sections, name, near) -> None:
    assert f"unknown key {name}; did you mean {near}?" in message(**sections)


def test_a_key_like_no_other_lists_the_known_ones() -> None:
    assert "unknown key tokenizer.zzz; known are path, vocab_size" in message(tokenizer={"zzz": 1})


def test_all_problems_are_listed_at_once() -> None:
    text = message(
        training={"lr": "fast", "lenght": 3, "precision": "fp8"}, data={"limit": "many"}, extra=1,
        sinks={"neurons": "64", "active": 16},
    )  # fmt: skip
    for part in ("training.lr must be a number, got 'fast'", "unknown key training.lenght; did you mean length?",
                 "training.precision must be one of 'fp32', 'bf16', got 'fp8'", "data.limit must be int, got 'many'",
                 "unknown key extra", "sinks.neurons must be int, got '64'"):  # fmt: skip
        assert part in text


def test_values_out_of_range_are_listed_at_once() -> None:
    text = message(
        training={
            "length": 1, "batch_rows": 6, "accumulate": 4, "lr": 0, "warmup": 2, "betas": [0.9], "seed": -1, "threads": 0,
            "weight_decay": -0.1, "max_grad_norm": math.nan, "min_lr_ratio": -1, "save_every": 15, "log_every": 10,
        },
        data={"held_out": -1, "limit": 0, "repeat": {"documents": 1, "copies": 2}, "copies_field": "n"},
    )  # fmt: skip
    for part in ("training: invalid TrainingConfig: length must be an int of at least 2, got 1", "accumulate (4) must divide",
                 "lr must be positive", "warmup must lie in [0, 1], got 2", "betas", "seed must be an int of at least 0, got -1",
                 "threads must be an int of at least 1, got 0", "weight_decay must be a finite number of at least 0, got -0.1",
                 "max_grad_norm must be a finite number of at least 0, got nan", "min_lr_ratio",
                 "data: held_out must be an int of at least 0, got -1; limit must be an int of at least 1, got 0",
                 "give repeat or copies_field, not both",
                 "save_every (15) must be a multiple of log_every (10)"):  # fmt: skip
        assert part in text


def test_a_zero_for_accumulate_is_a_message_too() -> None:
    assert "accumulate must be an int of at least 1, got 0" in message(training={"accumulate": 0, "log_every": 0})


def test_problems_of_the_sinks_are_passed_on() -> None:
    text = message(sinks={"neurons": 64, "active": 128})
    assert "sinks: invalid SinkConfig: active (128) exceeds neurons (64)" in text
    assert "sinks: sink settings have format_version 3, this memsinks reads 1 to 2" in message(
        sinks={"neurons": 64, "active": 64, "format_version": 3}
    )


@pytest.mark.parametrize(
    ("sections", "part"),
    [({"model": {}}, "model: give either pretrained or config"),
     ({"model": {"pretrained": "x", **MODEL}}, "model: give either pretrained or config"),
     ({"model": {"config": {"hidden_size": 16}}}, "model: config needs model_type"),
     ({"model": {"config": {"model_type": "lama"}}}, "'lama' is not known to transformers"),
     ({"tokenizer": {}}, "tokenizer: give either path or vocab_size"),
     ({"tokenizer": {"path": "x", "vocab_size": 300}}, "tokenizer: give either path or vocab_size"),
     ({"data": {"path": "x", "synthetic": {"stories": 3}}}, "data: synthetic is for the built-in corpus"),
     ({"data": {"repeat": {"documents": 1, "copies": 1.5}}}, "data.repeat.copies"),
     ({"data": {"repeat": {"documents": 1, "copies": []}}}, "data.repeat: copies is empty"),
     ({"data": {"repeat": {"documents": 0, "copies": 0}}},
      "data.repeat: documents must be an int of at least 1, got 0; copies must be an int of at least 1, got 0"),
     ({"training": 3}, "training must be a section of settings, got 3"),
     ({"training": {"gradient_checkpointing": 1}}, "training.gradient_checkpointing must be bool, got 1"),
     ({"training": {"seed": True}}, "training.seed must be int, got True"),
     ({"training": {"lr": True}}, "training.lr must be a number, got True"),
     ({"sinks": {"neurons": 64}}, "sinks.active is missing"),
     ({"settle": {"lr": 0}}, "settle: invalid SettleConfig: lr must be positive and finite, got 0"),
     ({"settle": {"sink_lr": -1}}, "sink_lr must be positive and finite, got -1"),
     ({"settle": {"passes": 0}}, "passes must be an int of at least 1, got 0"),
     ({"settle": {"rate": 1}}, "unknown key settle.rate"),
     ({"data": {"unseen": 3}}, "data: unseen is for documents of path"),
     ({"data": {"fresh": 3}}, "data: fresh is for documents of path"),
     ({"data": {"limit": 9, "key_field": "id", "clusters": "c.csv", "text_field": "text", "streaming": True}},
      "data: key_field, clusters, streaming, limit say how path is read; the built-in corpus is not read, leave them out"),
     ({"tokenizer": {"vocab_size": 256}}, "tokenizer: vocab_size must be an int of at least 257, got 256"),
     ({"data": {"path": "x", "unseen": -1}}, "data: unseen must be an int of at least 0, got -1"),
     ({"settle": {}, "data": {"path": "x", "background": {"path": "y", "tokens": 9}}}, "settle needs data.unseen"),
     ({"sinks": {"neurons": 64, "active": 8, "layers": ["a"]}}, "sinks.layers[0] must be int, got 'a'")],
)  # fmt: skip
def test_one_problem(sections, part) -> None:
    assert part in message(**sections)


def test_missing_sections_are_named() -> None:
    with pytest.raises(ConfigError, match="output is missing; model is missing"):
        parse_recipe({})


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("2E-4", 2e-4), ("1", 1.0), ("1.0e-3", 1e-3), (".5", 0.5)])
def test_numbers_are_read_however_they_are_written(tmp_path, text, value) -> None:
    """YAML 1.1 reads 1e-3 as text."""
    path = write(tmp_path, f"output: o\nmodel: {{config: {{model_type: llama}}}}\ntraining: {{lr: {text}}}\n")
    recipe = read_recipe(path)
    assert recipe.training.lr == value
    assert isinstance(recipe.training.lr, float)


def test_changes_replace_values_and_make_sections(tmp_path) -> None:
    path = write(tmp_path, yaml.safe_dump({**LEAST, "data": None, "sinks": {"neurons": 64, "active": 32}}))
    recipe = read_recipe(path, {
        "training.lr": "1e-4", "output": "elsewhere", "model.config.hidden_size": "32", "data.repeat.documents": "3",
        "data.repeat.copies": "[2, 4]", "data.held_out": "5",
    })  # fmt: skip
    assert recipe.training.lr == 1e-4
    assert recipe.output == "elsewhere"
    assert recipe.model.config["hidden_size"] == 32
    assert recipe.data.repeat is not None
    assert (recipe.data.repeat.documents, recipe.data.repeat.copies) == (3, [2, 4])
    assert read_recipe(path, {"sinks": "null", "data.held_out": "1"}).sinks is None


@pytest.mark.parametrize(
    ("changes", "part"),
    [({"training.lrr": "1"}, "unknown key training.lrr; did you mean lr?"), ({"output.x": "1"}, "output is not a section"),
     ({"training.lr": "[1"}, "cannot set training.lr"), ({"training.lr": ""}, "training.lr must be a number, got None")],
)  # fmt: skip
def test_changes_are_checked_too(tmp_path, changes, part) -> None:
    path = write(tmp_path, yaml.safe_dump(LEAST))
    with pytest.raises(ConfigError) as caught:
        read_recipe(path, changes)
    assert part in str(caught.value)


def test_old_names_are_read_and_said(tmp_path, caplog) -> None:
    path = write(tmp_path, yaml.safe_dump({**LEAST, "data": {"path": "d", "key_field": "id", "identity": "key"}}))
    with caplog.at_level("INFO", "memsinks"):
        assert read_recipe(path).data.by == "key"
    assert caplog.messages == ["data.identity is called data.by today"]
    assert read_recipe(write(tmp_path, yaml.safe_dump(LEAST)), {"data.identity": "source"}).data.by == "source"
    assert parse_recipe({**LEAST, "data": {"identity": "source"}}).data.by == "source"
    assert "unknown key data.identity" in message(data={"identity": "key", "by": "key"})


@pytest.mark.parametrize(
    ("text", "part"),
    [("a: [1", "not valid YAML"), ("", "must hold a mapping of sections, got NoneType"), ("- 1", "got list"),
     ("output: !!python/object:os.system x", "not valid YAML"),
     ("output: o\ntraining:\n  lr: 0.1\n  seed: 1\n  lr: 0.2\n", "the key 'lr' on line 3 is given again on line 5; keep one"),
     ("a: {b: 1, b: 2}", "the key 'b' on line 1 is given again on line 1")],
)  # fmt: skip
def test_files_that_are_no_recipe(tmp_path, text, part) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_recipe(path)
    assert part in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_is_merged_in_is_not_given_twice(tmp_path) -> None:
    config = "{<<: {hidden_size: 8}, model_type: llama, hidden_size: 16}"
    recipe = read_recipe(write(tmp_path, f"output: o\nmodel: {{config: {config}}}\n"))
    assert recipe.model.config["hidden_size"] == 16


def test_files_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the recipe .*none\.yaml: No such file"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        read_recipe(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_recipe(tmp_path / "bytes.yaml")
