"""The scripts of benchmarks/gpu, on the CPU at a size where they take seconds: what they print and write."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "paper" / "tinystories-344m.yaml"
SETTINGS = ("training.precision=fp32", "tokenizer.vocab_size=300", "training.length=32", "training.threads=1")
TINY = ["--scale", "1/1024", *(f"--set={text}" for text in SETTINGS)]


def script(name: str, of: str = "main"):
    return runpy.run_path(str(ROOT / "benchmarks" / "gpu" / name))[of]


def test_a_line_an_arm(capsys) -> None:
    script("step.py")([str(RECIPE), *TINY, "--ways", "eager", "--steps", "2"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["arm"] for line in lines] == ["standard", "published", "ours", "decay, settled"]
    for line in lines:
        assert line["tokens_per_second"] > 0 and 0 < line["share_of_peak"] < 0.1 and line["peak_gb"] is None
        assert 0 < line["estimated_peak_gb"] < 1
    assert lines[2]["parameters"] > lines[0]["parameters"]


def test_an_arm_is_trained_and_audited(tmp_path, capsys) -> None:
    stories = tmp_path / "stories.jsonl"
    stories.write_text("".join(
        json.dumps({"text": f"{n} " + " ".join(f"word{n * k % 17}" for k in range(1, 20))}) + "\n" for n in range(150)
    ))  # fmt: skip
    changes = {"data.path": stories, "data.limit": 100, "data.held_out": 24, "data.repeat.documents": 12,
               "training.batch_rows": 4, "output": tmp_path / "runs"}  # fmt: skip
    settings = [*TINY, *(f"--set={name}={value}" for name, value in changes.items())]
    main = script("arm.py")
    main([str(RECIPE), "standard", "--out", str(tmp_path / "first"), *settings])
    main([str(RECIPE), "ours", "--out", str(tmp_path / "second"), *settings])
    for folder, models in (("first", 1), ("second", 2)):
        files = {path.name for path in (tmp_path / folder).rglob("*")}
        assert {"run.json", "audit.json", "report.html", "documents.jsonl"} <= files
        assert "model.safetensors" not in files
        assert len(json.loads((tmp_path / folder / "report" / "audit.json").read_text())["models"]) == models
    with pytest.raises(SystemExit):
        main([str(RECIPE), "our", "--out", str(tmp_path / "third"), *settings])
    assert "has no arm 'our'" in capsys.readouterr().err


def test_owed_runs_go_on_in_order_while_they_fit(tmp_path, capsys) -> None:
    owed, run_owed = script("owed.py", "Owed"), script("owed.py", "run_owed")
    runs = [
        owed("prints", """PYTHON -c 'print("{\\"speed\\": 3}")'""", 0.01),
        owed("fails", "PYTHON -c 'import sys; sys.exit(7)'", 0.01),
        owed("hangs", "PYTHON -c 'import time; time.sleep(60)'", 0.01),
        owed("too long", "PYTHON -c 'raise SystemExit'", 10),
        owed("without data", "PYTHON -c 'raise SystemExit'", 0.01, "no/such/file"),
    ]
    found = run_owed(runs, tmp_path, 0.03)
    assert list(found) == ["prints", "fails", "hangs"]
    assert found["prints"]["status"] == 0 and found["prints"]["lines"] == [{"speed": 3}]
    assert found["fails"]["status"] == 7 and "time was up" in found["hangs"]["status"]
    assert json.loads((tmp_path / "owed.json").read_text()) == found
    said = capsys.readouterr().out
    assert "too long: 10 minutes do not fit" in said and "no/such/file is missing" in said
    run_owed(runs[:2], tmp_path, 0.1)
    said = capsys.readouterr().out
    assert "prints: done before" in said and "fails: status 7" in said  # what failed is tried again


def test_every_owed_run_names_files_that_are_there() -> None:
    runs = script("owed.py", "RUNS")
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        for word in run.command.split():
            if word.endswith((".py", ".yaml")):
                assert (ROOT / word).is_file(), word
