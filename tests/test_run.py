"""One run of a recipe: the run folder, the same figures again, resuming, corpora from files, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from memsinks.batch import NO_SINKS
from memsinks.data.documents import Document
from memsinks.data.identity import document_id
from memsinks.data.tokens import encode, load_tokenizer, train_tokenizer
from memsinks.errors import CheckpointError, ConfigError, DataError
from memsinks.runs import run
from memsinks.runs.data_recipe import DataRecipe, RepeatRecipe
from memsinks.runs.folder import RunFolder
from memsinks.runs.prepare import choose_documents, prepare
from memsinks.runs.recipe import parse_recipe
from memsinks.runs.run import train
from memsinks.sinks.checkpoint import load, load_any
from memsinks.sinks.state import has_sinks, is_sink
from memsinks.training.loop import Training


def metrics(output: Path) -> list[dict]:
    """The lines of metrics without the rate, which is the machine's."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model/model.safetensors") | load_file(output / "model/sinks/sinks.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def write_jsonl(path: Path, number: int, words: int = 12) -> Path:
    lines = [{"text": " ".join(f"word{index % 7}x{place}" for place in range(words)) + f" {index}", "id": f"d{index}"}
             for index in range(number)]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def steps(tiny_run) -> int:
    return metrics(tiny_run)[-1]["step"]


def test_the_run_folder(tiny_run, tiny_recipe, steps) -> None:
    assert {path.name for path in tiny_run.iterdir()} == {
        "recipe.yaml", "run.json", "metrics.jsonl", "members.jsonl", "controls.jsonl", "checkpoints", "model",
    }  # fmt: skip
    recipe = parse_recipe(yaml.safe_load((tiny_run / "recipe.yaml").read_text()))
    assert recipe == parse_recipe(tiny_recipe(tiny_run))
    assert [line["step"] for line in metrics(tiny_run)] == list(range(1, steps + 1))
    assert all(line["learning_rate"] <= 3e-3 for line in metrics(tiny_run))
    facts = json.loads((tiny_run / "run.json").read_text())
    members, controls = (
        [Document(**json.loads(line)) for line in (tiny_run / f"{name}.jsonl").read_text().splitlines()]
        for name in ("members", "controls")
    )
    assert (facts["documents"], facts["controls"], facts["seed"]) == (len(members), len(controls), 0)
    assert facts["rows"] // 8 == steps
    assert 0.5 < facts["fill"] <= 1
    assert set(facts["versions"]) == {
        "memsinks", "python", "torch", "transformers", "accelerate", "tokenizers", "numpy", "safetensors",
    }  # fmt: skip
    assert len(facts["corpus_sha256"]) == 64
    assert {document.copies for document in members} == {1, 8}
    assert {document.copies for document in controls} == {0}
    assert not {document.text for document in members} & {document.text for document in controls}
    tokenizer = load_tokenizer(tiny_run / "model")
    tokens = sum(len(t) * d.copies for t, d in zip(encode(tokenizer, [d.text for d in members]), members, strict=True))
    assert facts["tokens"] == tokens


