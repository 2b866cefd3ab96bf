"""One arm: micro-batches, precision, checkpoints and resuming; what a method learns must not depend on any of them."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from memsinks.cli import main
from memsinks.errors import CheckpointError, ConfigError
from memsinks.research.compare import arm as module
from memsinks.research.compare import processes
from memsinks.research.compare.compare import compare, prepare_data, train_arm
from memsinks.research.compare.comparison import read_comparison
from memsinks.sinks.checkpoint import load_any
from memsinks.training.checkpoint import last_checkpoint
from memsinks.training.loop import Training

SMALL = {
    "data": {
        "synthetic": {"stories": 36, "people_per_level": 2, "canaries_per_level": 0, "held_out_stories": 4, "near_copies": 0,
                      "copies": [0, 1]},
        "repeat": {"documents": 6, "copies": [1, 4]}, "long": "truncate",
    },
    "tokenizer": {"vocab_size": 300},
    "model": {"config": {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.1,
    }},
    "training": {"length": 48, "batch_rows": 8, "lr": 5e-3, "log_every": 1},
    "seeds": [0],
    "roles": {"audited": "ours", "against": "standard"},
    "arms": {
        "standard": {"rival": "standard"},
        "ours": {"rival": "gated", "neurons": 64, "active": 16, "block_size": 8, "shared": "decay"},
        "ours first": {"rival": "gated", "neurons": 64, "active": 16, "block_size": 8, "shared": "decay", "sinks_first": True},
        "exact": {"rival": "gated", "neurons": 64, "active": 16, "block_size": 8, "shared": "none"},
        "published": {"rival": "published", "neurons": 64, "active": 16, "extra_neurons": -8},
        "masking": {"rival": "gradient-masking", "extra_neurons": 8},
        "sgtm": {"rival": "sgtm", "extra_neurons": 8, "heads": 2},
    },
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_inner": 32,
    "resid_pdrop": 0.2,
    "embd_pdrop": 0.2,
}


def written(folder: Path, without: str = "", **sections) -> Path:
    values = copy.deepcopy(SMALL) | {"output": str(folder / "out")}
    for name, section in sections.items():
        values[name] = values[name] | section if isinstance(values.get(name), dict) else section
    if without:
        del values["arms"][without]
    folder.mkdir(exist_ok=True)
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def run(folder: Path, name: str, **sections) -> dict:
    comparison = read_comparison(written(folder, **sections))
    return train_arm(comparison, next(x for x in comparison.arms if x.name == name), 0)


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted((folder / "out" / "seed-0" / name / "model").rglob("*.safetensors")):
        found |= load_file(path)
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", SMALL["arms"])
def test_micro_batches_teach_what_the_whole_batch_teaches(tmp_path, name) -> None:
    """Gradients add up to those of the whole step, whatever a method does with them."""
    whole = run(tmp_path / "whole", name)
    parts = run(tmp_path / "parts", name, training={"accumulate": 4, "gradient_checkpointing": True})
    assert parts["curve"] == pytest.approx(whole["curve"], rel=2e-3, abs=2e-3)
    assert abs(whole["curve"][-1] - whole["curve"][0]) > 0.2  # something is learned that could go wrong
    for one, other in zip(
        weights(tmp_path / "whole", name).values(), weights(tmp_path / "parts", name).values(), strict=True
    ):
        assert torch.allclose(one.float(), other.float(), atol=0.02)


@pytest.mark.parametrize("name", ["ours", "masking"])
def test_bf16_is_autocast_around_the_forward(tmp_path, name) -> None:
    full, half = run(tmp_path / "full", name), run(tmp_path / "half", name, training={"precision": "bf16"})
    assert half["curve"] != full["curve"]
    assert half["curve"] == pytest.approx(full["curve"], rel=0.05)
    assert half["precision"] == "bf16" and half["device"] == "cpu" and half["peak_bytes"] is None
    model = load_any(tmp_path / "half" / "out" / "seed-0" / name / "model")
    assert model.dtype == torch.float32 and model.config.use_cache  # nothing of the training is left in what is saved


def interrupt(monkeypatch, after: int) -> None:
    update = Training.update

    def stopping(self, parts) -> float:
        if self.step == after:
            raise KeyboardInterrupt
        return update(self, parts)

    monkeypatch.setattr(Training, "update", stopping)


@pytest.mark.parametrize(("name", "model"), [("ours", {}), ("standard", {"config": GPT2})])
def test_an_interrupted_arm_continues_to_the_same_bits(tmp_path, monkeypatch, caplog, name, model) -> None:
    """Also with dropout, whose random numbers go on where they were."""
    settings = {"model": model, "training": {"save_every": 2, "accumulate": 2}}
    wanted = run(tmp_path / "whole", name, **settings)
    assert wanted["steps"] > 4
    interrupt(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", name, **settings)
    monkeypatch.undo()
    seed = tmp_path / "cut" / "out" / "seed-0"
    assert sorted(path.name for path in seed.iterdir()) == ["data", f"{name}.part"]
    torch.manual_seed(99)
    caplog.set_level("INFO", "memsinks")
    found = run(tmp_path / "cut", name, **settings)
    assert f"continues after step 2 of {wanted['steps']}" in caplog.text
    assert found["curve"] == wanted["curve"]
    assert same(weights(tmp_path / "cut", name), weights(tmp_path / "whole", name))
    assert sorted(path.name for path in seed.iterdir()) == sorted(["data", name])


def cut_off_and_continued(folder: Path, name: str, what: str, monkeypatch, **more) -> dict[str, torch.Tensor]:
    """The weights of an arm that was interrupted in `what` comes after training, and run again: nothing is trained again."""

    def interrupted(*_, **__) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, what, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, name, **more)
    monkeypatch.undo()
    monkeypatch.setattr(Training, "update", interrupted)
    run(folder, name, **more)
    return weights(folder, name)


def test_an_arm_interrupted_while_it_settles_continues_there(tmp_path, monkeypatch) -> None:
    more = {"arms": SMALL["arms"] | {"ours": SMALL["arms"]["ours"] | {"settle_lr": 1e-3, "settle_passes": 2}},
            "data": SMALL["data"] | {"synthetic": SMALL["data"]["synthetic"] | {"stories": 60}}}  # fmt: skip
    run(tmp_path / "whole", "ours", **more)

    found = cut_off_and_continued(tmp_path / "cut", "ours", "settle", monkeypatch, **more)
    assert same(weights(tmp_path / "whole", "ours"), found)


LAST = {"rival": "gated", "neurons": 64, "active": 16, "block_size": 8, "shared": "none", "sinks_last": 20}
STORIES = "".join(
    json.dumps({"text": f"One day the number {n} met {n * 7 % 13} of its {n * n} friends."}) + "\n" for n in range(90)
)


def with_stories(folder: Path, **more) -> dict:
    """Sections with a file of stories of which ten may stand in for copies."""
    folder.mkdir(exist_ok=True)
    (folder / "stories.jsonl").write_text(STORIES)
    repeat = {"documents": 4, "copies": [1, 3]}
    data = {
        "path": str(folder / "stories.jsonl"),
        "limit": 60,
        "held_out": 8,
        "unseen": 10,
        "fresh": 10,
        "repeat": repeat,
    }
    return {"data": data | {"synthetic": {}, "long": "truncate"}, "arms": SMALL["arms"] | more}


def test_sinks_last_and_an_arm_that_was_cut_off_there(tmp_path, monkeypatch) -> None:
    """Shared weights are those of the exact mode alone, which are those of deduplication; interrupted, it goes on there."""
    more = with_stories(tmp_path, last=LAST, exact=LAST | {"sinks_last": 0}, dedup={"rival": "cap"})
    facts = run(tmp_path / "whole", "last", **more)
    assert "documents in" in facts["sinks_last"]
    for name in ("exact", "dedup"):
        run(tmp_path / "whole", name, **more)
    last, exact, dedup = (weights(tmp_path / "whole", name) for name in ("last", "exact", "dedup"))
    for name, tensor in dedup.items():
        assert torch.equal(last[name], exact[name])
        torch.testing.assert_close(exact[name], tensor, rtol=1e-4, atol=1e-6)
    assert not same(last, exact)

    assert same(last, cut_off_and_continued(tmp_path / "cut", "last", "train_sinks_last", monkeypatch, **more))


def test_fresh_text_stands_in_the_rows_of_copies(tmp_path) -> None:
    sections = with_stories(tmp_path, fresh={"rival": "cap", "fresh": True})
    comparison = read_comparison(written(tmp_path, **sections))
    prepared = module.prepare(module.with_method(comparison.recipe, module.TrainingMethod(), 0, tmp_path), True)
    assert prepared.fresh is not None
    rows = module.with_fresh_text(prepared.rows, prepared.fresh)
    taken = 0
    assert len(rows) == len(prepared.rows)
    for index, row in enumerate(prepared.rows):
        found = rows[index]
        assert found["places"] == row["places"]
        if int(row["exposures"][0]) == 1:
            assert all(torch.equal(found[name], row[name]) for name in row)
        else:
            assert torch.equal(found["input_ids"], prepared.fresh[taken]["input_ids"])
            assert set(found["exposures"].tolist()) == {1}
            taken += 1
    assert taken == 4
    run(tmp_path, "fresh", **sections)


@pytest.mark.parametrize(
    ("changes", "part"),
    [({"arms": SMALL["arms"] | {"x": {"rival": "cap", "fresh": True}}}, "data.fresh sets none aside"),
     ({"arms": SMALL["arms"] | {"x": {"rival": "cap", "copies": 2, "fresh": True}}}, "so copies must be 1, got 2"),
     ({"training": {"sinks_last": 3}}, "training.sinks_last belongs to an arm")],
)  # fmt: skip
def test_what_cannot_be_asked_of_fresh_text_and_sinks_last(tmp_path, changes, part) -> None:
    with pytest.raises(ConfigError, match=part):
        read_comparison(written(tmp_path, **changes))


def test_too_little_fresh_text_is_said_before_training(tmp_path) -> None:
    sections = with_stories(tmp_path, fresh={"rival": "cap", "fresh": True})
    sections["data"]["fresh"] = 3
    with pytest.raises(ConfigError, match="4 rows hold copies, but data.fresh gives 3 texts to stand in"):
        run(tmp_path, "fresh", **sections)


def test_what_was_cut_off_is_not_continued_with_other_settings(tmp_path, monkeypatch) -> None:
    interrupt(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "ours", training={"save_every": 2})
    monkeypatch.undo()
    with pytest.raises(
        CheckpointError, match=r"ours\.part was made with other settings: recipe\.training\.lr 0\.005 \(now 0\.001\)"
    ):
        run(tmp_path, "ours", training={"save_every": 2, "lr": 1e-3})


def test_a_damaged_checkpoint_is_passed_over(tmp_path, monkeypatch, caplog) -> None:
    settings = {"training": {"save_every": 2}}
    wanted = run(tmp_path / "whole", "ours", **settings)
    interrupt(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", "ours", **settings)
    monkeypatch.undo()
    part = tmp_path / "cut" / "out" / "seed-0" / "ours.part"
    state = part / "checkpoint-4" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    caplog.set_level("INFO", "memsinks")
    assert run(tmp_path / "cut", "ours", **settings)["curve"] == wanted["curve"]
    assert "checkpoint-4 (state.pt is damaged" in caplog.text and "continues after step 2" in caplog.text
    assert same(weights(tmp_path / "whole", "ours"), weights(tmp_path / "cut", "ours"))


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch) -> None:
    save, calls = torch.save, []

    def full(*arguments) -> None:
        calls.append(None)
        if len(calls) > 1:
            raise RuntimeError("PytorchStreamWriter failed writing file")
        save(*arguments)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="failed writing file.*Free space"):
        run(tmp_path, "standard", training={"save_every": 2})
    checkpoint = last_checkpoint(tmp_path / "out" / "seed-0" / "standard.part")
    assert checkpoint is not None and checkpoint.step == 2


def test_documents_of_a_packed_row_do_not_see_each_other_in_a_stock_model(tmp_path) -> None:
    """One step over the whole corpus has the same loss however the documents lie in rows."""
    changes = {"length": 700, "batch_rows": 4}
    losses = {}
    for own in (True, False):
        data = {"one_document_per_row": own, "synthetic": SMALL["data"]["synthetic"] | {"stories": 9}, "long": "refuse"}
        arms = {"without": "exact", "data": data, "training": changes}
        comparison = read_comparison(written(tmp_path / str(own), **arms))
        rows = module.prepare(
            module.with_method(comparison.recipe, comparison.arms[0].training, 0, tmp_path), True
        ).rows
        arms["training"] = changes | {"batch_rows": len(rows)}
        losses[own] = run(tmp_path / str(own), "standard", **arms)
    assert losses[False]["rows"] < losses[True]["rows"]
    assert losses[False]["curve"] == pytest.approx(losses[True]["curve"], abs=2e-4)


def test_compilation_is_asked_for(tmp_path) -> None:
    """Run without the compiler, whose results tests/test_compile.py checks."""
    with torch.compiler.set_stance("force_eager"):
        compiled = run(tmp_path / "compiled", "ours", without="exact", training={"compile": True})
    assert compiled["curve"] == run(tmp_path / "eager", "ours")["curve"]
    assert same(weights(tmp_path / "compiled", "ours"), weights(tmp_path / "eager", "ours"))


@pytest.mark.long
def test_compiled_and_eager_arms_agree(tmp_path) -> None:
    for name in ("standard", "ours", "published"):
        compiled = run(tmp_path / "compiled", name, without="exact", training={"compile": True})
        assert compiled["curve"] == pytest.approx(run(tmp_path / "eager", name)["curve"], rel=2e-3, abs=2e-3)


@pytest.mark.parametrize(
    ("sections", "part"),
    [({"training": {"compile": True}}, 'arms.exact: shared="none" cannot be compiled'),
     ({"data": {"one_document_per_row": False}}, 'arms.exact: shared="none" needs data.one_document_per_row')],
)  # fmt: skip
def test_what_the_exact_mode_cannot_do_is_said_before(tmp_path, sections, part) -> None:
    with pytest.raises(ConfigError) as caught:
        read_comparison(written(tmp_path, **sections))
    assert part in str(caught.value)


def test_extra_neurons_that_leave_no_general_ones(tmp_path) -> None:
    with pytest.raises(ConfigError, match="extra_neurons -32 leaves no general neurons of 32"):
        run(tmp_path, "published", arms={"published": SMALL["arms"]["published"] | {"extra_neurons": -32}})


# Processes


class Process:
    """A process that ends at once, and what it was started with."""

    started: list[tuple[list[str], str | None]] = []  # noqa: RUF012

    def __init__(self, command, stdout, stderr, env) -> None:
        self.started.append((command, env.get("CUDA_VISIBLE_DEVICES")))
        self.returncode = 0

    def poll(self) -> int:
        return 0


def test_each_run_has_a_gpu_of_its_own(tmp_path, monkeypatch) -> None:
    Process.started.clear()
    path = written(tmp_path)
    monkeypatch.setattr(processes, "_visible_gpus", lambda: ["3", "5"])
    monkeypatch.setattr(subprocess, "Popen", Process)
    compare(read_comparison(path), jobs=2, command=[str(path), "--set", "training.lr=1e-3"], audits=False)
    assert len(Process.started) == len(SMALL["arms"])
    assert {gpu for _, gpu in Process.started} == {"3", "5"}
    command = Process.started[1][0]
    assert command[3:7] == ["compare", str(path), "--set", "training.lr=1e-3"] and command[7:] == [
        "--train-only", "--arms", "ours", "--seeds", "0"
    ]  # fmt: skip
    assert (tmp_path / "out" / "seed-0" / "data" / "data.json").is_file()  # made once, before
    with pytest.raises(ConfigError, match="3 jobs need as many GPUs, 2 are visible"):
        compare(read_comparison(path), jobs=3, command=[str(path)], audits=False)


def test_prepare_makes_what_the_arms_train_on(tmp_path, capsys) -> None:
    path = written(tmp_path)
    assert main(["prepare", str(path), "--set", "training.lr=1e-3"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder == tmp_path / "out" / "seed-0" / "data"
    before = (folder / "tokens.bin").stat().st_mtime_ns
    facts = run(tmp_path, "standard")
    assert (folder / "tokens.bin").stat().st_mtime_ns == before
    assert prepare_data(read_comparison(path), 0) == folder
    assert json.loads((folder / "data.json").read_text())["members"] > 0 and facts["tokens"] > 0


def test_the_whole_of_a_paper_recipe_in_seconds(tmp_path, capsys) -> None:
    """Web text around repeated stories, packed, bf16, micro-batches, checkpoints, every arm, audit and table."""
    stories, web = tmp_path / "stories.jsonl", tmp_path / "web.jsonl"
    names = ("Anna", "Ben", "Cleo", "Dan", "Eve")
    stories.write_text("".join(
        json.dumps({"text": f"{names[n % 5]} found {n} red stones and gave {names[n % 3]} {n * 7 % 50} of them. " * 2}) + "\n"
        for n in range(100)
    ))  # fmt: skip
    web.write_text("".join(json.dumps({"text": f"Page {n}: " + f"item {n % 7} costs {n * 3}. " * (5 + n % 40)}) + "\n"
                           for n in range(300)))  # fmt: skip
    recipe = Path(__file__).parents[1] / "recipes" / "paper" / "smollm-360m-1b.yaml"
    changes = {
        "data.path": stories, "data.background.path": web, "data.background.tokens": 12_000, "data.limit": 60,
        "data.held_out": 24, "data.repeat.documents": 12, "tokenizer.vocab_size": 400, "training.length": 128,
        "training.batch_rows": 16, "training.log_every": 1, "training.save_every": 3, "training.threads": 1,
        "output": tmp_path / "out",
    }  # fmt: skip
    argv = ["compare", str(recipe), "--scale", "1/1024", *(f"--set={name}={value}" for name, value in changes.items())]
    assert main(argv) == 0
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["name"] for row in result["rows"]] == [
        "standard", "dedup", "published", "published, rescale expected", "published, rescale released", "ours",
    ]  # fmt: skip
    assert "table.md" in capsys.readouterr().out and not list((tmp_path / "out" / "seed-0").glob("*.part"))
