"""What the lazy AdamW of the sinks costs and does: time against AdamW over the open blocks alone, loss against AdamW.

    python benchmarks/optimizer.py             # writes optimizer.json beside this file; about four minutes

Time: one update of a pool of blocks [blocks, 64, 512] of which some are open, lazily, by torch's AdamW over the whole pool,
and by torch's AdamW over a parameter that holds the open blocks only; they take turns, least times. Loss: the same small run
on the built-in corpus with the sinks updated lazily and by torch's AdamW; held-out loss with sinks closed, loss of the
records seen 64 times with their own sinks and closed.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch

import memsinks as ms
from memsinks.batch import target_count
from memsinks.runs.model import build_model
from memsinks.runs.prepare import prepare

HERE = Path(__file__).parent
TURNS = 9


def times() -> list[dict]:
    lines = []
    for blocks, opened in ((64, 64), (64, 16), (512, 16), (512, 64)):
        generator = torch.Generator().manual_seed(0)
        which = torch.randperm(blocks, generator=generator)[:opened]
        small = torch.randn(opened, 64, 512, generator=generator)

        def parameter(count: int, gradient: torch.Tensor) -> torch.nn.Parameter:
            made = torch.nn.Parameter(torch.zeros(count, 64, 512))
            made.grad = gradient
            return made

        whole = torch.zeros(blocks, 64, 512)
        whole[which] = small
        optimizers = {
            "lazy": ms.AdamW([{"params": [parameter(blocks, whole)], "lazy": True}], weight_decay=0.0),
            "whole": torch.optim.AdamW([parameter(blocks, whole.clone())], weight_decay=0.0),
            "open only": torch.optim.AdamW([parameter(opened, small)], weight_decay=0.0),
        }
        least = dict.fromkeys(optimizers, float("inf"))
        for turn in range(TURNS + 1):
            for name, optimizer in optimizers.items():
                start = time.perf_counter()
                optimizer.step()
                if turn:
                    least[name] = min(least[name], time.perf_counter() - start)
        base = least["open only"]
        lines.append({
            "blocks": blocks, "open": opened, "open_only_ms": round(1e3 * base, 3),
            "lazy": round(least["lazy"] / base, 3), "whole": round(least["whole"] / base, 3),
        })  # fmt: skip
        print(json.dumps(lines[-1]), flush=True)
    return lines


def losses(lazy: bool) -> dict[str, float]:
    recipe = ms.parse_recipe({
        "output": "unused", "data": {"synthetic": {"stories": 900, "people_per_level": 8, "people_once": 150}},
        "tokenizer": {"vocab_size": 1024}, "sinks": {"neurons": 512, "active": 128, "shared_decay": 1.0},
        "model": {"config": {
            "model_type": "llama", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True,
        }},
        "training": {"length": 192, "batch_rows": 6, "lr": 3e-3},
    })  # fmt: skip
    prepared = prepare(recipe)
    model = build_model(recipe, prepared.tokenizer).train()
    groups = ms.param_groups(model, recipe.training.lr, recipe.training.weight_decay)
    optimizer = (ms.AdamW if lazy else torch.optim.AdamW)(groups, betas=(0.9, 0.95))
    steps = len(prepared.rows) // recipe.training.batch_rows
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [x["lr"] for x in groups], total_steps=steps, pct_start=0.05
    )
    for step in range(steps):
        batch = ms.collate([prepared.rows[step * 6 + row] for row in range(6)])
        model(**batch, num_items_in_batch=torch.tensor(target_count(batch["labels"]))).loss.backward()
        ms.clip_grad_norm_(model, 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        if step % 50 == 0:
            print(f"{'lazy' if lazy else 'torch'}: step {step}/{steps}", flush=True)
    model.eval()
    often = [x for x in prepared.members if x.copies == 64]

    def loss(documents: list[ms.Document], opened: bool) -> float:
        ids = ms.identify(documents)[0]
        found = []
        for tokens, own in zip(ms.encode(prepared.tokenizer, [x.text for x in documents]), ids, strict=True):
            batch = torch.from_numpy(np.asarray(tokens, dtype=np.int64))[None, : recipe.training.length]
            with torch.no_grad(), ms.sinks_open(model, int(own) if opened else ms.NO_SINKS):
                found.append(float(model(input_ids=batch, labels=batch).loss))
        return round(float(np.mean(found)), 4)

    return {
        "held_out": loss(prepared.controls[:200], False), "repeated_own_sinks": loss(often, True),
        "repeated_closed": loss(often, False), "steps": steps,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    result = {
        "time": times(), "loss": {"lazy": losses(True), "torch": losses(False)}, "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "versions": {"memsinks": ms.__version__, "torch": torch.__version__},
    }  # fmt: skip
    (HERE / "optimizer.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["loss"]))


if __name__ == "__main__":
    main()
