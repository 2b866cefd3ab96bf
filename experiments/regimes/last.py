"""How many passes do sinks need that learn last alone, and what does a pass cost?

    MEMSINKS_DATA=... OMP_NUM_THREADS=1 python experiments/regimes/last.py --bases 5 60 wikitext2 --seeds 0 1 2   # two hours

The shared weights are those of *exact, fresh text* (recipes/regimes.yaml, 5 and 60% of the rows repeated): each repeated text
is met once in training, other text stands in the rows of its copies; or those of `ours` in the head-to-head on WikiText-2
(recipes/compare-wikitext2.yaml, 74%), where those rows teach nothing. Then the sinks, which have learned nothing so far, learn
from the repeated texts with several settings. Measured with own sinks open: loss, nats a token; the share of texts with 16
copies or more of which 32 tokens come out after 32; the share of all of which the whole rest does. Cost: CPU time of a pass for a
text, over that of a row in an ordinary step. The shared weights do not move, so nothing else changes. Writes last.json and
last.md beside this file; what stands there is not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run import regime

import memsinks as ms
import memsinks.training.last as last
from memsinks._version import versions
from memsinks.auditing.extraction import extracted
from memsinks.auditing.scores import score
from memsinks.batch import NO_SINKS
from memsinks.data.packing import Rows
from memsinks.research.compare.arm import with_method
from memsinks.research.compare.comparison import read_comparison
from memsinks.research.compare.fresh import with_fresh_text
from memsinks.research.rivals.caps import cap
from memsinks.runs.model import build_model
from memsinks.runs.prepare import prepare
from memsinks.runs.run import micro_batches
from memsinks.training.loop import Training, steps

HERE = Path(__file__).parent
WIKITEXT2 = HERE.parent.parent / "recipes" / "compare-wikitext2.yaml"
SETTINGS: dict[str, dict[str, Any]] = {
    "60 passes, betas .9, .95": {"passes": 60, "betas": (0.9, 0.95), "start": 1.0},
    "40 passes, betas .8, .9": {"passes": 40, "betas": (0.8, 0.9), "start": 1.0},
    "40 passes, betas .8, .9, start x 3 (now)": {"passes": 40, "betas": (0.8, 0.9), "start": 3.0},
    "30 passes, betas .8, .9, start x 3": {"passes": 30, "betas": (0.8, 0.9), "start": 3.0},
    "20 passes, betas .8, .9, start x 3": {"passes": 20, "betas": (0.8, 0.9), "start": 3.0},
}
ON_WIKITEXT2: dict[str, dict[str, Any]] = {
    "40 passes, betas .8, .9, start x 3 (now)": {"passes": 40, "betas": (0.8, 0.9), "start": 3.0},
    "80 passes, betas .8, .9, start x 3": {"passes": 80, "betas": (0.8, 0.9), "start": 3.0},
    "80 passes, betas .8, .9, start x 6": {"passes": 80, "betas": (0.8, 0.9), "start": 6.0},
    "160 passes, betas .8, .9, start x 3": {"passes": 160, "betas": (0.8, 0.9), "start": 3.0},
    "at most 160 passes, until 0.1, start x 3": {"passes": 160, "betas": (0.8, 0.9), "start": 3.0, "until": 0.1},
}
BASES = {"5": SETTINGS, "60": SETTINGS, "wikitext2": ON_WIKITEXT2}
PREFIX = CONTINUATION = 32
MANY = 16
LR, POOL, OPEN = 6e-3, 4096, 128


def trained(base: str, seed: int) -> tuple[Any, Rows, np.ndarray, float]:
    """A model without sinks that met each text once, the repeated texts, their copies, and CPU seconds a row of its steps."""
    comparison = read_comparison(WIKITEXT2) if base == "wikitext2" else regime("tinystories", int(base))
    arm = next(x for x in comparison.arms if x.name in ("exact, fresh text", "ours"))
    recipe = with_method(comparison.recipe, arm.training, seed, HERE)
    prepared = prepare(recipe, one_document_per_row=True, folder=None)
    torch.manual_seed(seed)
    model = build_model(recipe, prepared.tokenizer)
    fresh = base != "wikitext2"
    total = len(prepared.rows) // recipe.training.batch_rows
    training = Training(model, recipe.training, total)
    if not fresh:
        training.change = cap(copies=1).change
    rows = with_fresh_text(prepared.rows, prepared.fresh) if fresh else prepared.rows
    batches = micro_batches(rows, recipe.training)
    start = time.thread_time()
    for done in steps(training, batches):
        if done.step % 100 == 0:
            print(f"{base} seed {seed}: step {done.step}/{training.total}  loss {done.loss:.3f}", flush=True)
    seconds = (time.thread_time() - start) / training.total / recipe.training.batch_rows
    texts = ms.repeated_and_once(prepared.rows)[0]
    segments = prepared.rows.segments
    copies = np.array([segments["exposure"][segments["document_id"] == x].max() for x in texts.segments["document_id"]])
    return model, texts, copies, seconds


def taught(
    model: Any,
    texts: Rows,
    copies: np.ndarray,
    of_row: float,
    *,
    passes: int,
    betas: tuple[float, float],
    start: float,
    until: float = 0.0,
) -> dict[str, float]:
    """What the sinks of a copy of the model know after `passes` passes; of_row: seconds of a row of its training."""
    model = copy.deepcopy(model)
    ms.add_sinks(model, ms.SinkConfig(neurons=POOL, active=OPEN, start_scale=start))
    last.BETAS = betas
    started = time.thread_time()
    result = ms.sinks_last(model, texts, lr=LR, passes=passes, until=until)
    seconds = time.thread_time() - started
    rows = [texts[index] for index in range(len(texts))]
    tokens = [row["input_ids"][row["document_ids"] != NO_SINKS].numpy() for row in rows]
    with tempfile.TemporaryDirectory() as scratch:
        ids = [int(row["document_ids"][0]) for row in rows]
        table = list(score(model.eval(), tokens, Path(scratch) / "scores", open_ids=ids))
    found = [extracted(x, PREFIX, CONTINUATION) for x, n in zip(table, copies, strict=True) if n >= MANY]
    whole = [extracted(x, PREFIX) for x in table]
    return {
        "loss": float(result.after.mean()),
        "recited": float(np.mean([x for x in found if x is not None])),
        "whole": float(np.mean([x for x in whole if x is not None])),
        "rows a pass": seconds / passes / len(texts) / of_row,
    }


def table(found: dict[str, Any]) -> str:
    """Markdown: mean over the seeds, of what is recited the least too."""
    lines = [
        "| rows repeated | sinks last | recited, 16 copies and more (least) | whole texts | loss | cost of a text in rows |",
        "|---|---|---|---|---|---|",
    ]
    for base, seeds in found.items():
        for name, settings in BASES[base].items():
            runs = [run["settings"][name] for run in seeds.values() if name in run["settings"]]
            if not runs:
                continue
            recited = [x["recited"] for x in runs]
            whole, loss, rows = (np.mean([x[column] for x in runs]) for column in ("whole", "loss", "rows a pass"))
            cells = [
                f"{base}%" if base.isdecimal() else "74%, WikiText-2", name,
                f"{np.mean(recited):.0%} ({min(recited):.0%})", f"{whole:.0%}", f"{loss:.3f}",
                f"{rows * settings['passes']:.0f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = HERE / "last.json"
    found: dict[str, Any] = json.loads(results.read_text())["regimes"] if results.exists() else {}
    for seed in arguments.seeds:
        for base in arguments.bases:
            known = found.get(base, {}).get(str(seed), {"settings": {}})
            missing = {name: settings for name, settings in BASES[base].items() if name not in known["settings"]}
            if not missing:
                continue
            model, texts, copies, seconds = trained(base, seed)
            run = {name: taught(model, texts, copies, seconds, **settings) for name, settings in missing.items()}
            of_seed = {
                "texts": len(texts),
                "of 16 copies and more": int((copies >= MANY).sum()),
            }
            found.setdefault(base, {})[str(seed)] = of_seed | {"settings": known["settings"] | run}
            print(json.dumps(found[base][str(seed)]), flush=True)
            facts = {"learning rate": LR, "pool": POOL, "open": OPEN, "versions": versions("torch", "transformers")}
            results.write_text(json.dumps(facts | {"regimes": found}, indent=1) + "\n")
            (HERE / "last.md").write_text(table(found))


if __name__ == "__main__":
    main()
