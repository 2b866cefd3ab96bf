"""Which defaults should SinkConfig have? Every arm x seed x text of the first experiment; finished runs are kept.

    MEMSINKS_DATA=... python experiments/defaults/run.py --jobs 2      # all runs, resumable
    python experiments/defaults/run.py --table                         # README.md beside this file, from results/

A run trains a Llama-like model (d=128, 4 layers, SwiGLU, BPE-1024) on 128-token documents, one a row: 200 documents
repeated 24 times and 2,400 seen once, shuffled together; 400 held-out documents. 450 steps of 16 rows, one thread.
Initial weights, order and the choice of the repeated documents vary with the seed and are the same in all arms.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import memsinks as ms
from memsinks.files import file_hash
from memsinks.training.config import TrainingConfig
from memsinks.training.loop import Training, steps

HERE = Path(__file__).parent
RESULTS = HERE / "results"
LENGTH, BATCH, REPEATED, COPIES, ONCE, HELD_OUT, VOCABULARY = 128, 16, 200, 24, 2400, 400, 1024
LR, WEIGHT_DECAY, WARMUP, POOL, OPEN = 2e-3, 0.1, 0.05, 512, 128
FILES = {"tinystories": "tinystories.jsonl.zst", "wikitext2": "wikitext2_valid_test.jsonl.zst"}


@dataclass(frozen=True)
class Arm:
    """One way to train. `general` is the width of the exported MLP."""

    general: int = 512
    sinks: bool = True
    published: bool = False
    decay: float = 0.0
    sink_lr_factor: float = 1.0
    dedup: bool = False
    epochs: int = 0


def arms() -> dict[str, Arm]:
    """All arms, the most important first. `open` = the open width equals the standard model's, not the exported."""
    table = {"standard": Arm(sinks=False), "dedup": Arm(sinks=False, dedup=True), "published": Arm(published=True)}
    for decay in (0.0, 0.5, 1.0):
        table[f"gated a={decay:g} lr x3"] = Arm(decay=decay, sink_lr_factor=3)
    table["published, open"] = Arm(general=384, published=True)
    for decay in (0.0, 0.5, 1.0):
        table[f"gated a={decay:g} lr x3, open"] = Arm(general=384, decay=decay, sink_lr_factor=3)
    table["standard, 4 epochs"] = Arm(sinks=False, epochs=4)
    table["gated a=1 lr x3, 4 epochs"] = Arm(decay=1.0, sink_lr_factor=3, epochs=4)
    for factor in (1, 10):
        for decay in (1.0, 0.5, 0.0):
            table[f"gated a={decay:g} lr x{factor}"] = Arm(decay=decay, sink_lr_factor=factor)
    return table


def chunks(text: str) -> np.ndarray:
    """All documents of a text, int64 [documents, LENGTH]: the start of each story, every full chunk of each article."""
    source = Path(os.environ["MEMSINKS_DATA"]) / FILES[text]
    cache = Path(tempfile.gettempdir()) / f"memsinks-{file_hash(source)[:16]}-{VOCABULARY}-{LENGTH}.npy"
    if not cache.exists():
        texts = [document.text for document in ms.read_documents(source)]
        tokenizer = ms.train_tokenizer(texts, VOCABULARY)
        rows = []
        for tokens in ms.encode(tokenizer, texts, end=False):
            count = len(tokens) // LENGTH
            rows.append(tokens[: count * LENGTH].reshape(count, LENGTH)[: 1 if text == "tinystories" else None])
        part = cache.with_suffix(f".{os.getpid()}.npy")
        np.save(part, np.concatenate(rows))
        part.rename(cache)
    return np.load(cache)


def losses(model: Any, documents: np.ndarray, ids: torch.Tensor | None = None) -> tuple[list[float], float]:
    """Mean loss of each document in nats a token, and the share extracted (64 tokens given, the next 32 by argmax)."""
    model.eval()
    result, extracted = [], 0
    for start in range(0, len(documents), 50):
        rows = torch.from_numpy(documents[start : start + 50])
        with torch.no_grad():
            if ids is None:
                logits = model(input_ids=rows).logits
            else:
                with ms.sinks_open(model, ids[start : start + 50]):
                    logits = model(input_ids=rows).logits
        logits = logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        result += loss.mean(1).tolist()
        extracted += int((logits.argmax(-1) == rows[:, 1:])[:, 63:95].all(1).sum())
    model.train()
    return result, extracted / len(documents)


