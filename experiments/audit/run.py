"""What do five ways of training leave behind on TinyStories? Trains them, audits them, writes report and figures.

    MEMSINKS_DATA=... python experiments/audit/run.py --train --jobs 2   # six models into runs/audit, about 3 minutes each
    MEMSINKS_DATA=... python experiments/audit/run.py --audit            # 5 minutes; report in runs/audit, figures beside this

All arms see the same stories in the same order, in the same rows and batches, on one thread: 200 stories trained on 1, 4,
16 or 64 times among 3,000 others seen once. `twin` never saw the 200 and `seen once` saw each once: their other copies
stand in the rows without a loss, so steps, learning rate and divisor are those of the other arms.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import memsinks as ms
from memsinks.auditing.pictures import save
from memsinks.batch import IGNORED
from memsinks.data.documents import write_documents
from memsinks.runs.model import build_model
from memsinks.runs.prepare import prepare
from memsinks.runs.run import micro_batches
from memsinks.training.loop import Training, steps

HERE = Path(__file__).parent
OUT = Path("runs/audit")
DATA: dict[str, Any] = {
    "path": "$MEMSINKS_DATA/tinystories.jsonl.zst", "limit": 4200, "held_out": 1000, "long": "truncate",
    "repeat": {"documents": 200, "copies": [1, 4, 16, 64]},
}  # fmt: skip
MODEL = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
SINKS = {"neurons": 512, "active": 128}
PUBLISHED = SINKS | {"routing": "bernoulli", "per_layer": False, "open_from": 1, "shared_decay": 0.0}
ARMS: dict[str, dict[str, Any] | None] = {
    "standard": None, "twin": None, "seen once": None, "published": PUBLISHED,
    "gated, decay 0.5": SINKS | {"shared_decay": 0.5}, "gated, decay 1": SINKS | {"shared_decay": 1.0},
}  # fmt: skip
MASKED_FROM = {"twin": 1, "seen once": 2}
"""The first exposure of an audited story that has no loss."""


def recipe(arm: str, seed: int) -> ms.Recipe:
    return ms.parse_recipe({
        "output": str(folder(arm, seed)), "data": DATA, "tokenizer": {"vocab_size": 2048}, "model": {"config": MODEL},
        "sinks": ARMS[arm],
        "training": {"length": 256, "batch_rows": 8, "lr": 2e-3, "seed": seed, "sinks_first": False,
                     "sink_lr_factor": 1.0 if arm == "published" else 3.0},
    })  # fmt: skip


def folder(arm: str, seed: int) -> Path:
    return OUT / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"


def train(arm: str, seed: int) -> None:
    """Train one arm and save model, tokenizer, audited stories and controls."""
    torch.set_num_threads(1)
    settings = recipe(arm, seed)
    # The audited stories come first in `prepare`'s choice; the others are background, seen once.
    prepared = prepare(settings)
    audited = audited_stories(prepared.members)
    ids = torch.tensor(ms.identify(audited)[0])
    random.seed(seed), torch.manual_seed(seed)
    model = build_model(settings, prepared.tokenizer)

    def change(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if arm not in MASKED_FROM:
            return batch
        late = torch.isin(batch["document_ids"], ids) & (batch["exposures"] >= MASKED_FROM[arm])
        return batch | {"labels": batch["labels"].masked_fill(late, IGNORED)}

    training = Training(model, settings.training, len(prepared.rows) // settings.training.batch_rows, change=change)
    start = time.perf_counter()
    for done in steps(training, micro_batches(prepared.rows, settings.training)):
        if done.step % 25 == 1:
            print(
                f"{arm} step {done.step - 1}/{training.total} loss {done.loss:.3f} {time.perf_counter() - start:.0f} s"
            )
    target = folder(arm, seed)
    model.eval().save_pretrained(target)
    prepared.tokenizer.save_pretrained(target)
    write_documents(OUT / f"documents-{seed}.jsonl", audited)
    write_documents(OUT / f"controls-{seed}.jsonl", prepared.controls)


def audited_stories(members: list[ms.Document]) -> list[ms.Document]:
    """The stories with 4 or more copies and as many of those with one."""
    repeated = [x for x in members if x.copies > 1]
    each = len(repeated) // 3
    once = [x for x in members if x.copies == 1][:each]
    return [replace(x, kind="story") for x in [*once, *repeated]]


def train_all(jobs: int, seed: int) -> None:
    """Train the arms that are not there yet, `jobs` at a time."""
    OUT.mkdir(parents=True, exist_ok=True)
    running: dict[str, subprocess.Popen[bytes]] = {}
    for arm in [arm for arm in ARMS if not (folder(arm, seed) / "config.json").exists()]:
        while sum(process.poll() is None for process in running.values()) >= jobs:
            time.sleep(0.5)
        running[arm] = subprocess.Popen([sys.executable, __file__, "--one", arm, "--seed", str(seed)])
    failed = [arm for arm, process in running.items() if process.wait()]
    if failed:
        raise SystemExit(f"failed: {failed}")


def audit(seed: int) -> None:
    """Audit the default arm against the others; figures and JSON beside this file, the whole report in runs/audit."""
    torch.set_num_threads(1)

    def subject(arm: str) -> ms.Subject:
        return ms.Subject(folder(arm, seed), "closed" if ARMS[arm] else None, arm)

    documents = list(ms.read_documents(OUT / f"documents-{seed}.jsonl", copies_field="copies"))
    controls = list(ms.read_documents(OUT / f"controls-{seed}.jsonl"))
    result = ms.audit(
        subject("gated, decay 1"), documents, controls, against=subject("standard"), twin=subject("twin"),
        seen_once=subject("seen once"), others=[subject("gated, decay 0.5"), subject("published")],
        relearn_steps=300, relearn_lr=1e-3, out=OUT / f"report-{seed}",
    )  # fmt: skip
    print(result)
    (HERE / "table.txt").write_text(f"{result}\n")
    (HERE / "audit.json").write_bytes((OUT / f"report-{seed}" / "audit.json").read_bytes())
    save(result, HERE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--audit", action="store_true")
    parser.add_argument("--one", choices=list(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.one:
        train(arguments.one, arguments.seed)
    if arguments.train:
        train_all(arguments.jobs, arguments.seed)
    if arguments.audit:
        audit(arguments.seed)


if __name__ == "__main__":
    main()
