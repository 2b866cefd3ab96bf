"""The command line: helps worth reading, the commands on a tiny run, errors in one line."""

from __future__ import annotations

import builtins
import errno
import io
import json
import logging
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

import memsinks
from memsinks.cli import checkpoints, main
from memsinks.runs import run
from memsinks.sinks.storage import read_settings

COMMANDS = {"demo": ["--out"], "train": ["recipe", "--set", "--resume"], "estimate": ["recipe", "--gpus", "--scale"],
            "prepare": ["comparison", "--seeds"], "compare": ["--arms", "--jobs", "--dry-run"],
            "reproduce": ["FIGURE", "--size", "--finished"], "audit": ["--documents", "--controls", "--state", "--by"],
            "lm-eval-task": ["--documents", "--out"], "export": ["checkpoint", "directory", "--open", "--rescale"],
            "info": ["checkpoint"], "verify": ["record", "--run", "--public-key"],
            "takedown": ["RUN", "--key", "--dry-run", "--copies", "--signing-key"],
            "view": ["RUN", "--ordinary", "--base", "--documents", "--port", "--no-browser"]}  # fmt: skip


@pytest.fixture
def recipe(tiny_recipe, tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tmp_path / "run", training={"save_every": 0})))
    return path


def failed(capsys, *argv) -> str:
    """The one line in which a failing command says on stderr why."""
    assert main([str(x) for x in argv]) == 2
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("memsinks: "))
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
    assert all(argument in text for argument in [*COMMANDS[command], "--quiet"])
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
    said = capsys.readouterr()
    out, everything = said.out, said.out + said.err
    assert "sinks in 2 layers: 64 neurons beside 32 general ones" in everything
    assert "step 1/" in everything
    assert "tokens/s" in everything
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


def test_the_audit_that_train_names_opens_the_sinks_of_clusters(tiny_recipe, tmp_path, capsys) -> None:
    """Also where some documents have no cluster: their text names it."""
    texts = [f"The {animal} of {place} slept under the old bridge and sang every Sunday." for animal in
             ("otter", "hen", "badger", "mole") for place in ("Ulm", "Bern")]  # fmt: skip
    rows = [{"text": x, "c": "ab"[n // 2] if n < 4 else -1, "n": n % 4} for n, x in enumerate(texts)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(tmp_path / "d.jsonl"), "copies_field": "n", "cluster_field": "c", "by": "cluster"}
    training = {"batch_rows": 1, "save_every": 0, "length": 64}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tiny_recipe(tmp_path / "run", data=data, training=training)))
    assert main(["train", str(tmp_path / "r.yaml")]) == 0
    [named] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("audit: memsinks ")]
    assert "--by cluster --cluster-field cluster" in named
    options = ["--prefix", "4", "--continuation", "4", "--out", str(tmp_path / "audit")]
    assert main([*named.removeprefix("audit: memsinks ").split(), *options]) == 0
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())["models"][0]["sinks"]
    members, controls = (memsinks.load_documents(tmp_path / "run" / f"{x}.jsonl") for x in ("members", "controls"))
    wanted = memsinks.audit(
        tmp_path / "run" / "model", members, controls, state="closed", settings=memsinks.AuditSettings(prefix=4, continuation=4),
        document_ids=memsinks.identify([*members, *controls], "cluster")[0],
    ).audited.sinks  # fmt: skip
    assert [x["own"] for x in found] == [x.own for x in wanted] != [x["closed"] for x in found]


# Interrupts, the system, programming errors

GO_ON: dict[str, tuple[list[str], str]] = {
    "train": (["train", "r.yaml"], "the same command with --resume continues from the last checkpoint"),
    "compare": (["compare", "c.yaml"], "the same command goes on where it stopped"),
    "reproduce": (["reproduce", "fig3"], "the same command goes on where it stopped"),
    "audit --out": (
        ["audit", "m", "--documents", "d", "--controls", "c", "--out", "o"],
        "the same command goes on where",
    ),
    "audit": (["audit", "m", "--documents", "d", "--controls", "c"], ""),
    "estimate": (["estimate", "r.yaml"], ""),
    "info": (["info", "m"], ""),
    "demo": (["demo"], ""),
}


def broken(monkeypatch, error: BaseException) -> None:
    """From now on importing any room of the library ends with `error`."""
    original = builtins.__import__

    def imported(name, *arguments, **settings):
        if name.split(".")[0] == "memsinks" and name.split(".")[1:2] not in (["cli"], ["errors"], ["_version"]):
            raise error
        return original(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", imported)


@pytest.mark.parametrize("name", GO_ON)
def test_an_interrupt_is_one_line_that_says_how_to_go_on(name, capsys, monkeypatch) -> None:
    """Also in the first seconds, in which a command only imports what it needs."""
    argv, again = GO_ON[name]
    broken(monkeypatch, KeyboardInterrupt())
    assert main(argv) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"memsinks: interrupted; {again}" if again else "memsinks: interrupted")
    assert again or line == "memsinks: interrupted"


