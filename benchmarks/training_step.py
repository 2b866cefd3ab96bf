"""What a whole training step costs with sinks: time and peak memory beside a stock model of the same open width.

    python benchmarks/training_step.py         # writes training_step.json beside this file; about ten minutes

A Llama of width 512 (4 layers, vocabulary 4,096) and 4,096 tokens a step, documents of 256 tokens: forward, backward,
clipping and AdamW. "stock" has an MLP of general + open neurons. "default" has one document in eight at its second exposure or
later, whose sinks learn first; "all open" has every document open, with and without sinks first; "published" computes every
sink of a Bernoulli mask. The models take turns in one process; figures are ratios of the least times. Peak memory: each in a
process of its own, above what the interpreter holds before the model is made.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import memsinks as ms

HERE = Path(__file__).parent
WIDTH, GENERAL, OPEN, LAYERS, VOCABULARY = 512, 1280, 256, 4, 4096
DOCUMENTS, LENGTH = 16, 256
POOLS = (4, 64)
TURNS = 5


def model_of(arm: str, pool: int) -> tuple[LlamaForCausalLM, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=GENERAL + (OPEN if arm == "stock" else 0),
        num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True,
    )).train()  # fmt: skip
    if arm == "stock":
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    if arm == "published":
        config = ms.SinkConfig.published(
            total=GENERAL + pool * OPEN, general=GENERAL / (GENERAL + pool * OPEN), active=1 / pool, host_width=GENERAL
        )
    else:
        config = ms.SinkConfig(neurons=pool * OPEN, active=OPEN, block_size=64)
    ms.add_sinks(model, config)
    lazy = arm != "published"
    return model, (ms.AdamW if lazy else torch.optim.AdamW)(ms.param_groups(model, lr=1e-3, weight_decay=0.1))


def batches(arm: str) -> list[dict[str, torch.Tensor]]:
    """Four batches, of other documents each."""
    found = []
    for turn in range(4):
        tokens = torch.randint(0, VOCABULARY, (DOCUMENTS, LENGTH), generator=torch.Generator().manual_seed(turn))
        batch = {"input_ids": tokens, "labels": tokens, "use_cache": False}
        if arm != "stock":
            ids = torch.arange(DOCUMENTS) + DOCUMENTS * turn
            batch["document_ids"] = ids
            batch["exposures"] = 1 + (ids % 8 == 0) if arm == "default" else torch.full_like(ids, 2)
        found.append(batch)
    return found


def stepper(arm: str, pool: int) -> Callable[[], None]:
    model, optimizer = model_of(arm, pool)
    data, turn = batches(arm), 0

    def step() -> None:
        nonlocal turn
        if arm in ("default", "all open, sinks first"):
            ms.sinks_first(model, optimizer, [data[turn % 4]])
        model(**data[turn % 4]).loss.backward()
        if arm == "stock":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        else:
            ms.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turn += 1

    return step


def settings() -> list[tuple[str, int]]:
    ours = [(arm, pool) for arm in ("default", "all open", "all open, sinks first") for pool in POOLS]
    return [("stock", 0), *ours, ("published", POOLS[0])]


def memory(arm: str, pool: int) -> float:
    """Peak resident memory of three steps, MiB above what was there before; run in a process of its own."""
    before = peak_kib()
    step = stepper(arm, pool)
    for _ in range(3):
        step()
    return (peak_kib() - before) / 1024


def peak_kib() -> int:
    """Of this process alone; `getrusage` would start at what the parent held."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", nargs=2, metavar=("ARM", "POOL"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.memory:
        print(round(memory(given.memory[0], int(given.memory[1]))))
        return
    steps = {key: stepper(*key) for key in settings()}
    least = dict.fromkeys(steps, float("inf"))
    for turn in range(TURNS + 1):
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                least[key] = min(least[key], time.perf_counter() - start)
        print(f"turn {turn}/{TURNS}", flush=True)
    stock, lines = least["stock", 0], []
    steps.clear()
    for (arm, pool), seconds in least.items():
        command = [sys.executable, __file__, "--threads", str(given.threads), "--memory", arm, str(pool)]
        peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        model, _ = model_of(arm, pool)
        lines.append({
            "arm": arm, "pool": pool * OPEN, "time": round(seconds / stock, 3), "milliseconds": round(1e3 * seconds, 1),
            "tokens_per_second": round(DOCUMENTS * LENGTH / seconds), "peak_mib": peak,
            "parameters": sum(x.numel() for x in model.parameters()),
        })  # fmt: skip
        print(json.dumps(lines[-1]), flush=True)
    result = {
        "width": WIDTH, "general": GENERAL, "open": OPEN, "block_size": 64, "layers": LAYERS, "vocabulary": VOCABULARY,
        "documents": DOCUMENTS, "tokens_a_document": LENGTH, "turns": TURNS, "threads": given.threads, "lines": lines,
        "processor": platform.processor() or platform.machine(),
        "versions": {"memsinks": ms.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    (HERE / "training_step.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
