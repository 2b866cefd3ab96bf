"""The notebooks of docs/tutorials: their code runs on tiny settings, and the outputs that are committed are theirs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, script

import memsinks as ms
from memsinks.data.synthetic import corpus

# fmt: off
TINY = {
    "pretrain-remove-audit": {
        "stories": 20, "people": 2, "copies": [0, 1, 4], "resamples": 100, "width": 32, "layers": 2, "vocabulary": 300,
        "passes": 2,
    },
    "three-customers": {"epochs": 1, "new_tokens": 4},
    "audit-any-model": {},
}
# fmt: on
"""Parameters of each notebook that take seconds."""
FOLDER = ROOT / "docs/tutorials"


def cells(name: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory, tiny_llama) -> Path:
    """A folder with a random chat model, in place of SmolLM2."""
    from chats import PLAIN

    folder = tmp_path_factory.mktemp("chat")
    tokenizer = ms.train_tokenizer([x.text for x in corpus(stories=50, people_per_level=2)], 400)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = PLAIN
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat_model: Path) -> Path:
    """An empty working directory with the texts that notebooks read; the model is the tiny one."""
    for path in FOLDER.glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMSINKS_TUTORIAL_MODEL", str(chat_model))
    return tmp_path


def executed(name: str) -> dict[str, Any]:
    """What is defined after a notebook's code was run in this process."""
    values: dict[str, Any] = {}
    for number, cell in enumerate(x for x in cells(name) if x["cell_type"] == "code"):
        code = "".join(cell["source"])
        exec(compile(code, f"{name}.ipynb, code cell {number + 1}", "exec"), values)
        if "parameters" in cell["metadata"].get("tags", []):
            values |= TINY[name]
    return values


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures without a window, exports without the check in a fresh process."""
    import functools

    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("IPython")
    matplotlib.use("agg")
    monkeypatch.setattr(ms, "export", functools.partial(ms.export, verify=False))


def test_pretraining_runs(place: Path, in_process: None) -> None:
    values = executed("pretrain-remove-audit")
    assert values["before"] == ms.shared_hash(values["model"])
    tokens = values["tokens"]
    with torch.no_grad():
        torch.testing.assert_close(values["clean"](tokens).logits, values["model"](tokens).logits, atol=1e-5, rtol=1e-4)
    assert [x.name for x in values["result"].models] == ["removed", "ordinary", "open"]
    assert (place / "report/report.html").is_file()


def test_three_customers_runs(place: Path, in_process: None) -> None:
    values = executed("three-customers")
    owners, model = values["owners"], values["model"]
    assert ms.shared_hash(model) == values["before"]
    assert list(model.sink_state.taken) == [owners["Dunmore Rail"]]
    assert values["table"].keys() == {"base model", "own sinks", "another's", "router", "after he left"}
    assert values["router"].owners.tolist() == sorted(owners[x] for x in ("Elmhurst Bakery", "Fenwick Labs"))
    assert values["stock"].config.intermediate_size > model.config.intermediate_size


def test_auditing_runs(place: Path, in_process: None) -> None:
    values = executed("audit-any-model")
    assert values["losses"].shape == (24,) and len(values["result"].examples) >= 2
    assert values["documents"][0].key == "Gettysburg Address"


@pytest.mark.long
@pytest.mark.parametrize("name", TINY)
def test_notebooks_run_in_a_kernel(name: str, place: Path) -> None:
    pytest.importorskip("papermill")
    tutorials = script("run_tutorials")
    done = tutorials.run(FOLDER / f"{name}.ipynb", TINY[name], place)
    source = tutorials.nbformat.read(FOLDER / f"{name}.ipynb", 4)
    kept = tutorials.cleaned(done, source)
    assert [x.source for x in kept.cells] == ["".join(x["source"]) for x in cells(name)]
    assert any("image/png" in output.get("data", {}) for cell in kept.cells for output in cell.get("outputs", []))


@pytest.mark.parametrize("name", TINY)
def test_committed_outputs_are_whole(name: str) -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(TINY)
    code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell["outputs"])
    printed = sum("print(" in "".join(cell["source"]) for cell in code)
    assert sum(bool(cell["outputs"]) for cell in code) >= printed > 1
    for cell in code:
        for output in cell["outputs"]:
            assert (
                output["output_type"] in ("stream", "execute_result", "display_data") and output.get("name") != "stderr"
            )
            text = json.dumps(
                {kind: x for kind, x in output.get("data", {}).items() if kind != "image/png"} or output["text"]
            )
            assert not re.search(r"/(tmp|home|root|work|usr|Users)/|site-packages|Warning", text), text[:300]
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 200_000