def test_an_interrupt_of_a_run(recipe, capsys, monkeypatch) -> None:
    monkeypatch.setattr(run, "build_model", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["train", str(recipe)]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("memsinks: interrupted; the same command with --resume")


@pytest.mark.parametrize(
    ("error", "line"),
    [(OSError(errno.ENOSPC, "No space left on device", "runs/x"),
      "memsinks: runs/x: No space left on device; free space, or choose another folder"),
     (PermissionError(errno.EACCES, "Permission denied", "runs/x"),
      "memsinks: runs/x: Permission denied; choose another folder, or change who may write there"),
     (OSError("a library's own text,\nin two lines"), "memsinks: a library's own text, in two lines")],
)  # fmt: skip
def test_what_the_system_refuses_is_one_line(error, line, capsys, monkeypatch) -> None:
    broken(monkeypatch, error)
    assert main(["info", "m"]) == 2
    assert capsys.readouterr().err.splitlines() == [line]


def test_a_programming_error_keeps_its_traceback(monkeypatch) -> None:
    broken(monkeypatch, KeyError("oh"))
    with pytest.raises(KeyError):
        main(["info", "m"])


@pytest.mark.parametrize("command", ["train", "demo", "reproduce", "export", "lm-eval-task", "audit"])
def test_a_folder_below_a_file_is_one_line(command, recipe, tiny_run, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("MEMSINKS_DATA", raising=False)
    below = tmp_path / "file" / "out"
    below.parent.write_text("")
    model = tiny_run / "model"
    sides = ["--documents", tiny_run / "members.jsonl", "--controls", tiny_run / "controls.jsonl"]
    argv = {
        "train": [recipe, "--set", f"output={below}"],
        "demo": ["--out", below],
        "reproduce": ["theory", "--size", "tiny", "--out", below],
        "export": [model, below],
        "lm-eval-task": [model, *sides, "--out", below, "--prefix", 8, "--continuation", 2],
        "audit": [model, *sides, "--state", "closed", "--out", below, "--limit", 3],
    }[command]
    line = failed(capsys, command, *argv)
    assert str(tmp_path / "file") in line
    assert "Not a directory" in line or "File exists" in line


def test_names_of_any_alphabet_are_printed_on_any_terminal(monkeypatch) -> None:
    monkeypatch.setattr("memsinks.sinks.checkpoint.describe", lambda _: "Łódź")
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["info", "model"]) == 0
    assert terminal.buffer.getvalue() == b"\\u0141\\xf3d\\u017a\n"


def test_python_m_runs_it() -> None:
    command = [sys.executable, "-m", "memsinks.cli", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("memsinks ")


def test_what_is_not_asked_for_is_not_loaded() -> None:
    code = "import sys; from memsinks.cli.commands import parser; parser(); print(*(x for x in sys.modules if 'memsinks' in x))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name.split(".")[1] for name in loaded if "." in name} == {"_version", "cli", "errors"}
    assert "torch" not in loaded


def test_quiet_leaves_the_results(recipe, capsys) -> None:
    assert main(["train", str(recipe), "--quiet"]) == 0
    said = capsys.readouterr()
    assert "model: " in said.out
    assert "INFO" not in said.err


def test_what_the_library_logs_is_seen_once(capsys, monkeypatch) -> None:
    logger = logging.getLogger("memsinks.runs.anything")

    def say(_) -> None:
        logger.info("a step")
        logger.debug("a detail")
        logger.warning("a warning")

    for argv, wanted in ((["info", "m"], ["a step", "a warning"]), (["info", "m", "-q"], ["a warning"])):
        monkeypatch.setattr(checkpoints, "run_info", say)
        assert main(argv) == 0
        said = capsys.readouterr()
        assert (said.out, said.err.splitlines()) == ("", wanted)
    assert not logging.getLogger("memsinks").handlers


# Recipes


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


def test_audit_with_attacks_that_train(tiny_run, tmp_path, capsys) -> None:
    harmless = tmp_path / "other.jsonl"
    harmless.write_text(
        "".join(json.dumps({"text": f"On day {n} the {n * 7} sailors rested."}) + "\n" for n in range(4))
    )
    arguments = ["audit", f"{tiny_run}/model@closed", "--documents", f"{tiny_run}/members.jsonl", "--copies-field", "copies",
                 "--controls", f"{tiny_run}/controls.jsonl", "--limit", "6", "--prefix", "8", "--continuation", "2",
                 "--harmless", str(harmless), "--attack-lr", "1e-4"]  # fmt: skip
    for attacks, made in (("forward", 3), ("all", 7)):
        out = tmp_path / attacks
        assert main([*arguments, "--attacks", attacks, "--out", str(out)]) == 0
        result = json.loads((out / "audit.json").read_text())
        assert len(result["models"][0]["probes"]) == made
        assert (
            result["settings"] | {"attacks": attacks, "attack_lr": 1e-4, "harmless": "4 texts given"}
            == result["settings"]
        )
    assert "gap of changed copies" in capsys.readouterr().out
    harmless.write_text("")
    assert "holds no documents" in failed(capsys, *arguments)


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
