"""From a folder of text to an audited model without sinks, with everything killed on the way, through the command line alone.

    MEMSINKS_DATA=... python experiments/end-to-end/run.py          # 100 MB of text, about three quarters of an hour on two cores
    MEMSINKS_DATA=... python experiments/end-to-end/run.py --tiny   # 1 MB in a few minutes, in which all is compared to the end

1. `corpus.py` writes the text. 2. `memsinks prepare` with one worker, undisturbed. 3. The same with two, killed twice at random
moments (SIGKILL of all its processes), the same command again: every byte must be the same. 4. `memsinks train` under torchrun,
two processes, FSDP2, undisturbed. 5. The same, killed at a random moment and, if it is caught, while it writes a checkpoint;
`--resume`: losses and weights must be the same. Settled, sinks last. 6. `memsinks export`. 7. `memsinks audit`.

Of 100 MB the undisturbed training ends after `compared` steps, and weights, moments and losses of that step are compared; the
tiny journey, which is made after it, compares the finished models. What is done is kept in the folder of the work (``--work``)
and not done again. Writes results.json beside this file (``--tiny``: into the folder of the work).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from corpus import DATA, Size, write
from measure import Measured, command, run, stored

from memsinks._version import versions
from memsinks.data.documents import load_documents, write_documents
from memsinks.files import file_hash

HERE = Path(__file__).parent
PROCESSES = 2
TRIES = 4
"""Times that a checkpoint is tried to be caught while it is written."""


@dataclass(frozen=True)
class Journey:
    """How large it is. compared: the step at which the undisturbed training ends, None = at its end."""

    text: Size
    shard_characters: int
    save_every: int
    compared: int | None


TINY = Journey(Size(1_000_000, exact=24, edited=12, controls=24), 100_000, save_every=4, compared=None)
WHOLE = Journey(Size(100_000_000, exact=240, edited=120, controls=240), 1 << 20, save_every=50, compared=150)


class Work:
    """The folder of a journey, and what was found in it."""

    def __init__(self, folder: Path, journey: Journey) -> None:
        self.folder, self.journey = folder, journey
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "found.json"
        self.found: dict[str, Any] = json.loads(self.file.read_text()) if self.file.is_file() else {}

    def once(self, name: str, stage: Callable[[Work], Any]) -> None:
        if name in self.found:
            return
        print(f"{time.strftime('%H:%M:%S')} {self.folder.name}: {name}", flush=True)
        self.found[name] = stage(self)
        self.file.write_text(json.dumps(self.found, indent=2) + "\n")

    def fresh(self, *names: str) -> None:
        """Remove what a stage that was cut off has left in these folders."""
        for name in names:
            shutil.rmtree(self.path(name), ignore_errors=True)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.txt"

    def path(self, name: str) -> Path:
        return self.folder / name


def added(parts: list[Measured]) -> dict[str, Any]:
    """Several starts of one command as one."""
    return {
        "seconds": round(sum(x.seconds for x in parts), 1),
        "cpu_seconds": round(sum(x.cpu_seconds for x in parts), 1),
        "peak_mb": max(x.peak_mb for x in parts),
        "kills": sum(x.ended == "killed" for x in parts),
    }


def text(work: Work) -> dict[str, Any]:
    return write(work.path("text.jsonl"), work.journey.text)


# Prepare


def prepare_command(work: Work, out: str, workers: int) -> list[str]:
    path = ["--set", f"data.path={work.path('text.jsonl')}"]
    settings = ["--workers", workers, "--shard-characters", work.journey.shard_characters]
    return command("prepare", HERE / "prepare.yaml", *path, "--out", work.path(out), *settings)


def prepared_undisturbed(work: Work) -> dict[str, Any]:
    work.fresh("alone")
    measured = run(prepare_command(work, "alone", 1), work.log("prepare-alone"))
    facts = json.loads((work.path("alone") / "manifest.json").read_text())
    near = {name: facts["near_copies"][name] for name in ("clusters", "clustered", "largest", "candidate_pairs")}
    kept = {name: facts[name] for name in ("documents", "trained", "tokens", "tokens_with_copies")}
    size = stored(work.path("alone"))
    characters = sum(len(x["text"]) for x in map(json.loads, work.path("text.jsonl").open()))
    return measured.facts() | kept | {
        "characters": characters, "shards": len(facts["shards"]), "bytes": size,
        "bytes_a_token": round(size / facts["tokens"], 2), "near_copies": near,
    }  # fmt: skip


def prepared_killed(work: Work) -> dict[str, Any]:
    work.fresh("corpus")
    rng, alone = random.Random(), work.found["prepared, one worker"]["seconds"]
    parts, kills = [], []
    for share in (rng.uniform(0.15, 0.45), rng.uniform(0.15, 0.45), None):
        at = None if share is None else share * alone
        parts.append(
            run(prepare_command(work, "corpus", PROCESSES), work.log("prepare"), at and (lambda now, at=at: now >= at))
        )
        if parts[-1].ended == "killed":
            made = work.path("corpus").rglob("index.npy"), work.path("corpus").glob(".work/shingles/0*")
            kills.append({"after": parts[-1].seconds, "shards": len(list(made[0])), "shingled": len(list(made[1]))})
    one, other = (hashes(work.path(name)) for name in ("alone", "corpus"))
    return added(parts) | {"bytes": stored(work.path("corpus")), "killed": kills, "same_bytes": one == other}


def hashes(folder: Path) -> dict[str, str]:
    return {str(x.relative_to(folder)): file_hash(x) for x in sorted(folder.rglob("*")) if x.is_file()}


def rows(work: Work) -> Any:
    arguments = [sys.executable, str(HERE / "rows.py"), str(work.path("corpus"))]
    return json.loads(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


# Train


def train_command(work: Work, out: str, resume: bool) -> list[str]:
    every = work.journey.save_every
    values = {
        "output": work.path(out), "data.path": work.path("corpus"), "training.save_every": every,
        "training.log_every": max(1, every // 5),
    }  # fmt: skip
    changes = [x for name, value in values.items() for x in ("--set", f"{name}={value}")]
    return command("train", HERE / "train.yaml", *changes, *(["--resume"] if resume else []), processes=PROCESSES)


def keep(work: Work, out: str) -> bool:
    """Keep the checkpoint that is compared, when it is there; whether it is."""
    name = f"checkpoint-{work.journey.compared}"
    there, kept = work.path(out) / "checkpoints" / name, work.path(f"{out}-{name}")
    if there.is_dir() and not kept.is_dir():
        shutil.copytree(there, kept.with_suffix(".part"))
        shutil.copy(work.path(out) / "metrics.jsonl", kept.with_suffix(".part"))
        kept.with_suffix(".part").rename(kept)
    return kept.is_dir()


def trained_undisturbed(work: Work) -> dict[str, Any]:
    whole = work.journey.compared is None
    work.fresh("undisturbed", f"undisturbed-checkpoint-{work.journey.compared}")
    watch = None if whole else lambda now: keep(work, "undisturbed")
    return run(train_command(work, "undisturbed", False), work.log("train-undisturbed"), watch).facts()


def steps_made(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return last_step(file) if file.is_file() else 0


def last_step(file: Path) -> int:
    lines = [x for x in file.read_text().split("\n") if x.endswith("}")]
    return json.loads(lines[-1])["step"] if lines else 0


def half_written(folder: Path) -> list[str]:
    return [x.name for x in (folder / "checkpoints").glob(".checkpoint-*.part-*")]


def trained_killed(work: Work) -> dict[str, Any]:
    """Killed after the first checkpoint at a random moment; then, until one is caught half written, in the next one's writing."""
    out, every = work.path("run"), work.journey.save_every
    work.fresh("run", f"run-checkpoint-{work.journey.compared}")
    log = max(1, every // 5)
    at, delay = every + log * random.randint(1, 3), random.uniform(0, 2)
    reached: list[float] = []

    def at_random(now: float) -> bool:
        if not reached and steps_made(out) >= at:
            reached.append(now)
        return bool(reached) and now >= reached[0] + delay

    def in_writing(now: float) -> bool:
        return bool(half_written(out))

    parts = [run(train_command(work, "run", False), work.log("train"), at_random, 0.1)]
    kills = [state_at_kill(out)]
    for _ in range(TRIES):
        parts.append(run(train_command(work, "run", True), work.log("train"), in_writing, 0.002))
        if parts[-1].ended == "finished":
            break
        kills.append(state_at_kill(out))
        if kills[-1]["half_written"]:
            break
    watch = None if work.journey.compared is None else lambda now: keep(work, "run") and False
    if parts[-1].ended == "killed":
        parts.append(run(train_command(work, "run", True), work.log("train"), watch, 0.2))
    went_on = [line for part in parts[1:] for line in part.said.splitlines() if "going on from" in line]
    facts = json.loads((out / "run.json").read_text())
    wanted = ("rows", "tokens", "fill", "settled", "sinks_last", "documents", "controls")
    return added(parts) | {
        "bytes": stored(out), "killed": kills, "went_on": [x.split("going on from ")[-1].split("/")[-1] for x in went_on],
        "steps": last_step(out / "metrics.jsonl"), "run": {name: facts[name] for name in wanted},
    }  # fmt: skip


def state_at_kill(out: Path) -> dict[str, Any]:
    whole = sorted(int(x.name.split("-")[-1]) for x in (out / "checkpoints").glob("checkpoint-*"))
    return {"logged_step": steps_made(out), "checkpoints": whole, "half_written": half_written(out)}


def compared(work: Work) -> dict[str, Any]:
    """Whether losses and weights of the killed run are those of the undisturbed one, to the last bit."""
    if work.journey.compared is None:
        one, other = work.path("undisturbed"), work.path("run")
        files = sorted(x.name for x in (one / "model").iterdir() if x.suffix in (".safetensors", ".json"))
        same = {name: file_hash(one / "model" / name) == file_hash(other / "model" / name) for name in files}
        weights = {"files": files, "same_weights": all(same.values())}
    else:
        one, other = (work.path(f"{x}-checkpoint-{work.journey.compared}") for x in ("undisturbed", "run"))
        states = [torch.load(x / "state.pt", weights_only=True) for x in (one, other)]
        weights = {"step": work.journey.compared, "same_weights": same_state(states[0], states[1])}
    curves = [curve(x / "metrics.jsonl") for x in (one, other)]
    if work.journey.compared is not None:
        curves = [[x for x in each if x[0] <= work.journey.compared] for each in curves]
    return weights | {"lines_of_losses": len(curves[0]), "same_losses": curves[0] == curves[1]}


def curve(file: Path) -> list[tuple[int, float, float]]:
    return [(x["step"], x["loss"], x["learning_rate"]) for x in map(json.loads, file.read_text().splitlines())]


def same_state(one: Any, other: Any) -> bool:
    """Whether two states hold the same values, tensors to the last bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[x], other[x]) for x in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_state, one, other))
    return one == other


# Export and audit


def exported(work: Work) -> dict[str, Any]:
    out = work.path("exported")
    work.fresh("exported")
    measured = run(command("export", work.path("run") / "model", out), work.log("export"))
    return measured.facts() | {"bytes": stored(out)}


def audited(work: Work) -> dict[str, Any]:
    """Of the repeated stories and the first of each edited family, against the held-out ones."""
    members = load_documents(work.path("run") / "members.jsonl")
    asked = [x for x in members if x.source == "exact"]
    first = {x.cluster: x for x in members if x.source == "edited" and str(x.key).endswith(".0")}
    sizes = {name: sum(x.cluster == name for x in members) for name in first}
    edited = [x for x in members if x.cluster in first and x is first[x.cluster]]
    documents, out = work.path("asked.jsonl"), work.path("audit")
    write_documents(documents, [*asked, *(type(x)(**asdict(x) | {"copies": sizes[x.cluster]}) for x in edited)])
    work.fresh("audit")
    run_folder = work.path("run")
    options = {
        "--against": f"open={run_folder}/model@open", "--also": f"exported={work.path('exported')}", "--documents": documents,
        "--controls": run_folder / "controls.jsonl", "--copies-field": "copies", "--by": "cluster", "--cluster-field": "cluster",
        "--out": out,
    }  # fmt: skip
    arguments = [f"closed={run_folder}/model@closed", *(x for option in options.items() for x in option)]
    measured = run(command("audit", *arguments), work.log("audit"))
    return measured.facts() | {"bytes": stored(out), "found": of_audit(json.loads((out / "audit.json").read_text()))}


def of_audit(audit: dict[str, Any]) -> dict[str, Any]:
    models = {x["name"]: x for x in audit["models"]}
    return {
        "documents": audit["documents"], "controls": audit["controls"], "outcome": audit["outcome"],
        "verdict": audit["verdict"], "gap_closed": models["closed"]["forgetting"], "notes": audit["notes"],
        "gap": {name: x["gap"] for name, x in models.items()},
        "lines": {name: x["lines"] for name, x in models.items()}, "sinks": models["closed"]["sinks"],
    }  # fmt: skip


STAGES: dict[str, Callable[[Work], Any]] = {
    "text": text, "prepared, one worker": prepared_undisturbed, "prepared, killed": prepared_killed, "rows": rows,
    "trained, undisturbed": trained_undisturbed, "trained, killed": trained_killed, "compared": compared,
    "exported": exported, "audited": audited,
}  # fmt: skip


def travel(folder: Path, journey: Journey) -> dict[str, Any]:
    work, started = Work(folder, journey), time.monotonic()
    for name, stage in STAGES.items():
        work.once(name, stage)
    print(f"{folder.name}: {time.monotonic() - started:.0f} s", flush=True)
    found = work.found
    for name in ("same_bytes", "same_weights", "same_losses"):
        [value] = [x[name] for x in (found["prepared, killed"], found["compared"]) if name in x]
        if not value:
            raise SystemExit(f"{folder}: {name} is false")
    return {"journey": asdict(journey)} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/end-to-end"))
    arguments = parser.parse_args()
    if not os.environ.get("MEMSINKS_DATA") or not (DATA / "tinystories.jsonl.zst").is_file():
        raise SystemExit(
            "set MEMSINKS_DATA to the folder of tinystories.jsonl.zst and the other texts of this experiment"
        )
    journeys = {"tiny": TINY} if arguments.tiny else {"whole": WHOLE, "tiny": TINY}
    result: dict[str, Any] = {name: travel(arguments.work / name, journey) for name, journey in journeys.items()}
    result |= {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, which others used too",
        "versions": versions("torch", "transformers", "tokenizers", "numpy", "rensa"),
    }
    out = arguments.work / "results.json" if arguments.tiny else HERE / "results.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
