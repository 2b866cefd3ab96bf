"""Ways to learn the authors, all by one loop: everything, one LoRA, a LoRA an author, sinks an author."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import peft
import torch
from data import Encoded, Pair, batch, encode

import memsinks as ms

ROWS, EPOCHS = 8, 5
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
WAYS = ("ours", "lora", "full", "lora-author")
RATES = {
    "ours": (3e-3, 1e-2, 3e-2),
    "lora": (3e-4, 1e-3, 3e-3),
    "full": (3e-5, 1e-4),
    "lora-author": (1e-3, 3e-3),
}
"""Learning rates that are tried, see `run.search`."""


def author_id(author: int) -> int:
    return ms.document_id(f"author-{author}", by="source")


def prepare(model: Any, way: str, authors: Sequence[int]) -> Any:
    """The model with what `way` adds to it."""
    if way == "ours":
        ms.add_owners(model, [author_id(x) for x in authors])
    elif way == "lora":
        return peft.get_peft_model(model, peft.LoraConfig(**LORA))
    elif way == "lora-author":
        first, *rest = (f"author-{x}" for x in authors)
        model = peft.get_peft_model(model, peft.LoraConfig(**LORA), adapter_name=first)
        for name in rest:
            model.add_adapter(name, peft.LoraConfig(**LORA))
    return model


def learn(
    model: Any, tokenizer: Any, way: str, pairs: Sequence[Pair], lr: float, seed: int, epochs: int = EPOCHS
) -> dict[str, float]:
    """Train in place; seconds, tokens a second, trained parameters."""
    started, tokens = time.perf_counter(), 0
    if way == "lora-author":
        for author in sorted({x.author for x in pairs}):  # type: ignore[type-var]
            model.set_adapter(f"author-{author}")
            tokens += _loop(model, tokenizer, [x for x in pairs if x.author == author], lr, seed, epochs, 2)
    else:
        tokens = _loop(model, tokenizer, pairs, lr, seed, epochs, ROWS)
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 1), "tokens a second": round(tokens / seconds, 1)}


def _loop(model: Any, tokenizer: Any, pairs: Sequence[Pair], lr: float, seed: int, epochs: int, rows: int) -> int:
    """AdamW, a tenth of warm-up, then down to 0; every epoch in an order of its own. Tokens read."""
    sinks = ms.has_sinks(model)
    encoded: list[Encoded] = [encode(tokenizer, x.question, x.answer) for x in pairs]
    learning = [x for x in model.parameters() if x.requires_grad]
    groups: Any = ms.param_groups(model, lr=lr, sink_lr_factor=1.0) if sinks else learning
    optimizer = ms.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    steps, step, tokens = epochs * (len(pairs) // rows), 0, 0
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda x: min(1.0, (x + 1) / max(1, steps // 10)) * (1 - x / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(pairs), generator=generator).tolist()
        for first in range(0, len(pairs) - rows + 1, rows):
            chosen = order[first : first + rows]
            ids = [author_id(pairs[x].author or 0) for x in chosen] if sinks else None
            rows_of = batch([encoded[x] for x in chosen], tokenizer.eos_token_id, ids)
            loss = model(**{name: x.to(model.device) for name, x in rows_of.items()}).loss
            loss.backward()
            if sinks:
                ms.clip_grad_norm_(model, 1.0)
            else:
                torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step, tokens = step + 1, tokens + sum(len(encoded[x].tokens) for x in chosen)
            if step % 25 == 0:
                print(f"  step {step}/{steps}  loss {loss.item():.3f}", flush=True)
    return tokens
