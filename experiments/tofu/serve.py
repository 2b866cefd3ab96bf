"""What it costs to answer eight owners in one batch: sinks of each, a LoRA of each, the base alone; median ratios of turns.

OMP_NUM_THREADS=1 python experiments/tofu/serve.py SmolLM2-135M-Instruct.Q4_1.gguf     # writes serve.json beside this file
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from train import LORA

import memsinks as ms
from memsinks._version import versions

sys.path.insert(0, str(Path(__file__).parent.parent))
from owners.run import load

OWNERS, PROMPT, NEW, TURNS = 8, 24, 24, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    path = parser.add_argument("model", type=Path) and parser.parse_args().model
    torch.set_num_threads(1)
    names = [f"owner-{x}" for x in range(OWNERS)]
    sinks, tokenizer = load(path)
    owners = ms.add_owners(sinks.eval(), names)
    model = load(path)[0]
    lora = peft.get_peft_model(model, peft.LoraConfig(**LORA), adapter_name=names[0])
    for name in names[1:]:
        lora.add_adapter(name, peft.LoraConfig(**LORA))
    lora.eval()
    tokens = torch.randint(100, 10_000, (OWNERS, PROMPT), generator=torch.Generator().manual_seed(0))
    settings = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "pad_token_id": tokenizer.eos_token_id,
    }

    def opened() -> None:
        with ms.sinks_open(sinks, torch.tensor(list(owners.values()))):
            sinks.generate(**settings)

    ways: dict[str, Callable[[], object]] = {
        "base": lambda: sinks.generate(**settings),
        "sinks of eight owners": opened,
        "LoRA of eight owners": lambda: lora.generate(**settings, adapter_names=names),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    result = {
        "batch": OWNERS,
        "prompt": PROMPT,
        "new tokens": NEW,
        "times the base": {
            name: round(statistics.median(x / y for x, y in zip(own, seconds["base"], strict=True)), 2)
            for name, own in seconds.items()
        },
        "bytes an owner": {
            "sinks": 4 * sum(x[0].numel() for name, x in sinks.named_parameters() if ".sinks." in name),
            "LoRA": 4 * sum(x.numel() for name, x in lora.named_parameters() if f".{names[0]}." in name),
        },
        "versions": versions("torch", "transformers", "peft"),
    }
    (Path(__file__).parent / "serve.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