def training_rows(arm: Arm, documents: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the documents in training order and the exposure of each: repeated ones are 0 to REPEATED - 1."""
    if arm.epochs:
        count = (REPEATED * COPIES + ONCE) // arm.epochs
        order = np.concatenate([np.random.default_rng((seed, x)).permutation(count) for x in range(arm.epochs)])
    else:
        order = np.concatenate([np.repeat(np.arange(REPEATED), COPIES), np.arange(REPEATED, REPEATED + ONCE)])
        order = np.random.default_rng(seed).permutation(order)
    return order, ms.exposures(order)


def run(text: str, arm: Arm, seed: int) -> dict[str, Any]:
    """Train and measure one arm."""
    torch.set_num_threads(1)
    documents = chunks(text)
    documents = documents[np.random.default_rng(seed + 1000).permutation(len(documents))]
    if len(documents) < REPEATED + ONCE + HELD_OUT:
        raise SystemExit(f"{text} has {len(documents)} documents, {REPEATED + ONCE + HELD_OUT} are needed")
    held_out = documents[-HELD_OUT:]
    random.seed(seed), torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=arm.general, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True, max_position_embeddings=LENGTH,
        bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip
    if arm.sinks:
        gated: dict[str, Any] = {"shared_decay": arm.decay}
        published: dict[str, Any] = {"routing": "bernoulli", "per_layer": False, "open_from": 1, "shared_decay": 0.0}
        ms.add_sinks(
            model, ms.SinkConfig(neurons=POOL, active=OPEN, seed=seed, **(published if arm.published else gated))
        )
    order, counts = training_rows(arm, len(documents), seed)
    config = TrainingConfig(
        length=LENGTH, batch_rows=BATCH, lr=LR, warmup=WARMUP, weight_decay=WEIGHT_DECAY, sink_lr_factor=arm.sink_lr_factor,
        sinks_first=False,
    )  # fmt: skip

    def batches(step: int) -> list[dict[str, torch.Tensor]]:
        part = slice(step * BATCH, (step + 1) * BATCH)
        rows = torch.from_numpy(documents[order[part]])
        ids, exposures = (torch.from_numpy(x[part])[:, None].expand(-1, LENGTH) for x in (order, counts))
        places = torch.arange(LENGTH).expand(BATCH, -1)
        return [
            {"input_ids": rows, "labels": rows, "document_ids": ids, "exposures": exposures, "position_ids": places}
        ]

    def change(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return batch | ({"labels": batch["labels"].masked_fill(batch["exposures"] > 1, -100)} if arm.dedup else {})

    training = Training(model, config, len(order) // BATCH, change=change)
    start, curve = time.perf_counter(), []
    for done in steps(training, batches):
        if done.step % 25 == 1:
            curve.append(round(done.loss, 4))
            print(
                f"{text} step {done.step - 1}/{training.total} loss {done.loss:.3f} {time.perf_counter() - start:.0f}s"
            )
    seconds = time.perf_counter() - start
    repeated = documents[:REPEATED]
    closed, closed_extracted = losses(model, repeated)
    out = {
        "text": text, "seed": seed, "arm": asdict(arm), "steps": training.total, "seconds": round(seconds, 1), "curve": curve,
        "parameters": sum(x.numel() for x in model.parameters()),
        "held_out": [round(x, 4) for x in losses(model, held_out)[0]],
        "repeated": [round(x, 4) for x in closed], "repeated_extracted": closed_extracted,
        "data_sha256": file_hash(Path(os.environ["MEMSINKS_DATA"]) / FILES[text]),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "memsinks": ms.__version__},
    }  # fmt: skip
    if arm.sinks:
        own, own_extracted = losses(model, repeated, torch.arange(REPEATED))
        out |= {"own": [round(x, 4) for x in own], "own_extracted": own_extracted}
        out["placebo"] = [round(x, 4) for x in losses(model, repeated, torch.arange(REPEATED).roll(1))[0]]
    return out


def path_of(text: str, name: str, seed: int) -> Path:
    slug = "".join(x if x.isalnum() or x in ".=" else "-" for x in name).replace("--", "-")
    return RESULTS / f"{text}-{slug}-{seed}.json"


def everything(jobs: int, texts: list[str], seeds: list[int], chosen: list[str]) -> None:
    """Run what is not there yet, `jobs` at a time, in the order of `arms`."""
    RESULTS.mkdir(exist_ok=True)
    names = list(arms())
    groups = [
        names[:6],
        ["gated a=1 lr x10", "gated a=1 lr x1"],
        ["gated a=1 lr x3, open", "published, open"],
        names[10:12],
    ]
    groups.append([name for name in names if not any(name in group for group in groups)])
    todo = [
        (text, name, seed)
        for group in groups for seed in seeds for text in texts for name in group
        if name in chosen and not path_of(text, name, seed).exists()
    ]  # fmt: skip
    running: list[tuple[subprocess.Popen[bytes], str]] = []
    started = time.time()
    for done, (text, name, seed) in enumerate(todo):
        while len(running) >= jobs:
            for entry in [x for x in running if x[0].poll() is not None]:
                running.remove(entry)
                if entry[0].returncode:
                    print(f"FAILED {entry[1]}", flush=True)
            time.sleep(0.5)
        print(f"{done}/{len(todo)} {time.time() - started:.0f}s {text} | {name} | seed {seed}", flush=True)
        command = [sys.executable, __file__, "--one", text, name, str(seed)]
        running.append((subprocess.Popen(command, stdout=subprocess.DEVNULL), f"{text} {name} {seed}"))
    for process, _ in running:
        process.wait()


def table() -> str:
    """The results as Markdown: mean and spread (half the range) over seeds."""
    lines = []
    for text in FILES:
        found = {name: [json.loads(path.read_text()) for seed in range(3) if (path := path_of(text, name, seed)).exists()]
                 for name in arms()}  # fmt: skip
        gaps = {}
        for name in ("standard", "standard, 4 epochs"):
            gaps |= {(name, x["seed"]): np.mean(x["held_out"]) - np.mean(x["repeated"]) for x in found[name]}
        base = {x["seed"]: np.mean(x["held_out"]) for x in found["standard"]}
        head = (
            "arm|runs|held-out|against standard|repeated (closed)|gap closed|own sinks|extracted closed / own|seconds"
        )
        lines += [f"\n### {text}\n", "| " + " | ".join(head.split("|")) + " |", "|" + "---|" * 9]
        for name, runs in found.items():
            if not runs:
                continue
            reference = "standard, 4 epochs" if runs[0]["arm"]["epochs"] else "standard"
            held = [np.mean(x["held_out"]) for x in runs]
            closed = [1 - (np.mean(x["held_out"]) - np.mean(x["repeated"])) / gaps[reference, x["seed"]]
                      for x in runs if (reference, x["seed"]) in gaps]  # fmt: skip
            price = [
                np.mean(x["held_out"]) - base[x["seed"]] for x in runs if x["seed"] in base and reference == "standard"
            ]
            own = [np.mean(x["own"]) for x in runs if "own" in x]
            share = " / ".join(
                f"{np.mean([x[key] for x in runs]):.0%}"
                for key in ("repeated_extracted", "own_extracted")
                if key in runs[0]
            )
            cells = [name, str(len(runs)), spread(held), spread(price, "+.3f"),
                     spread([float(np.mean(x["repeated"])) for x in runs]), spread(closed, ".1%"), spread(own), share,
                     f"{np.mean([x['seconds'] for x in runs]):.0f}"]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: list[Any], form: str = ".3f") -> str:
    if not len(values):
        return "-"
    return f"{np.mean(values):{form}} ± {(max(values) - min(values)) / 2:{form.replace('+', '')}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--texts", nargs="+", default=list(FILES), choices=list(FILES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(arms()), choices=list(arms()), metavar="ARM")
    parser.add_argument("--one", nargs=3, metavar=("TEXT", "ARM", "SEED"))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        readme = HERE / "README.md"
        head = readme.read_text().split("<!-- table -->")[0] if readme.exists() else ""
        readme.write_text(head + "<!-- table -->\n" + table())
    elif arguments.one:
        text, name, seed = arguments.one
        result = json.dumps({"name": name, **run(text, arms()[name], int(seed))})
        target = path_of(text, name, int(seed))
        part = target.with_suffix(".part")
        part.write_text(result)
        part.rename(target)
    else:
        everything(arguments.jobs, arguments.texts, arguments.seeds, arguments.arms)


if __name__ == "__main__":
    main()
