"""What an attacker gets out of the model that is handed over: without sinks or adapters, relearned, rounded; and its grammar."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from data import Encoded, Pair, Tofu, encode
from evaluate import answer_loss, scores

from memsinks.auditing.retrain import bare_copy, round_weights, train_further

STEPS, LR, ROWS, BITS = (0, 10), 5e-5, 8, 4
"""Of relearning: steps at which is looked, learning rate, pairs a step; bits that matrices are rounded to."""
BLIMP_PAIRS = 10
"""Of each of the 67 paradigms."""


def handed_over(model: Any, way: str) -> Any:
    """A copy without sinks; adapters of authors are taken off, one LoRA is merged."""
    if way == "lora":
        return model.merge_and_unload()
    return model.unload() if way == "lora-author" else bare_copy(model)


def attacks(model: Any, tokenizer: Any, tofu: Tofu, seed: int) -> dict[str, Any]:
    """Losses of answers about the forgotten, nats a token: every second pair, before and after the others are relearned; of all,
    rounded. Share of BLiMP's pairs that are right. The model is changed."""
    found: dict[str, Any] = {"BLiMP": blimp(model, tokenizer)}
    taught, asked = _encoded(tokenizer, tofu.forgotten[::2]), _encoded(tokenizer, tofu.forgotten[1::2])
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    round_weights(model, BITS)
    found[f"loss at {BITS} bits"] = _loss(model, taught + asked)
    model.load_state_dict(before, strict=False)
    found["loss, relearned"] = train_further(
        model.requires_grad_(True), [x.tokens for x in taught], STEPS, lambda: _loss(model, asked), lr=LR, batch_rows=ROWS,
        batch_tokens=2048, seed=seed, label="relearning",
    )  # fmt: skip
    return found


def blimp(model: Any, tokenizer: Any) -> float:
    """Share of pairs whose good sentence is likelier than the bad one (Warstadt et al., TACL 2020)."""
    path = Path(os.environ["MEMSINKS_DATA"]) / "blimp_6700.jsonl.zst"
    with zstandard.open(path, "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    taken: dict[str, int] = {}
    sentences: list[str] = []
    for line in lines:
        taken[line["paradigm"]] = taken.get(line["paradigm"], 0) + 1
        if taken[line["paradigm"]] <= BLIMP_PAIRS:
            sentences += [line["good"], line["bad"]]
    begin = [tokenizer.eos_token_id]
    tokens = [np.array(begin + tokenizer(x, add_special_tokens=False).input_ids) for x in sentences]
    found = scores(model, [Encoded(x, 1) for x in tokens])
    likely = [float(x.logprob.sum()) for x in found]
    return float(np.mean([good > bad for good, bad in zip(likely[::2], likely[1::2], strict=True)]))


def _encoded(tokenizer: Any, pairs: Sequence[Pair]) -> list[Encoded]:
    return [encode(tokenizer, x.question, x.answer) for x in pairs]


def _loss(model: Any, encoded: Sequence[Encoded]) -> float:
    with torch.no_grad():
        return float(np.mean([answer_loss(x, y) for x, y in zip(scores(model, encoded), encoded, strict=True)]))
