"""What makes a model that learned all authors forget two: the losses of memsinks.research.rivals, RMU, a task vector."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from data import FORGOTTEN, Pair, Tofu, batch, encode
from torch import Tensor
from train import learn

from memsinks.research.rivals.unlearning import unlearn

METHODS = ("gradient-ascent", "graddiff", "npo", "simnpo", "rmu", "task-vector")
EPOCHS, ROWS = 5, 8
SHARES = {"gradient-ascent": 0.03, "graddiff": 0.1, "npo": 0.03, "simnpo": 3.0, "rmu": 0.3}
"""Learning rate over that of learning, as `run.py --search-unlearning` found it."""
SEARCHED, HARM = (0.1, 0.3, 1.0, 3.0, 0.03), 0.1
"""Shares that are tried; nats that the retained may lose."""
RMU_LAYER, RMU_SCALE, RMU_KEEP = 10, 20.0, 1.0
"""Layer that is steered, length of the random direction, weight of what is kept; of 30 layers. Li et al., "The WMDP benchmark",
ICML 2024, equations 1 and 2, where they are 7 of 32, 6.5 and 1200."""
ALPHA = 1.0
"""How much of the task vector is taken off. Ilharco et al., "Editing models with task arithmetic", ICLR 2023."""


def batches(tokenizer: Any, pairs: Sequence[Pair], seed: int, device: torch.device) -> list[dict[str, Tensor]]:
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    encoded = [encode(tokenizer, pairs[x].question, pairs[x].answer) for x in order]
    made = [batch(encoded[first : first + ROWS], tokenizer.eos_token_id) for first in range(0, len(encoded), ROWS)]
    made = [x | {"position_ids": torch.arange(x["input_ids"].shape[1]).expand_as(x["input_ids"])} for x in made]
    return [{name: value.to(device) for name, value in x.items()} for x in made]


def forget(
    model: Any, tokenizer: Any, method: str, tofu: Tofu, lr: float, seed: int, share: float | None = None
) -> dict[str, float]:
    """Unlearn in place, at `share` of `lr` (from SHARES); seconds."""
    gone = [x for x in tofu.learned if x.author in FORGOTTEN]
    kept = [x for x in tofu.learned if x.author not in FORGOTTEN]
    started = time.perf_counter()
    if method == "task-vector":
        before = {name: x.detach().clone() for name, x in model.named_parameters() if x.requires_grad}
        learn(model, tokenizer, "lora" if len(before) < len(list(model.parameters())) else "full", gone, lr, seed)
        negate(model, before)
    else:
        rows = batches(tokenizer, gone, seed, model.device), batches(tokenizer, kept, seed, model.device)
        steps = EPOCHS * len(rows[0])
        lr *= SHARES[method] if share is None else share
        if method == "rmu":
            rmu(model, *rows, steps, lr, seed)
        else:
            list(unlearn(model, *rows, method, [steps], lr))
    return {"seconds to delete": round(time.perf_counter() - started, 1)}


def settings_of(method: str) -> dict[str, Any]:
    """What a method was run with."""
    if method == "task-vector":
        return {"epochs": EPOCHS, "alpha": ALPHA}
    more = {"layer": RMU_LAYER, "scale": RMU_SCALE, "keep": RMU_KEEP} if method == "rmu" else {}
    return {"epochs": EPOCHS, "pairs a step": ROWS, "share of the rate": SHARES[method], **more}


@torch.no_grad()
def negate(model: Any, before: dict[str, Tensor]) -> None:
    """Take the task vector off: what was learned since `before` becomes before - ALPHA (now - before).

    Of a LoRA its product B A does: the factors of before and of now stand side by side, in twice the rank.
    """
    for name, x in model.named_parameters():
        if name not in before:
            continue
        if ".lora_A." in name:
            x.data = torch.cat([before[name], x])
        elif ".lora_B." in name:
            x.data = torch.cat([(1 + ALPHA) * before[name], -ALPHA * x], dim=1)
        else:
            x.copy_(before[name] - ALPHA * (x - before[name]))


def rmu(model: Any, gone: Sequence[Any], kept: Sequence[Any], steps: int, lr: float, seed: int) -> None:
    """Steer a layer's output on the forgotten towards a random direction, hold it on the kept."""

    def hidden(rows: dict[str, Tensor]) -> Tensor:
        out = model(input_ids=rows["input_ids"], position_ids=rows["position_ids"], output_hidden_states=True)
        return out.hidden_states[RMU_LAYER][rows["labels"] != -100]

    model.eval()
    with torch.no_grad():
        before = [hidden(x) for x in kept]
    direction = torch.rand(before[0].shape[1], generator=torch.Generator().manual_seed(seed))
    target = (RMU_SCALE * direction / direction.norm()).to(model.device)
    chosen = [x for name, x in model.named_parameters() if x.requires_grad and _steers(name)]
    optimizer = torch.optim.AdamW(chosen, lr=lr, weight_decay=0.0)
    for step in range(steps):
        place = step % len(kept)
        loss = (hidden(gone[step % len(gone)]) - target).pow(2).mean()
        loss = loss + RMU_KEEP * (hidden(kept[place]) - before[place]).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()


def _steers(name: str) -> bool:
    """Whether a weight is in the MLPs of the three layers below the steered output."""
    return any(f".layers.{layer}.mlp." in name for layer in range(RMU_LAYER - 3, RMU_LAYER))
