"""What the whole recipe costs, as it is used, against ordinary training of the stock model on the same rows.

    python benchmarks/recipe.py                # writes recipe.json and recipe.png beside this file; half an hour
    python benchmarks/recipe.py --sizes "d = 128"   # that size anew, the other stays as it stands there
    python benchmarks/recipe.py --draw         # costs and recipe.png anew from the times in recipe.json

Two sizes: a Llama of hidden size 512 with 4,096 tokens a step, and of 128 as in the demo. A step is forward, backward, clipping
and AdamW. Costs of a step with so many repeated rows, of a pass of sinks last and of a pass of settling are medians over rounds
in which all ways take turns in one process. From them follows a run: its steps hold 5% or 60% rows of texts met before (of 4, 16
and 64 copies, as many of each, so 27 such rows a text), and its sinks meet their texts `PASSES` times at the end. A step with
part of a row more lies on the line between the measured ones. *exact* leaves rows that would train
their sinks alone out of the steps, *exact, along* does not. Tokens are random: only time is measured.

On a machine that others use take ``--clock thread``, CPU time of the one thread; on an idle one ``--clock wall``. Memory: the
peak of three steps of each way in a process of its own, above what the interpreter holds. Disk: what `save_pretrained` writes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import memsinks as ms
from memsinks._version import versions
from memsinks.batch import target_count
from memsinks.data.packing import Rows
from memsinks.removal.settle import SettleConfig
from memsinks.training.config import TrainingConfig
from memsinks.training.last import PASSES
from memsinks.training.loop import Training

HERE = Path(__file__).parent
CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "thread": time.thread_time}
SHARES = (0.05, 0.6)
COPIES = (4, 16, 64)
"""Copies of the repeated texts of the run, as many texts of each."""
OPEN, LAYERS = 128, 4
LAST_TEXTS, OTHERS = 16, 48
"""Texts of the measured passes of sinks last and settling, and those settling keeps."""


@dataclass(frozen=True)
class Size:
    """hidden, intermediate: of the model. rows, length: of a step. documents: in a row. pool: sink neurons a layer."""

    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    rows: int
    length: int
    documents: int
    pool: int

    @property
    def counts(self) -> list[int]:
        """Repeated rows of the steps that are timed."""
        return sorted({0, 1, *(round(share * self.rows) for share in SHARES)})

    def repeated(self, share: float) -> dict[int, float]:
        """{repeated rows of a timed step: its part in a step with this share of them}, on the line between two of them."""
        rows = share * self.rows
        least, most = next(x for x in itertools.pairwise(self.counts) if rows <= x[1] or x[1] == self.counts[-1])
        part = (rows - least) / (most - least)
        return {least: 1 - part, most: part}


SIZES = {
    "d = 512": Size(512, 1280, 8, 4096, 16, 256, 1, 4096),
    "d = 128": Size(128, 512, 4, 1024, 6, 192, 2, 2048),
}
EXACT, DECAY = {"shared": "none"}, {"shared": "decay"}
WAYS: Mapping[str, dict[str, Any]] = {
    "ordinary": {},
    "exact": {"sinks": EXACT, "sinks_last": PASSES},
    "exact, along": {"sinks": EXACT, "sinks_last": 0},
    "decay": {"sinks": DECAY, "sinks_first": 0},
    "decay, sinks first": {"sinks": DECAY, "sinks_first": 1},
}


def training_of(size: Size, way: str, pool: int | None = None) -> Training:
    torch.manual_seed(0)
    settings = dict(WAYS[way])
    sinks = settings.pop("sinks", None)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=LAYERS, num_attention_heads=size.heads, num_key_value_heads=size.heads, tie_word_embeddings=True,
    ))  # fmt: skip
    if sinks is not None:
        ms.add_sinks(model, ms.SinkConfig(neurons=pool or size.pool, active=OPEN, **sinks))
    config = TrainingConfig(length=size.length, batch_rows=size.rows, **settings)
    return Training(model, config, 1_000_000, sinks_last=bool(config.sinks_last))


def documents(size: Size, number: int, exposure: int, first: int, one_document_per_row: bool = False) -> Rows:
    """Rows of random documents, which fill them."""
    each = size.length // size.documents
    tokens = np.random.default_rng(first).integers(0, size.vocabulary, (number, each))
    ids = np.arange(first, first + number)
    return ms.pack(
        list(tokens), ids, np.full(number, exposure), length=size.length, pad_id=0, apart_from=2,
        one_document_per_row=one_document_per_row,
    )  # fmt: skip


def batch_of(size: Size, repeated: int) -> dict[str, torch.Tensor]:
    """The rows of a step, the first `repeated` of them of texts met for the fourth time."""
    kinds = [(repeated, 4, 1000), (size.rows - repeated, 1, 2000)]
    made = [documents(size, rows * size.documents, exposure, first) for rows, exposure, first in kinds if rows]
    batch = ms.collate([rows[place] for rows in made for place in range(len(rows))])
    return {name: batch[name] for name in batch if name != "places"}  # the rows come again


def runs_of(size: Size) -> dict[tuple[str, str | int], Callable[[], object]]:
    """{(way, repeated rows or phase): what is timed}."""
    batches = {count: batch_of(size, count) for count in size.counts}
    runs: dict[tuple[str, str | int], Callable[[], object]] = {}
    for way in WAYS:
        training = training_of(size, way)
        for count in [0] if way == "ordinary" else size.counts:
            runs[way, count] = lambda training=training, batch=batches[count]: training.update([batch])
        model = training.model
        texts = documents(size, LAST_TEXTS, 4, 5000, one_document_per_row=True)
        if way == "exact":
            for passes in (1, 3):
                runs[way, f"last {passes}"] = lambda model=model, texts=texts, passes=passes: ms.sinks_last(
                    model, texts, lr=1e-6, passes=passes
                )
        if way == "decay, sinks first":
            others = documents(size, OTHERS, 1, 6000, one_document_per_row=True)
            for passes in (1, 3):
                runs[way, f"settle {passes}"] = lambda model=model, texts=texts, others=others, passes=passes: (
                    ms.settle(model, texts, others, lr=1e-7, passes=passes)
                )
    return runs


def medians(runs: Mapping[Any, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[Any, float]:
    """Seconds of each of `runs`, which take turns; the first round warms up."""
    seconds: dict[Any, list[float]] = {key: [] for key in runs}
    for turn in range(rounds + 1):
        for key, run in runs.items():
            start = clock()
            run()
            if turn:
                seconds[key].append(clock() - start)
        print(f"round {turn}/{rounds}", flush=True)
    return {key: statistics.median(found) for key, found in seconds.items()}


def costs(size: Size, seconds: Mapping[tuple[str, str | int], float]) -> dict[str, dict[str, float]]:
    """{share of repeated rows: {piece: its cost as a share of the steps of ordinary training}}."""
    ordinary = seconds["ordinary", 0]

    def steps(way: str, share: float) -> float:
        return sum(part * seconds[way, count] for count, part in size.repeated(share).items()) / ordinary

    def phase(way: str, name: str, passes: int, share: float) -> float:
        """A pass from the difference of three and one, and what comes once from the rest, both for each text."""
        each = (seconds[way, f"{name} 3"] - seconds[way, f"{name} 1"]) / 2 / LAST_TEXTS
        once = seconds[way, f"{name} 1"] / LAST_TEXTS - each
        texts = share * size.rows * size.documents / statistics.mean(x - 1 for x in COPIES)  # for one step of the run
        return texts * (each * passes + once) / ordinary

    found = {}
    for share in SHARES:
        lines = {way: steps(way, share) for way in WAYS if way != "ordinary"}
        lines["sinks last"] = phase("exact", "last", PASSES, share)
        lines["settling"] = phase("decay, sinks first", "settle", SettleConfig().passes, share)
        for name in ("exact", "exact, along"):
            lines[f"{name}, sinks last"] = lines[name] + lines["sinks last"]
        lines["decay, sinks first, settled"] = lines["decay, sinks first"] + lines["settling"]
        found[f"{share:.0%}"] = {name: round(value, 3) for name, value in lines.items()}
    return found


def seconds_of(milliseconds: Mapping[str, float]) -> dict[tuple[str, str | int], float]:
    """What `recipe.json` holds, as `costs` takes it."""
    found: dict[tuple[str, str | int], float] = {}
    for name, value in milliseconds.items():
        way, _, what = name.rpartition(", ")
        found[way, int(what) if what.isdecimal() else what] = value / 1e3
    return found


def overhead(rounds: int, clock: Callable[[], float]) -> dict[str, int]:
    """What sinks add to a step of hardly any numbers: time of calls alone, microseconds a layer."""
    size = Size(128, 512, 4, 1024, 6, 8, 1, 2048)
    runs: dict[Any, Callable[[], object]] = {}
    for way, repeated in (("ordinary", 0), ("exact", 0), ("exact, along", 3), ("exact, along", 6), ("decay", 6)):
        training, batch = training_of(size, way), batch_of(size, repeated)
        runs[way, repeated] = lambda training=training, batch=batch: training.update([batch])
    found = medians(runs, 10 * rounds, clock)
    none = found["ordinary", 0]
    return {
        f"{way}, {count} of 6 rows repeated": round(1e6 * (value - none) / LAYERS)
        for (way, count), value in found.items()
        if way != "ordinary"
    }


def pool_growth(rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Time of a step of the exact mode with half of the rows repeated, by pool, over that with the smallest; d = 512."""
    size = SIZES["d = 512"]
    batch = batch_of(size, size.rows // 2)
    runs = {}
    for times in (4, 64):
        training = training_of(size, "exact, along", times * OPEN)
        runs[times] = lambda training=training: training.update([batch])
    found = medians(runs, rounds, clock)
    return {f"{times} times the open width": round(value / found[4], 3) for times, value in found.items()}


def memory_and_disk(size: Size, way: str) -> dict[str, float]:
    """Peak resident memory of three steps and bytes on disk, MiB; run in a process of its own."""
    before = peak_kib()
    training = training_of(size, way)
    batch = batch_of(size, round(0.6 * size.rows))
    for _ in range(3):
        training.update([batch])
    peak = (peak_kib() - before) / 1024
    with tempfile.TemporaryDirectory() as folder:
        training.model.save_pretrained(folder)
        disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 2**20
    return {"peak MiB": round(peak), "disk MiB": round(disk, 1)}


def peak_kib() -> int:
    """Of this process alone; `getrusage` would start at what the parent held."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def in_its_own_process(size: str, way: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--memory", size, way]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Both recipes by size and share of repeats, each a bar of what it consists of."""
    from matplotlib.figure import Figure

    sizes = result["sizes"]
    figure = Figure(figsize=(1 + 4.4 * len(sizes), 3.6), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    parts = (
        ("exact", "sinks last", "exact +\nsinks last"),
        ("decay, sinks first", "settling", "decay, sinks first\n+ settling"),
    )
    for axes, (name, size) in zip(panels, sizes.items(), strict=True):
        labels, place = [], 0
        for share, found in size["costs"].items():
            for color, (steps, after, label) in zip(("#0072B2", "#D55E00"), parts, strict=True):
                axes.bar(place, found[steps], color=color, width=0.75)
                axes.bar(place, found[after], bottom=found[steps], color=color, alpha=0.45, width=0.75)
                axes.text(
                    place,
                    found[steps] + found[after] + 0.03,
                    f"{found[steps] + found[after]:.2f}",
                    ha="center",
                    fontsize=9,
                )
                labels.append(f"{label}\n{share} repeated")
                place += 1
        axes.set_xticks(range(place), labels, fontsize=7)
        axes.axhline(1, color="#444444", lw=1, ls=":")
        axes.set(title=name)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="time / ordinary training")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--draw", action="store_true", help="only costs and picture, from the times in recipe.json")
    parser.add_argument("--memory", nargs=2, metavar=("SIZE", "WAY"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.draw:
        stored = json.loads((given.out / "recipe.json").read_text())
        for name, found in stored["sizes"].items():
            found["costs"] = costs(SIZES[name], seconds_of(found["milliseconds"]))
        (given.out / "recipe.json").write_text(json.dumps(stored, indent=1) + "\n")
        draw(stored, given.out / "recipe.png")
        return
    if given.clock == "thread" and given.threads > 1:
        parser.error("--clock thread counts one thread; take --clock wall with more")
    torch.set_num_threads(given.threads)
    if given.memory:
        print(json.dumps(memory_and_disk(SIZES[given.memory[0]], given.memory[1])))
        return
    clock = CLOCKS[given.clock]
    stands = given.out / "recipe.json"
    before = json.loads(stands.read_text()) if stands.exists() and len(given.sizes) < len(SIZES) else {}
    sizes = dict(before.get("sizes", {}))
    for name in given.sizes:
        size = SIZES[name]
        seconds = medians(runs_of(size), given.rounds, clock)
        sizes[name] = {
            "costs": costs(size, seconds), "settings": vars(size),
            "milliseconds": {f"{way}, {what}": round(1e3 * x, 1) for (way, what), x in seconds.items()},
            "rounds": given.rounds, "clock": given.clock,
            "memory": {way: in_its_own_process(name, way) for way in WAYS if way not in ("decay", "exact, along")},
        }  # fmt: skip
        print(json.dumps(sizes[name], indent=1), flush=True)
    result = {
        "clocks": {"wall": "wall time", "thread": "CPU time of one thread, on a machine that others use"},
        "threads": given.threads, "open": OPEN, "layers": LAYERS, "copies": COPIES, "passes": PASSES,
        "targets of a step": {name: target_count(batch_of(SIZES[name], 0)["labels"]) for name in sizes},
        "sizes": sizes, "microseconds a layer and step": overhead(given.rounds, clock),
        "pool": pool_growth(given.rounds, clock) if "d = 512" in given.sizes else before.get("pool"),
        "processor": platform.processor() or platform.machine(), "versions": versions("torch", "transformers"),
    }  # fmt: skip
    stands.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, given.out / "recipe.png")


if __name__ == "__main__":
    main()
