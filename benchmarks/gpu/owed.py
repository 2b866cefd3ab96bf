"""Do the GPU runs that are still owed, in order, as many as fit into the time; one JSON holds all their results.

    PYTHONPATH=src python benchmarks/gpu/owed.py --out FOLDER                # ten minutes
    PYTHONPATH=src python benchmarks/gpu/owed.py --out FOLDER --minutes 30
    PYTHONPATH=src python benchmarks/gpu/owed.py --list

FOLDER/owed.json has, for each run that was begun, its command, exit status, seconds, the JSON lines it printed and the end of its
output; it is written after each. A run that is done in it is not done again, so the same command goes on where the last one
ended: bring the file along to a fresh machine. A run is begun only if its expected time is left, and stopped when time is up.
Runs that need data which is not there are named and passed over. See README.md beside this file for what each run answers.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memsinks._version import versions
from memsinks.files import write_json

ROOT = Path(__file__).parents[2]
MARK = "owed.json"
TAIL = 4000
"""Characters of a run's output that are kept."""


@dataclass(frozen=True)
class Owed:
    """A run: its name, command (from the repository root; PYTHON is this one, OUT the folder of results), expected minutes, and
    what must lie there before it, from the root."""

    name: str
    command: str
    minutes: float
    needs: str = ""


def _arms() -> list[Owed]:
    recipe, data = "recipes/paper/tinystories-344m.yaml", "runs/tinystories-344m/seed-0/data/data.json"
    arms = {"standard": 5, "twin": 5, "published": 5, "ours": 8, "dedup": 5, "decay 1": 5, "decay, settled": 8}
    return [
        Owed(f"arm: {arm}", f"PYTHON benchmarks/gpu/arm.py {recipe} '{arm}' --out 'OUT/{arm}' $DATA", minutes, data)
        for arm, minutes in arms.items()
    ]


def _regimes() -> list[Owed]:
    script = "PYTHON experiments/regimes/run.py tinystories"
    return [
        Owed(
            f"regimes: {share}%, seed {seed}",
            f"{script} --regimes {share} --seeds {seed} && cp -r runs/regimes OUT",
            8,
            "data",
        )
        for share in (60, 20, 5)
        for seed in (0, 1, 2)
    ]


def _tofu() -> list[Owed]:
    script = (
        "PYTHON experiments/tofu/run.py SmolLM2-135M-Instruct.Q4_1.gguf --device cuda --authors 40 --asked 400"
        " --arms ours 'ours, one left' lora full"
    )
    return [
        Owed(
            f"tofu: seed {seed}",
            f"{script} --seeds {seed} && cp -r runs/tofu OUT",
            8,
            "data/SmolLM2-135M-Instruct.Q4_1.gguf",
        )
        for seed in (0, 1, 2)
    ]


RUNS: Sequence[Owed] = [
    Owed("sink layer", "PYTHON benchmarks/sink_layer.py --out OUT", 1),
    Owed("step: 344M", "PYTHON benchmarks/gpu/step.py recipes/paper/tinystories-344m.yaml", 5),
    Owed("tests: optimizer, resume, export", "PYTHON -m pytest -q -p no:cacheprovider tests/test_optim.py tests/test_training.py "
         "tests/test_run.py tests/test_export.py tests/test_arm.py", 5),
    Owed("step: 360M", "PYTHON benchmarks/gpu/step.py recipes/paper/smollm-360m-1b.yaml", 6),
    Owed("step: 1.7B", "PYTHON benchmarks/gpu/step.py recipes/paper/smollm-1.7b-2b.yaml", 8),
    *_arms(),
    *_regimes(),
    *_tofu(),
    Owed("tests: all", 'PYTHON -m pytest -q -p no:cacheprovider -m "long or not long"', 9.5),
]  # fmt: skip
"""In the order in which they are worth most."""


def run(owed: Owed, out: Path, seconds: float) -> dict[str, Any]:
    """Do one run, for so long at most; what came of it."""
    command = owed.command.replace("PYTHON", sys.executable).replace("OUT", str(out))
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    surroundings = {"MEMSINKS_DATA": "data"} | os.environ | {"PYTHONPATH": path}
    started = time.perf_counter()
    log = out / f"{owed.name.replace(':', '').replace(' ', '-')}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", "-c", command], cwd=ROOT, env=surroundings, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = "stopped: time was up"
    text = log.read_text()
    return {
        "command": command, "status": status, "seconds": round(time.perf_counter() - started, 1), "lines": json_lines(text),
        "end": text[-TAIL:], "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions("torch", "transformers"),
    }  # fmt: skip


def json_lines(text: str) -> list[Any]:
    """The lines of an output that are JSON objects."""
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return found


def run_owed(runs: Sequence[Owed], out: Path, minutes: float) -> Mapping[str, Any]:
    """Do the runs that are not done, in order, while they fit; everything known of all, as in ``out/owed.json``."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + 60 * minutes
    known: dict[str, Any] = json.loads((out / MARK).read_text()) if (out / MARK).exists() else {}
    for owed in runs:
        left = end - time.perf_counter()
        if known.get(owed.name, {}).get("status") == 0:
            print(f"{owed.name}: done before", flush=True)
        elif owed.needs and not (ROOT / owed.needs).exists():
            print(f"{owed.name}: passed over, {owed.needs} is missing", flush=True)
        elif 60 * owed.minutes > left:
            print(f"{owed.name}: {owed.minutes:g} minutes do not fit into {left / 60:.1f}", flush=True)
        else:
            print(f"{owed.name}: {owed.minutes:g} minutes expected", flush=True)
            known[owed.name] = run(owed, out, left)
            write_json(out / MARK, known)
            print(f"{owed.name}: status {known[owed.name]['status']} after {known[owed.name]['seconds']} s", flush=True)
    return known


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where owed.json and all results go")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--list", action="store_true", help="print the runs and do nothing")
    given = parser.parse_args(argv)
    if given.list:
        for owed in RUNS:
            print(f"{owed.minutes:4g} min  {owed.name:36}{owed.command}")
        return
    if given.out is None:
        parser.error("give --out, the folder of the results")
    run_owed(RUNS, given.out.resolve(), given.minutes)


if __name__ == "__main__":
    main()
