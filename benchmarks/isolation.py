"""What does a row cost that trains its sinks alone, beside one that trains everything?

    python benchmarks/isolation.py     # writes isolation.json beside this file; about two minutes

Llama of width 512, 4 layers, 16 rows of 256 tokens, 4,096 sinks a layer of which 128 are open, float32, one thread. A step
(forward, backward, clipping, AdamW) on rows met once, on exact rows met again, on private rows, and with half of each, in turns;
medians.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import memsinks as ms
from memsinks._version import versions
from memsinks.batch import ISOLATIONS

ROWS, LENGTH, TURNS = 16, 256, 7


def batch(private: int, exposure: int) -> dict[str, torch.Tensor]:
    """The first `private` rows private, the others at this exposure."""
    tokens = torch.randint(0, 4096, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    flags = torch.where(torch.arange(ROWS) < private, ISOLATIONS["private"], 0)
    return {
        "input_ids": tokens, "labels": tokens, "document_ids": torch.arange(ROWS), "isolation": flags,
        "exposures": torch.full((ROWS,), exposure),
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096, hidden_size=512, intermediate_size=1280, num_hidden_layers=4, num_attention_heads=8
        )
    )
    ms.add_sinks(model, ms.SinkConfig(neurons=4096, active=128))
    optimizer = ms.AdamW(ms.param_groups(model, 1e-4))
    model.train()
    kinds = {
        "met once": batch(0, 1),
        "exact, met again": batch(0, 2),
        "private": batch(ROWS, 1),
        "half private": batch(ROWS // 2, 1),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(TURNS):
        for name, rows in kinds.items():
            started = time.perf_counter()
            model(**rows).loss.backward()
            ms.clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            times[name].append(time.perf_counter() - started)
    base = statistics.median(times["met once"])
    result = {
        "ratio to rows met once": {name: round(statistics.median(x) / base, 2) for name, x in times.items()},
        "seconds a step, rows met once": round(base, 2), "machine": f"{platform.machine()}, one thread",
        "versions": versions("torch", "transformers"),
    }  # fmt: skip
    (Path(__file__).parent / "isolation.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