def test_the_final_model_loads_with_and_without_sinks(tiny_run) -> None:
    model = load_any(tiny_run / "model")
    assert has_sinks(model)
    assert not model.training
    assert float(model.model.layers[0].mlp.sinks.down.detach().abs().max()) > 0
    stock = LlamaForCausalLM.from_pretrained(tiny_run / "model")
    assert not has_sinks(stock)
    tokens = torch.arange(8)[None]
    assert torch.equal(stock.eval()(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_training_learns_something(tiny_run) -> None:
    curve = [line["loss"] for line in metrics(tiny_run)]
    assert curve[-1] < curve[0] - 0.2


def test_the_same_recipe_gives_the_same_figures_and_another_seed_others(tiny_run, tiny_recipe, tmp_path) -> None:
    torch.manual_seed(123)  # the caller's random state does not matter
    train(parse_recipe(tiny_recipe(tmp_path / "again", training={"save_every": 0})))
    assert metrics(tmp_path / "again") == metrics(tiny_run)
    assert same_weights(tmp_path / "again", tiny_run)
    assert not list((tmp_path / "again" / "checkpoints").glob("checkpoint-*"))
    train(parse_recipe(tiny_recipe(tmp_path / "other", training={"seed": 1, "save_every": 0})))
    assert metrics(tmp_path / "other") != metrics(tiny_run)


def interrupt_after(monkeypatch, step: int) -> None:
    """Ctrl-C while the next step is made."""
    update = Training.update

    def interrupted(self, parts) -> float:
        if self.step == step:
            raise KeyboardInterrupt
        return update(self, parts)

    monkeypatch.setattr(Training, "update", interrupted)


def test_an_interrupted_run_resumes_to_identical_figures(tiny_run, tiny_recipe, tmp_path, monkeypatch, caplog) -> None:
    recipe = parse_recipe(tiny_recipe(tmp_path / "run"))
    interrupt_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    monkeypatch.undo()
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]
    assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(CheckpointError, match="is not empty; resume"):
        train(recipe)
    final = train(recipe, resume=True)
    assert metrics(tmp_path / "run") == metrics(tiny_run)
    assert same_weights(tmp_path / "run", tiny_run)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    caplog.set_level("INFO", "memsinks")
    assert train(recipe, resume=True) == final
    assert "is finished" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


SETTLED = {"data": {"synthetic": {"stories": 80, "people_per_level": 4, "canaries_per_level": 2, "held_out_stories": 6,
                                  "copies": [0, 1, 8]}},
           "sinks": {"shared_decay": 0.25}, "training": {"save_every": 11, "log_every": 11},
           "settle": {"lr": 1e-3, "passes": 2}}  # fmt: skip


def test_a_run_settles_at_its_end_and_resumes_what_was_interrupted_there(
    tiny_recipe, tmp_path, monkeypatch, caplog
) -> None:
    caplog.set_level("INFO", "memsinks")
    plain, whole = (
        parse_recipe(tiny_recipe(tmp_path / name, **(SETTLED | more)))
        for name, more in (("plain", {"settle": None}), ("whole", {}))
    )
    train(plain)
    caplog.set_level("INFO", "memsinks")
    train(whole, label="   ")
    assert "settle: step 1/" in caplog.text and "settled: " in caplog.text
    facts = json.loads((tmp_path / "whole/run.json").read_text())
    assert "documents in" in facts["settled"] and "expected" in facts["settled"]
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "whole")
    assert metrics(tmp_path / "whole")[-1]["step"] == 22  # a multiple of save_every: the very end
    assert not same_weights(tmp_path / "plain", tmp_path / "whole")

    def interrupted(*args, **kwargs) -> None:
        raise KeyboardInterrupt

    for name, more in (("cut", {}), ("no checkpoint", {"save_every": 0})):
        recipe = parse_recipe(tiny_recipe(tmp_path / name, **(SETTLED | {"training": SETTLED["training"] | more})))
        monkeypatch.setattr(run, "settle", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
        monkeypatch.undo()
        assert not (tmp_path / name / "model").exists() and (tmp_path / name / "checkpoints/checkpoint-22").is_dir()
        with monkeypatch.context() as patch:
            patch.setattr(Training, "update", interrupted)  # nothing is trained again
            train(recipe, resume=True)
        assert same_weights(tmp_path / name, tmp_path / "whole")
        assert not (tmp_path / name / "checkpoints/checkpoint-22").exists()
        assert metrics(tmp_path / name) == metrics(tmp_path / "whole")


def test_a_run_interrupted_before_its_first_checkpoint_starts_again(tiny_run, tiny_recipe, tmp_path, caplog) -> None:
    recipe = parse_recipe(tiny_recipe(tmp_path / "run"))
    output = tmp_path / "run"
    output.mkdir()
    (output / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    (output / "metrics.jsonl").write_text('{"step": 1, "loss": 9.9}\n')
    half = output / "checkpoints" / "checkpoint-2"
    half.mkdir(parents=True)  # cut off while it was written
    (half / "model.safetensors").write_bytes(b"half")
    caplog.set_level("INFO", "memsinks")
    train(recipe, resume=True)
    assert "starting again" in caplog.text
    assert metrics(output) == metrics(tiny_run)
    assert same_weights(output, tiny_run)
    for name in ("members.jsonl", "controls.jsonl"):
        assert (output / name).read_text() == (tiny_run / name).read_text()


def test_a_damaged_last_line_of_metrics_does_not_stop_resuming(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    RunFolder(tmp_path).cut_metrics(2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_resuming_what_is_not_this_run_is_refused(tiny_run, tiny_recipe, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="holds no run to resume"):
        train(parse_recipe(tiny_recipe(tmp_path / "nothing")), resume=True)
    changed = tiny_recipe(tiny_run, training={"lr": 1e-3})
    with pytest.raises(CheckpointError, match=r"recipe\.yaml was made with other settings: training\.lr"):
        train(parse_recipe(changed), resume=True)
    with pytest.raises(CheckpointError, match="is not empty"):
        train(parse_recipe(tiny_recipe(tiny_run)))


def test_an_ordinary_model_is_trained_on_the_same_rows(tiny_run, tiny_recipe, tmp_path) -> None:
    folder = train(parse_recipe(tiny_recipe(tmp_path / "run", sinks=None)))
    model = load_any(folder)
    assert not has_sinks(model)
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(metrics(tiny_run)[0]["loss"], rel=1e-4)
    assert (tmp_path / "run" / "members.jsonl").read_text() == (tiny_run / "members.jsonl").read_text()


def test_accumulation_and_checkpointing_change_nothing_but_rounding(tiny_run, tiny_recipe, tmp_path) -> None:
    whole = {"save_every": 0}
    parts = whole | {"accumulate": 4, "gradient_checkpointing": True}
    for name, training in (("whole", whole), ("parts", parts)):
        train(parse_recipe(tiny_recipe(tmp_path / name, training=training)))
    assert metrics(tmp_path / "whole") == metrics(tiny_run)
    for ours, theirs in zip(metrics(tmp_path / "parts"), metrics(tmp_path / "whole"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_bf16_and_exact_mode_run(tiny_recipe, tmp_path) -> None:
    sinks = {"neurons": 64, "active": 16, "block_size": 8, "shared": "none"}
    recipe = tiny_recipe(tmp_path / "run", sinks=sinks, training={"precision": "bf16", "save_every": 0})
    train(parse_recipe(recipe))
    curve = [line["loss"] for line in metrics(tmp_path / "run")]
    assert curve[-1] < curve[0]
    assert load(tmp_path / "run" / "model").dtype == torch.float32


# The corpus


def test_documents_are_held_out_and_repeated_by_the_seed(tmp_path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", 30)
    data = DataRecipe(path=str(path), key_field="id", held_out=5, repeat=RepeatRecipe(documents=7, copies=[2, 4, 16]))
    documents, _, _ = choose_documents(data, seed=0)
    copies = sorted(document.copies for document in documents)
    assert copies == [0] * 5 + [1] * 18 + [2] * 3 + [4] * 2 + [16] * 2
    assert [document.key for document in documents] == [f"d{index}" for index in range(30)]
    assert choose_documents(data, seed=0)[0] == documents
    assert choose_documents(data, seed=1)[0] != documents
    assert len(choose_documents(DataRecipe(path=str(path), limit=8), seed=0)[0]) == 8


def test_unseen_documents_are_the_next_ones_and_change_nothing_else(tmp_path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", 30)
    data = DataRecipe(path=str(path), key_field="id", limit=20, held_out=5, repeat=RepeatRecipe(documents=7, copies=4))
    chosen, *none = choose_documents(data, seed=0)
    assert none == [[], []]
    for limit in (20, None):
        more = dataclasses.replace(data, limit=limit, unseen=10)
        for seed in (0, 1):
            documents, unseen, fresh = choose_documents(more, seed=seed)
            assert fresh == []
            assert [document.key for document in unseen] == [f"d{index}" for index in range(20, 30)]
            assert {document.copies for document in unseen} == {0}
            assert (documents == chosen) == (seed == 0)
    with pytest.raises(ConfigError, match=r"data\.unseen \(30\) leave none of 30 documents"):
        choose_documents(dataclasses.replace(data, limit=None, unseen=30), seed=0)
    with pytest.raises(ConfigError, match=r"data\.unseen \(11\) after data\.limit \(20\) are more than there is of 30"):
        choose_documents(dataclasses.replace(data, unseen=11), seed=0)


def test_fresh_documents_come_after_the_unseen_ones_and_change_nothing_else(tmp_path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", 30)
    data = DataRecipe(path=str(path), key_field="id", limit=20, held_out=5, unseen=4)
    chosen = choose_documents(data, seed=0)
    more = choose_documents(dataclasses.replace(data, fresh=6), seed=0)
    assert (more.documents, more.unseen) == (chosen.documents, chosen.unseen)
    assert [document.key for document in more.fresh] == [f"d{index}" for index in range(24, 30)]
    with pytest.raises(
        ConfigError, match=r"data\.unseen \(4\) and data\.fresh \(7\) after data\.limit \(20\) are more than"
    ):
        choose_documents(dataclasses.replace(data, fresh=7), seed=0)


def test_a_text_that_is_also_trained_on_is_not_unseen(tmp_path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n % 8}"}) + "\n" for n in range(10)))
    _, unseen, _ = choose_documents(DataRecipe(path=str(path), unseen=4), seed=0)
    assert [document.text for document in unseen] == ["text 6", "text 7"]


def test_copies_of_the_file_are_kept(tmp_path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n}", "n": n}) + "\n" for n in (0, 1, 3)))
    data = DataRecipe(path=str(path), copies_field="n", held_out=1)
    documents, _, _ = choose_documents(data, seed=0)
    assert documents[0].copies == 0
    assert sorted(document.copies for document in documents[1:])[0] == 0
    with pytest.raises(ConfigError, match=r"held_out \(2\).*leave none of 2 documents"):
        choose_documents(DataRecipe(path=str(path), copies_field="n", held_out=2), seed=0)


def test_the_path_may_come_from_the_environment(tmp_path, monkeypatch) -> None:
    write_jsonl(tmp_path / "d.jsonl", 3)
    monkeypatch.setenv("CORPUS_FOLDER", str(tmp_path))
    assert len(choose_documents(DataRecipe(path="$CORPUS_FOLDER/d.jsonl"), seed=0)[0]) == 3
    monkeypatch.delenv("CORPUS_FOLDER")
    with pytest.raises(ConfigError, match=r"\$CORPUS_FOLDER/d\.jsonl.*not set"):
        choose_documents(DataRecipe(path="$CORPUS_FOLDER/d.jsonl"), seed=0)


def test_rows_carry_ids_and_exposures_of_the_documents(tiny_recipe, tmp_path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", 20)
    data = {"path": str(path), "held_out": 2, "repeat": {"documents": 3, "copies": 5}}
    recipe = parse_recipe(tiny_recipe(tmp_path / "run", data=data, training={"length": 128, "batch_rows": 2}))
    prepared = prepare(recipe)
    rows = prepared.rows
    assert (len(prepared.members), len(prepared.controls)) == (18, 2)
    for document in prepared.members:
        own = rows.document_ids == document_id(document.text)
        assert set(rows.exposures[own].tolist()) == set(range(1, document.copies + 1))
    known = {document_id(document.text) for document in prepared.members} | {NO_SINKS}
    assert set(rows.document_ids.ravel().tolist()) <= known
    twice = prepare(parse_recipe(tiny_recipe(tmp_path / "run", data=data, training={"length": 128, "epochs": 2})))
    assert twice.rows.exposures.max() == 10


def test_ids_can_come_from_keys(tiny_recipe, tmp_path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", 12)
    data = {"path": str(path), "key_field": "id", "identity": "key"}
    recipe = parse_recipe(tiny_recipe(tmp_path / "run", data=data, training={"length": 64, "batch_rows": 2}))
    ids = set(prepare(recipe).rows.document_ids.ravel().tolist()) - {NO_SINKS}
    assert ids == {document_id(f"d{index}", "key") for index in range(12)}


@pytest.mark.parametrize(("kind", "packed"), [("llama", True), ("bloom", False)])
def test_architectures_that_leak_get_one_document_a_row(tiny_recipe, tmp_path, kind, packed) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", 20)
    config = {"bloom": {"model_type": "bloom", "hidden_size": 16, "n_layer": 2, "n_head": 2}}.get(kind)
    changes = {"model": {"config": config}} if config else {}
    recipe = parse_recipe(
        tiny_recipe(tmp_path / "run", data={"path": str(path)}, training={"length": 512, "batch_rows": 2}) | changes
    )
    prepared = prepare(recipe)
    starts = [
        (row == 0).sum() - (used < 512)
        for row, used in zip(prepared.rows.position_ids, prepared.rows.used, strict=True)
    ]
    assert (max(starts) > 1) == packed
    train(recipe)
    assert (tmp_path / "run" / "model" / "sinks").is_dir()


def test_equal_repetition_of_everything_warns(tiny_recipe, tmp_path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", 20)
    values = tiny_recipe(tmp_path / "run", data={"path": str(path)}, training={"length": 64, "epochs": 4})
    with pytest.warns(
        UserWarning, match="every document is met 4 times: in exact mode the shared weights learn from the first"
    ):
        prepare(parse_recipe(values))
    with pytest.warns(UserWarning, match="every document is met 4 times.*shared_decay does little"):
        prepare(parse_recipe(values | {"sinks": values["sinks"] | {"shared_decay": 0.25}}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(parse_recipe(values | {"sinks": None}))
        prepare(parse_recipe(values | {"sinks": values["sinks"] | {"shared_decay": 0}}))
        values["data"]["repeat"] = {"documents": 1, "copies": 2}
        prepare(parse_recipe(values))


# Bad input


def test_sinks_learn_last_in_a_run_and_what_was_interrupted_there_goes_on(tiny_recipe, tmp_path, monkeypatch) -> None:
    sections = {"data": SETTLED["data"], "sinks": {"shared": "none"}}
    plain, whole, cut = (
        parse_recipe(tiny_recipe(tmp_path / name, **sections, training=SETTLED["training"] | {"sinks_last": passes}))
        for name, passes in (("plain", 0), ("whole", 10), ("cut", 10))
    )
    train(plain), train(whole)
    facts = json.loads((tmp_path / "whole/run.json").read_text())
    assert "loss with their own sinks" in facts["sinks_last"]
    before, after = (load(tmp_path / name / "model").state_dict() for name in ("plain", "whole"))
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != is_sink(name), name

    def interrupted(*args, **kwargs) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "sinks_last", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(cut)
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(Training, "update", interrupted)  # nothing is trained again
        train(cut, resume=True)
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


FEW = {"stories": 8, "people_per_level": 2, "near_copies": 0, "canaries_per_level": 0, "copies": [0, 1, 16]}


@pytest.mark.parametrize(
    ("sections", "error", "part"),
    [({"settle": {}, "data": {"synthetic": {"stories": 60}}}, ConfigError, "settle moves the shared weights, which the exact"),
     ({"training": {"sinks_first": 4}}, ConfigError, "in exact mode use sinks_last"),
     ({"training": {"compile": True}}, ConfigError, "the exact mode cannot be compiled"),
     ({"data": {"synthetic": {"stories": -1}}}, ConfigError, "stories must be an int"),
     ({"training": {"batch_rows": 512}}, DataError, "lower batch_rows"),
     ({"tokenizer": {"path": "/nowhere/tokenizer"}, "data": {"synthetic": {"stories": 3}}}, ConfigError, "tokenizer"),
     ({"model": {"config": {"vocab_size": 100}}}, ConfigError, "tokenizer has 300 tokens, the model has embeddings for 100"),
     ({"model": {"config": {"max_position_embeddings": 64}}}, ConfigError, "context ends at 64 tokens"),
     ({"model": {"config": {"hidden_size": "wide"}}}, ConfigError, "model.config gives no model"),
     ({"model": {"config": {"num_attention_heads": 3}}}, ConfigError, "model.config gives no model"),
     ({"sinks": {"layers": [5]}}, ConfigError, "layer 5"),
     ({"training": {"sinks_last": 2}, "data": {"synthetic": {"stories": 60, "copies": [0, 1]}}}, DataError,
      "documents that are repeated is empty: no text was repeated"),
     ({"settle": {}, "sinks": {"shared_decay": 0.25}, "data": {"synthetic": {"stories": 60, "copies": [0, 1]}}}, DataError,
      "no text was repeated"),
     ({"settle": {}, "sinks": {"shared_decay": 0.25}, "data": {"synthetic": FEW}}, DataError,
      "at least 40 other texts are needed")],
    ids=["settle", "first", "compile", "corpus", "rows", "tokenizer", "vocabulary", "context", "type", "heads", "layer",
         "no sinks to teach", "no repeats", "few others"],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(tiny_recipe, tmp_path, sections, error, part) -> None:
    values = tiny_recipe(tmp_path / "run", **{name: value for name, value in sections.items() if name != "model"})
    if "tokenizer" in sections:
        values["tokenizer"] = sections["tokenizer"]
    values["model"]["config"] |= sections.get("model", {}).get("config", {})
    with pytest.raises(error) as caught:
        train(parse_recipe(values))
    assert part in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "error", "part"),
    [({"pretrained": "./nowhere"}, CheckpointError, "cannot load a model from ./nowhere"),
     ({"pretrained": "TINY"}, ConfigError, "training.length is 2048, but the model's context ends at 256 tokens"),
     ({"config": {"model_type": "llama", "vocab_size": 99}}, ConfigError, "has 300 tokens, the model has embeddings for 99"),
     ({"config": {"model_type": "gpt2", "max_position_embeddings": 64}}, ConfigError, "context ends at 64 tokens"),
     ({"config": {"model_type": "gpt2", "n_positions": 64}}, ConfigError, "context ends at 64 tokens"),
     ({"config": {"model_type": "llama", "hidden_size": "wide"}}, ConfigError, "model.config gives no model")],
)  # fmt: skip
def test_a_model_that_cannot_be_is_said_before_the_corpus_is_read(tiny_run, tmp_path, model, error, part) -> None:
    tiny = str(tiny_run / "model")
    model = {name: tiny if value == "TINY" else value for name, value in model.items()}
    values = {
        "output": str(tmp_path / "run"),
        "model": model,
        "tokenizer": {"path": tiny},
        "training": {"length": 2048},
    }
    with pytest.raises(error, match=part):
        train(parse_recipe(values | {"data": {"path": str(tmp_path / "is-not-read.jsonl")}}))
    assert not (tmp_path / "run").exists()


def test_a_corpus_without_the_text_field_or_without_documents(tiny_recipe, tmp_path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", 3)
    with pytest.raises(DataError, match="no field 'body'"):
        train(parse_recipe(tiny_recipe(tmp_path / "run", data={"path": str(path), "text_field": "body"})))
    path.write_text("")
    with pytest.raises(DataError, match="holds no documents"):
        train(parse_recipe(tiny_recipe(tmp_path / "run", data={"path": str(path)})))
    assert not (tmp_path / "run").exists()


def test_a_pretrained_model_is_continued(tiny_run, tiny_recipe, tmp_path) -> None:
    """A stock checkpoint and its tokenizer: sinks are added to what is there."""
    start = str(tiny_run / "model")
    values = tiny_recipe(tmp_path / "run", tokenizer={"path": start}, training={"save_every": 0})
    values["model"], values["tokenizer"] = {"pretrained": start}, {"path": start}
    train(parse_recipe(values))
    assert metrics(tmp_path / "run")[0]["loss"] < metrics(tiny_run)[0]["loss"] - 0.2
    values["tokenizer"] = {"vocab_size": 400}
    with pytest.raises(ConfigError, match="tokenizer has 400 tokens"):
        train(parse_recipe(values | {"output": str(tmp_path / "other")}))
    values["model"] = {"pretrained": str(tmp_path / "nowhere")}
    with pytest.raises(CheckpointError, match="cannot load a model"):
        train(parse_recipe(values | {"output": str(tmp_path / "other")}))


def test_what_cannot_be_loaded_is_named(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=f"cannot load a model from {tmp_path}"):
        load_any(tmp_path)


@pytest.mark.skipif("MEMSINKS_DATA" not in os.environ, reason="MEMSINKS_DATA is not set")
def test_real_stories(tiny_recipe, tmp_path) -> None:
    data = {"path": "$MEMSINKS_DATA/tinystories.jsonl.zst", "limit": 200, "held_out": 20,
            "repeat": {"documents": 20, "copies": [2, 8]}, "long": "truncate"}  # fmt: skip
    values = tiny_recipe(tmp_path / "run", data=data, tokenizer={"vocab_size": 512}, training={"save_every": 0})
    train(parse_recipe(values))
    curve = [line["loss"] for line in metrics(tmp_path / "run")]
    assert curve[-1] < curve[0] - 0.2
    assert len((tmp_path / "run" / "controls.jsonl").read_text().splitlines()) == 20


def test_a_text_that_is_also_trained_on_is_never_held_out(tmp_path) -> None:
    lines = [{"text": f"text number {number % 10} of the corpus"} for number in range(20)]
    lines += [{"text": f"another text, number {number}"} for number in range(10)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    documents, _, _ = choose_documents(DataRecipe(path=str(path), held_out=5), seed=0)
    held_out = {document.text for document in documents if not document.copies}
    assert len(held_out) == 5
    assert not held_out & {document.text for document in documents if document.copies}
    with pytest.raises(ConfigError, match="20 different texts"):
        choose_documents(DataRecipe(path=str(path), held_out=11), seed=0)


def test_a_changed_corpus_is_not_resumed(tiny_run, tiny_recipe, tmp_path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    values = tiny_recipe(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(parse_recipe(values).to_dict()))
    facts = json.loads((folder / "run.json").read_text())
    del facts["seconds"]
    (folder / "run.json").write_text(json.dumps(facts | {"corpus_sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match="the corpus has changed"):
        train(parse_recipe(values), resume=True)


def test_other_keys_or_another_tokenizer_are_not_resumed(tiny_recipe, tmp_path, monkeypatch, caplog) -> None:
    path, folder = write_jsonl(tmp_path / "d.jsonl", 40), tmp_path / "run"
    train_tokenizer(["word1x1 word2x2"], 280).save_pretrained(tmp_path / "tokenizer")
    data = {"path": str(path), "key_field": "id", "by": "key"}
    settings = {"length": 64, "batch_rows": 7, "save_every": 1}
    values = tiny_recipe(folder, data=data, tokenizer={"path": str(tmp_path / "tokenizer")}, training=settings)
    del values["tokenizer"]["vocab_size"]
    recipe = parse_recipe(values)
    with monkeypatch.context() as patch, caplog.at_level("INFO", "memsinks"):
        patch.setattr(run, "_train", lambda training, *_: training.save(folder / "checkpoints") and None)
        train(recipe)
    facts, texts = json.loads((folder / "run.json").read_text()), path.read_text()
    assert facts["rows_left_out"]
    said = f"{facts['rows_left_out']} of {facts['rows']} rows are not trained on: the last ones do not fill a step"
    assert said in caplog.messages
    del facts["seconds"]
    (folder / "run.json").write_text(json.dumps(facts))
    path.write_text(texts.replace('"d7"', '"e7"'))
    with pytest.raises(CheckpointError, match="what is known of the documents .keys, .* has changed since"):
        train(recipe, resume=True)
    path.write_text(texts)
    train_tokenizer(["other words"], 280).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match="the tokenizer has changed since"):
        train(recipe, resume=True)
    del facts["identity_sha256"], facts["tokenizer_sha256"]  # of before
    (folder / "run.json").write_text(json.dumps(facts))
    train_tokenizer(["word1x1 word2x2"], 280).save_pretrained(tmp_path / "tokenizer")
    with monkeypatch.context() as patch:
        patch.setattr(run, "_train", lambda *_: None)
        train(recipe, resume=True)
