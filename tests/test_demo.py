"""The demo: small here; the real one keeps its promises (long)."""

from __future__ import annotations

import json
import math
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from memsinks.errors import CheckpointError, ConfigError, DataError
from memsinks.runs.demo import NAMES, demo, format_record, format_result, format_table
from memsinks.runs.forked import ACCELERATORS
from memsinks.runs.side_by_side import train_side_by_side

SMALL = {
    "data": {"synthetic": {
        "stories": 30, "people_per_level": 3, "canaries_per_level": 1, "held_out_stories": 4, "copies": [0, 1, 8],
        "near_copies": 0,
    }},
    "tokenizer": {"vocab_size": 300},
    "model": {"config": {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }},
    "training": {"length": 256, "batch_rows": 8, "lr": 3e-3, "log_every": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """(folder, figures) of the small demo, run over an earlier one."""
    out = tmp_path_factory.mktemp("demo") / "out"
    out.mkdir()
    (out / "demo.json").write_text("{}")
    (out / "clean").mkdir()
    (out / "clean" / "old.txt").write_text("of an earlier demo")
    (out / "mine.txt").write_text("mine")
    return out, demo(out, SMALL)


def test_what_it_writes(shown) -> None:
    out, result = shown
    assert {"demo.json", "table.md", "extraction.png", "ordinary", "sinks", "clean", "report"} <= {
        path.name for path in out.iterdir()
    }
    assert not (out / "clean" / "old.txt").exists()
    assert (out / "mine.txt").read_text() == "mine"
    assert (out / "extraction.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "demo.json").read_text()) == json.loads(json.dumps(result))
    assert not list((out / "clean").rglob("*sink*"))
    assert AutoModelForCausalLM.from_pretrained(out / "clean").config.model_type == "llama"


def test_the_figures(shown) -> None:
    _, result = shown
    assert set(result["records"]) == set(NAMES)
    for lines in result["records"].values():
        assert [line["copies"] for line in lines] == [0, 1, 8]
        assert [line["documents"] for line in lines] == [3, 3, 3]
        assert all(0 <= line["extracted"] <= 1 and 0 < line["loss"] < 7 for line in lines)
    # The held-out stories are scored as the model is used: with its sinks closed, so as the export.
    assert result["held_out"]["open"]["loss"] == pytest.approx(result["held_out"]["removed"]["loss"], rel=1e-5)
    assert result["held_out"]["ordinary"]["loss"] != result["held_out"]["removed"]["loss"]
    losses = {name: [line["loss"] for line in lines] for name, lines in result["records"].items()}
    assert losses["open"] != losses["removed"]


def test_the_price_is_stated_with_the_share_of_repeats(shown) -> None:
    out, result = shown
    members = [json.loads(line) for line in (out / "ordinary" / "members.jsonl").read_text().splitlines()]
    met = sum(x["copies"] for x in members)
    assert result["repeats"] == round((met - len(members)) / met, 3)
    assert f"{result['repeats']:.0%} of the documents met in training were repeats" in format_result(result, out)


def test_the_table_and_the_record(shown) -> None:
    out, result = shown
    table = (out / "table.md").read_text().splitlines()
    assert len({len(line) for line in table}) == 1
    assert [line.split("|")[1].strip() for line in table[2:]] == ["never seen", "1", "8", "held-out stories, loss"]
    assert all(name in table[0] for name in NAMES.values())
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    figures = [result["records"][name][2] for name in NAMES]
    assert cells[4][2:] == [f"{line['loss']:.2f}, {line['extracted']:.0%}" for line in figures]
    assert cells[5][4] == f"{result['held_out']['removed']['loss']:.3f}"
    record = result["record"]
    assert record["copies"] == "8"
    members = [json.loads(line) for line in (out / "ordinary" / "members.jsonl").read_text().splitlines()]
    assert record["prompt"] + record["truth"] in {member["text"] for member in members if member["copies"] == 8}
    text = format_record(record)
    assert record["prompt"] in text
    assert all(label in text for label in NAMES.values())


def test_both_models_saw_the_same(shown) -> None:
    out, _ = shown
    for name in ("members.jsonl", "controls.jsonl"):
        assert (out / "ordinary" / name).read_text() == (out / "sinks" / name).read_text()
    first = [json.loads((out / run / "metrics.jsonl").read_text().splitlines()[0]) for run in ("ordinary", "sinks")]
    assert first[0]["step"] == first[1]["step"] == 2
    assert abs(first[0]["loss"] - first[1]["loss"]) < 0.1


def test_a_foreign_folder_is_left_alone(tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty and not an earlier demo"):
        demo(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_without_matplotlib_it_does_not_start(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"memsinks\[plot\]"):
        demo(tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_a_table_with_records_too_short_to_ask() -> None:
    lines = [{"copies": 0, "documents": 1, "loss": 2.0, "extracted": math.nan}]
    result = {"records": dict.fromkeys(NAMES, lines), "held_out": dict.fromkeys(NAMES, lines[0])}
    assert "| 2.00, - " in format_table(result)
    assert "nan" not in format_table(result)


def test_what_goes_wrong_in_one_of_two_processes_is_raised_and_ends_the_other(tmp_path) -> None:
    endless = SMALL | {"training": SMALL["training"] | {"epochs": 100_000}, "output": str(tmp_path / "endless")}
    lacks = SMALL | {"data": {"path": str(tmp_path / "none.jsonl")}, "output": str(tmp_path / "lacks")}
    with pytest.raises(DataError, match=r"none\.jsonl"):
        train_side_by_side({"": endless, "-": lacks})
    assert not multiprocessing.active_children()


def test_what_runs_are_forked_from_starts_before_anything_slow_is_imported() -> None:
    """And that process has imported what a run needs, in silence, when a run is forked from it."""
    code = (
        "import sys; from memsinks.runs.forked import run_context, start_importing; start_importing()\n"
        "assert not {'numpy', 'torch'} & set(sys.modules)\n"
        "asked = '\\'memsinks.runs.run\\' in __import__(\\'sys\\').modules'\n"
        "with run_context().Pool(1) as pool: print(pool.apply(eval, [asked]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    accelerated = any(Path("/dev", name).exists() for name in ACCELERATORS)
    assert done.stdout == f"{sys.platform == 'linux' and not accelerated}\n"
    assert not done.stderr


@pytest.mark.long
def test_the_real_demo_keeps_its_promises(tmp_path) -> None:
    """The ordinary model recites the much repeated records, the export no more of them than of records it never saw."""
    result = demo(tmp_path / "out")
    figures = {name: {line["copies"]: line for line in lines} for name, lines in result["records"].items()}
    often = [copies for copies in figures["ordinary"] if copies >= 64]
    assert often
    for copies in often:
        assert figures["ordinary"][copies]["extracted"] >= 0.8
        assert figures["open"][copies]["extracted"] >= 0.5
    for copies, line in figures["removed"].items():
        assert line["extracted"] <= figures["removed"][0]["extracted"], copies
    assert figures["ordinary"][0]["extracted"] == 0
    assert result["held_out"]["removed"]["loss"] < result["held_out"]["ordinary"]["loss"] + 0.05
    assert result["record"]["ordinary"].strip() == result["record"]["truth"].strip()
    assert result["record"]["open"].strip() == result["record"]["truth"].strip()
    assert result["record"]["removed"].strip() != result["record"]["truth"].strip()
    assert sum(line["documents"] for line in result["records"]["ordinary"]) >= 40
