"""The README's snippets run, its tree is the tree, its commands and recipes exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import memsinks as ms
from memsinks.cli import main
from memsinks.research.compare.comparison import read_comparison

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def snippet(name: str) -> str:
    found = re.search(rf"<!-- snippet: {name} -->\n```python\n(.*?)```", README, re.S)
    assert found, f"README has no snippet {name}"
    return found[1]


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    texts = [f"The {name} of the house was never seen again after the storm." for name in ("cat", "dog", "cook", "key")]
    tokenizer = ms.train_tokenizer(texts, 300)
    ids = [ms.document_id(text) for text in texts] * 8
    rows = ms.pack(ms.encode(tokenizer, texts) * 8, ids, ms.exposures(ids), length=64, pad_id=tokenizer.pad_token_id)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    batches = [ms.collate([rows[0], rows[1]])] * 3
    return {"config": config, "tokenizer": tokenizer, "rows": rows, "batches": batches, "output": str(tmp_path / "run")}


def test_the_integration_snippet_runs_and_its_export_loads(prepared: dict[str, Any]) -> None:
    exec(snippet("integration"), prepared)
    plain = AutoModelForCausalLM.from_pretrained("clean/").eval()
    tokens = prepared["rows"][0]["input_ids"][None]
    with torch.no_grad():
        assert torch.allclose(plain(tokens).logits, prepared["model"].eval()(tokens).logits, atol=1e-5)


def test_the_trainer_snippet_runs(prepared: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_config(prepared["config"])
    ms.add_sinks(model, ms.SinkConfig(neurons=64, active=32))
    before = [parameter.clone() for name, parameter in model.named_parameters() if name.endswith("sinks.down")]
    exec(snippet("trainer"), {**prepared, "model": model, "ms": ms})
    after = [parameter for name, parameter in model.named_parameters() if name.endswith("sinks.down")]
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_the_rows_snippet_runs(prepared: dict[str, Any], tmp_path: Path) -> None:
    lines = [{"text": f"The {name} crossed the yard.", "copies": 40} for name in ("cat", "dog", "cook")]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {"tokenizer": prepared["tokenizer"], "ms": ms}
    exec(snippet("rows"), found)
    assert found["batch"]["exposures"].shape == (4, 128)
    assert int(found["rows"].exposures.max()) == 40


def test_the_settle_snippet_runs(prepared: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_config(prepared["config"])
    ms.add_sinks(model, ms.SinkConfig(neurons=64, active=32))
    texts = [f"The {name} saw number {number}." for name in ("cat", "dog") for number in range(30)]
    ids = [ms.document_id(text) for text in texts]
    order = [*range(60), 0, 1, 0, 1]
    tokens, own = ms.encode(prepared["tokenizer"], texts), [ids[x] for x in order]
    rows = ms.pack([tokens[x] for x in order], own, ms.exposures(own), length=64, pad_id=0)
    exec(snippet("settle"), {"model": model, "ms": ms, "rows": rows})
    assert "2 documents in 1 steps" in capsys.readouterr().out


def test_the_audit_snippet_runs(prepared: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_config(prepared["config"])
    ms.add_sinks(model, ms.SinkConfig(neurons=64, active=32))
    sides = [[ms.Document(f"The {name} saw {what} in the yard.") for name in ("cat", "dog", "cook")] for what in "ab"]
    values = {**prepared, "model": model, "ms": ms, "documents": sides[0], "controls": sides[1]}
    exec(snippet("audit"), values)
    assert "sinks closed" in capsys.readouterr().out
    assert Path("report/report.html").is_file()


def test_the_tree_names_every_module() -> None:
    tree = README.split("## The tree")[1]
    modules = {path.name for path in (ROOT / "src/memsinks").glob("*.py")} - {
        "__init__.py",
        "__main__.py",
        "_version.py",
    }
    assert modules == set(re.findall(r"^  (\w+\.py)", tree, re.M))


def test_links_recipes_and_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for recipe in set(re.findall(r"recipes/[\w./-]+\.yaml", README)):
        read = read_comparison if "/compare-" in recipe or "/paper/" in recipe else ms.read_recipe
        read(ROOT / recipe)
    for command in set(re.findall(r"^memsinks ([\w-]+)", README, re.M)):
        with pytest.raises(SystemExit) as done:
            main([command, "--help"])
        assert done.value.code == 0
        assert command in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("script", ["torch_loop.py", "hf_trainer.py"])
def test_examples_run(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / script), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "exported to" in done.stdout
