"""What does an audit's pass cost beside a bare forward, and does its memory grow with the documents?

    python benchmarks/audit.py            # writes audit.json beside this file; about 10 minutes on 2 cores

Speed: a GPT-2 of hidden size 768 (12 layers, vocabulary 50,257, random weights), 256 tokens a document. The pass of
`score` and a loop that calls the model on the very same batches and computes the loss alternate, chunk by chunk; the
figure is the ratio of their tokens/s. Memory: peak resident memory of a whole audit of a small model in a fresh process,
over 2,000 and over 10,000 documents of 200 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

import memsinks as ms
from memsinks.auditing.scores import LOGITS, score

HERE = Path(__file__).parent
LENGTH, ROUNDS, PER_ROUND = 256, 7, 16


def speed() -> dict[str, object]:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    rng = np.random.default_rng(0)
    rows = max(1, LOGITS // model.config.vocab_size // LENGTH)

    def bare(documents: list[np.ndarray]) -> None:
        with torch.no_grad():
            for at in range(0, len(documents), rows):
                batch = torch.from_numpy(np.stack(documents[at : at + rows]).astype(np.int64))
                float(model(input_ids=batch, labels=batch, use_cache=False).loss)

    def ours(documents: list[np.ndarray]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            score(model, documents, Path(folder) / "scores")

    seconds: dict[str, list[float]] = {"bare": [], "score": []}
    for turn in range(ROUNDS + 1):
        documents = list(rng.integers(0, 50_257, (PER_ROUND, LENGTH), dtype=np.int32))
        for name, run in (("bare", bare), ("score", ours)) if turn % 2 else (("score", ours), ("bare", bare)):
            start = time.perf_counter()
            run(documents)
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
        print(f"turn {turn}/{ROUNDS}", flush=True)
    tokens = PER_ROUND * LENGTH
    ratios = sorted(a / b for a, b in zip(seconds["bare"], seconds["score"], strict=True))
    return {
        "hidden_size": 768, "layers": 12, "vocabulary": 50_257, "length": LENGTH, "rows_a_batch": rows,
        "threads": torch.get_num_threads(),
        "tokens_per_second": {name: round(tokens / statistics.median(x)) for name, x in seconds.items()},
        "ratio": round(statistics.median(ratios), 3), "ratio_least_and_most": [round(ratios[0], 3), round(ratios[-1], 3)],
    }  # fmt: skip


def audited(documents: int) -> None:
    """One audit in this process; prints its peak resident memory in MiB."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))
    texts = ["".join(x) for x in letters[rng.integers(0, 27, (documents + 200, 199))]]
    tokenizer = ms.train_tokenizer(texts[:50], 257)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip
    sides = [ms.Document(x) for x in texts[:documents]], [ms.Document(x) for x in texts[documents:]]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    ms.audit(model, *sides, tokenizer, settings=ms.AuditSettings(generate=0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({
        "documents": documents, "before_mib": round(before), "peak_mib": round(peak),
        "seconds": round(time.perf_counter() - start, 1),
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audited", type=int)
    arguments = parser.parse_args()
    if arguments.audited:
        audited(arguments.audited)
        return
    memory = []
    for documents in (2_000, 10_000):
        done = subprocess.run(
            [sys.executable, __file__, "--audited", str(documents)], capture_output=True, text=True, check=True
        )
        memory.append(json.loads(done.stdout.splitlines()[-1]))
        print(memory[-1], flush=True)
    result = {
        "speed": speed(), "memory": memory, "device": "cpu", "processor": platform.processor() or platform.machine(),
        "versions": {"memsinks": ms.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    (HERE / "audit.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
