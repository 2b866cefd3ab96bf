"""The command line: helps worth reading, the commands on a tiny run, errors in one line."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

import memsinks
from memsinks.cli import main
from memsinks.runs import run
from memsinks.sinks.storage import read_settings

COMMANDS = {"demo": ["--out"], "train": ["recipe", "--set", "--resume"], "audit": ["--documents", "--controls", "--state"],
            "lm-eval-task": ["--documents", "--out"], "export": ["checkpoint", "directory", "--rescale"],
            "info": ["checkpoint"]}  # fmt: skip


@pytest.fixture
def recipe(tiny_recipe, tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tmp_path / "run", training={"save_every": 0})))
    return path


def failed(capsys, *argv) -> str:
    """The one line that a failing command writes to stderr."""
    assert main([str(x) for x in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("memsinks: ")
    return line


def test_help_names_every_command(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"memsinks {command}" in text
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"memsinks {memsinks.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(capsys, command) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(argument in text for argument in COMMANDS[command])
    assert len(text.split("\n\n")[1]) > 30  # what it does, not only how it is called


@pytest.mark.parametrize(
    "argv",
    [[], ["trian"], ["train"], ["audit", "model"], ["export", "model"], ["audit", "m", "--documents", "d", "--controls",
     "c", "--limit", "0"], ["audit", "m", "--documents", "d", "--controls", "c", "--state", "ajar"],
     ["export", "a", "b", "--rescale", "half"]],
)  # fmt: skip
def test_wrong_usage_ends_with_2(capsys, argv) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "usage: memsinks" in capsys.readouterr().err


def test_train_and_set(recipe, tmp_path, capsys, caplog) -> None:
    caplog.set_level("INFO", "memsinks")
    assert main(["train", str(recipe), "--set", "training.seed=3", "--set", f"output={tmp_path}/other"]) == 0
    out = capsys.readouterr().out
    assert "sinks in 2 layers: 64 neurons beside 32 general ones" in caplog.text
    assert "step 1/" in out
    assert "tokens/s" in out
    assert f"model: {tmp_path}/other/model" in out
    assert yaml.safe_load((tmp_path / "other" / "recipe.yaml").read_text())["training"]["seed"] == 3
    assert not (tmp_path / "run").exists()
    assert (
        main(["train", str(recipe), "--set", "training.seed=3", "--set", f"output={tmp_path}/other", "--resume"]) == 0
    )
    command = next(line for line in out.splitlines() if line.startswith("audit: "))
    assert main(command.removeprefix("audit: memsinks ").split()) == 0
    audited = capsys.readouterr().out
    assert "sinks closed" in audited
    assert [line.split()[0] for line in audited.splitlines() if "%]" in line][:3] == ["control", "1", "8"]


def test_an_interrupt_is_one_line_that_says_how_to_go_on(recipe, capsys, monkeypatch) -> None:
    def interrupted(*_, **__) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "build_model", interrupted)
    assert main(["train", str(recipe)]) == 130
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "part"),
    [("training.learning_rat=1", "unknown key training.learning_rat"), ("training.lenght=64", "did you mean length?"),
     ("training.lr=fast", "training.lr must be a number, got 'fast'"), ("training.lr", "--set needs KEY=VALUE"),
     ("training.lr=[", "cannot set training.lr")],
)  # fmt: skip
def test_a_wrong_setting_is_one_line(recipe, tmp_path, capsys, change, part) -> None:
    assert part in failed(capsys, "train", recipe, "--set", change)
    assert not (tmp_path / "run").exists()


def test_wrong_recipes_are_one_line(recipe, tmp_path, tiny_run, capsys) -> None:
    assert "cannot read the recipe" in failed(capsys, "train", tmp_path / "none.yaml")
    assert "is not empty" in failed(capsys, "train", recipe, "--set", f"output={tiny_run}")
    assert "holds no run to resume" in failed(capsys, "train", recipe, "--resume")
    recipe.write_text("output: [1")
    assert "is not valid YAML" in failed(capsys, "train", recipe)


def test_audit_of_each_state(tiny_run, tmp_path, capsys) -> None:
    sides = ["--documents", f"{tiny_run}/members.jsonl", "--copies-field", "copies", "--controls",
             f"{tiny_run}/controls.jsonl", "--limit", "20", "--prefix", "8", "--continuation", "2"]  # fmt: skip
    losses = {}
    for state in ("open", "closed"):
        out = tmp_path / "new" / state
        assert main(["audit", f"{tiny_run}/model", "--state", state, *sides, "--out", str(out)]) == 0
        assert f"sinks {state}" in capsys.readouterr().out
        result = json.loads((out / "audit.json").read_text())
        audited = result["models"][0]
        assert audited["state"] == state
        assert sum(line["documents"] for line in audited["lines"] if line["copies"]) == 20
        assert result["settings"]["prefix"] == 8
        losses[state] = [line["loss"] for line in audited["lines"]]
        assert (out / "report.html").is_file()
    assert losses["open"] != losses["closed"]
    assert "say which to audit" in failed(capsys, "audit", f"{tiny_run}/model", *sides)


def test_audit_of_a_stock_checkpoint_and_wrong_files(tiny_run, tmp_path, capsys) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("The otter sat by the river and counted boats.")
    sides = ["--documents", text, "--controls", tiny_run / "controls.jsonl", "--limit", "3"]
    assert main(["export", f"{tiny_run}/model", f"{tmp_path}/clean", "--notes", "For a test."]) == 0
    assert f'from_pretrained("{tmp_path}/clean") loads it' in capsys.readouterr().out
    assert "For a test." in (tmp_path / "clean" / "README.md").read_text()
    assert (tmp_path / "clean" / "tokenizer.json").is_file()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "clean") is not None
    assert main(["audit", f"{tmp_path}/clean", *map(str, sides)]) == 0
    assert "sinks absent" in capsys.readouterr().out
    assert "are not there" in failed(capsys, "audit", f"{tmp_path}/clean", *sides, "--state", "closed")
    assert "no field 'body'" in failed(capsys, "audit", f"{tmp_path}/clean", *sides, "--text-field", "body")
    assert "does not exist" in failed(capsys, "audit", f"{tmp_path}/clean", "--documents", "./none.jsonl", *sides[2:])
    assert "cannot load a model" in failed(capsys, "audit", tmp_path, *sides)
    assert "is not an empty folder" in failed(capsys, "export", f"{tiny_run}/model", tmp_path / "clean")
    assert "holds no sinks" in failed(capsys, "export", tmp_path / "clean", tmp_path / "again")
    assert "holds no sinks" in failed(capsys, "info", tmp_path / "clean")


def test_export_without_a_tokenizer_says_so(tiny_run, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(
        import_module("memsinks.removal.export"), "verify_closed", lambda *_: None
    )  # a fresh process, tested above
    memsinks.load(tiny_run / "model").save_pretrained(tmp_path / "model")
    assert main(["export", f"{tmp_path}/model", f"{tmp_path}/clean"]) == 0
    assert "no tokenizer" in capsys.readouterr().out
    assert not (tmp_path / "clean" / "tokenizer.json").exists()


def test_info(tiny_run, capsys) -> None:
    assert main(["info", f"{tiny_run}/model"]) == 0
    out = capsys.readouterr().out
    assert "llama with sinks in layers [0, 1]" in out
    assert read_settings(tiny_run / "model").stored["fingerprint"] in out
