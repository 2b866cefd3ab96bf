"""What `prefix_kept` saves: a fine-tuning step of SmolLM2-135M's shape, the layers below the sinks computed or read.

    python benchmarks/prefix.py            # benchmarks/prefix.json

Random weights; sinks in the upper half of the layers; turns of the two ways in one process, the median of each.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import memsinks as ms
from memsinks._version import versions

SHAPE = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}  # fmt: skip
ROWS, LENGTH, TURNS = 8, 64, 5


def step_seconds(model, optimizer, batch) -> float:
    started = time.process_time()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - started


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    owner = ms.add_owners(model, ["acme"])["acme"]
    optimizer = ms.AdamW(ms.param_groups(model.train(), lr=1e-3))
    tokens = torch.randint(0, SHAPE["vocab_size"], (ROWS, LENGTH))
    batch = {"input_ids": tokens, "labels": tokens, "document_ids": torch.full((ROWS,), owner)}
    seconds: dict[str, list[float]] = {"computed": [], "read, float32": [], "read, bfloat16": []}
    step_seconds(model, optimizer, batch)
    for _ in range(TURNS):
        seconds["computed"].append(step_seconds(model, optimizer, batch))
        for dtype in ("float32", "bfloat16"):
            with ms.prefix_kept(model, dtype=dtype):
                step_seconds(model, optimizer, batch)
                seconds[f"read, {dtype}"].append(step_seconds(model, optimizer, batch))
    medians = {name: statistics.median(x) for name, x in seconds.items()}
    found = {
        "share of the step's time": {name: round(x / medians["computed"], 3) for name, x in medians.items()},
        "CPU seconds a step": {name: round(x, 2) for name, x in medians.items()},
        "bytes a token": {"float32": 4 * SHAPE["hidden_size"], "bfloat16": 2 * SHAPE["hidden_size"]},
        "settings": {"shape": SHAPE, "rows": ROWS, "length": LENGTH, "turns": TURNS, "threads": 1},
        "versions": versions("torch", "transformers"),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["share of the step's time"]))


if __name__ == "__main__":
    main()
