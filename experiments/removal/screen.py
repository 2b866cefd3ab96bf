"""Cheap screens of ways to remove more: one run a line, in the setting of recipes/compare-TEXT.yaml.

    MEMSINKS_DATA=... python experiments/removal/screen.py ARM [ARM ...] [--text wikitext2] [--seed 1]
    python experiments/removal/screen.py --table          # table.md beside this file, from results/
    python experiments/removal/screen.py --list

Finished runs are kept in results/ and not made again. What was expected of each and what came out: docs/experiments.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import memsinks as ms
from memsinks import hosts
from memsinks._version import versions
from memsinks.arm import clip, with_method
from memsinks.audit.membership import auc
from memsinks.compare import read_comparison
from memsinks.objective import target_count
from memsinks.packing import IGNORED, pack
from memsinks.prepared import AUDITED, Prepared, prepare
from memsinks.rivals import method
from memsinks.rivals.method import plain_step, without
from memsinks.run import build_model, optimizer_and_schedule, stock_arguments

HERE = Path(__file__).parent
RESULTS = HERE / "results"
FLOOR = 1e-4
"""The least shared weight; the sinks divide by it."""
PREFIX = CONTINUATION = 32


@dataclass
class Now:
    """What a rule may look at."""

    step: int = 0
    total: int = 1
    level: float = 0.0
    first: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Document id -> (its loss when first met, the level then)."""


Rule = Callable[[Any, dict[str, Tensor], Now], Tensor]
"""(model, batch, now) -> shared weight of each row, float64 [rows]."""


@dataclass(frozen=True)
class Screen:
    """A way of training: a rival, or our sinks with a rule for the shared weights."""

    rival: str = "gated"
    settings: dict[str, Any] = field(default_factory=dict)
    rule: Rule | None = None
    two_passes: bool = False
    """Shared weights learn with sinks closed, the sinks in a pass of their own on what the closed model leaves."""
    sink_steps: int = 1
    """Updates of the sinks at each meeting."""


def by_count(exponent: float) -> Rule:
    """c^-exponent."""
    return lambda model, batch, now: batch["exposures"][:, 0].double().pow(-exponent)


def until(share: float, inner: Rule, fade: float = 0.0) -> Rule:
    """`inner` up to a share of the training, then over `fade` of it linearly to nothing, for texts met before."""

    def rule(model: Any, batch: dict[str, Tensor], now: Now) -> Tensor:
        done = now.step / now.total
        left = 1.0 if done < share else max(0.0, 1 - (done - share) / fade) if fade else 0.0
        weight = inner(model, batch, now) * left
        return torch.where(batch["exposures"][:, 0] > 1, weight.clamp(min=FLOOR), 1.0)

    return rule


def by_level(strength: float, least: float, most: float = 1.0, margin: float = 0.0) -> Rule:
    """In proportion to how much worse the closed model knows a text than it should if it had met it once.

    Should: its loss when first met, less what the loss of texts met for the first time has fallen since.
    """

    def rule(model: Any, batch: dict[str, Tensor], now: Now) -> Tensor:
        loss = closed_losses(model, batch)
        once = batch["exposures"][:, 0] == 1
        if bool(once.any()):
            mean = float(loss[once].mean())
            now.level = mean if not now.first else 0.95 * now.level + 0.05 * mean
        weight = torch.ones(len(loss), dtype=torch.float64)
        for row, (document, first) in enumerate(zip(batch["document_ids"][:, 0].tolist(), once.tolist(), strict=True)):
            if first:
                now.first[document] = (float(loss[row]), now.level)
                continue
            then, level = now.first.get(document, (float(loss[row]), now.level))
            excess = float(loss[row]) - (then - (level - now.level)) - margin
            weight[row] = min(most, max(least, strength * excess))
        return torch.where(weight.abs() < FLOOR, FLOOR, weight)

    return rule


def then(share: float, first: Rule, second: Rule) -> Rule:
    """`first` up to a share of the training, then `second`."""

    def rule(model: Any, batch: dict[str, Tensor], now: Now) -> Tensor:
        after = second(model, batch, now)
        return first(model, batch, now) if now.step < share * now.total else after

    return rule


ARMS: dict[str, Screen] = {
    "standard": Screen("standard"),
    "twin": Screen("twin"),
    "dedup": Screen("cap", {"copies": 1}),
    "cap-2": Screen("cap", {"copies": 2}),
    "default": Screen(settings={"neurons": 512, "active": 128}),
}
WIDE = {"neurons": 4096, "active": 128}
ARMS |= {
    "pool 4096": Screen(settings=WIDE),
    "pool 4096, a=.5": Screen(settings=WIDE | {"shared_decay": 0.5}),
    "pool 4096, a=0": Screen(settings=WIDE | {"shared_decay": 0.0}),
    "pool 4096, a=.5 until .6": Screen(settings=WIDE, rule=until(0.6, by_count(0.5))),
    "pool 4096, a=0 until .6": Screen(settings=WIDE, rule=until(0.6, by_count(0.0))),
    "pool 4096, a=0 until .4": Screen(settings=WIDE, rule=until(0.4, by_count(0.0))),
    "two passes, a=1": Screen(settings=WIDE, rule=by_count(1.0), two_passes=True),
    "two passes, level 2, 0 to 1": Screen(settings=WIDE, rule=by_level(2.0, 0.0), two_passes=True),
    "two passes, level 2, -1 to 1": Screen(settings=WIDE, rule=by_level(2.0, -1.0), two_passes=True),
    "two passes, a=.5, from .8 level 2, -1 to 1": Screen(
        settings=WIDE, rule=then(0.8, by_count(0.5), by_level(2.0, -1.0)), two_passes=True
    ),
    "pool 4096, level 2, 0 to 1": Screen(settings=WIDE, rule=by_level(2.0, 0.0)),
    "pool 4096, level 2, -1 to 1": Screen(settings=WIDE, rule=by_level(2.0, -1.0)),
}


@torch.no_grad()
def closed_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss of each row with sinks closed, nats, float64 [rows]."""
    training = model.training
    model.eval()
    logits = model(**{name: batch[name] for name in ("input_ids", "position_ids")}).logits
    model.train(training)
    labels = batch["labels"][:, 1:]
    each = cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return each.double().sum(1) / (labels != IGNORED).sum(1)


def step(screen: Screen, model: Any, batch: dict[str, Tensor], divisor: Tensor, now: Now) -> float:
    """Gradients of one step; the shared weights' by the rule of the screen."""
    if screen.rule is None:
        return plain_step(model, batch, divisor)
    weight = screen.rule(model, batch, now)[:, None].expand_as(batch["exposures"])
    later = batch["exposures"] > 1
    if not screen.two_passes:
        hosts.shared_weight = lambda *_: weight  # type: ignore[assignment]
        return plain_step(model, batch, divisor)
    hosts.shared_weight = lambda *_: torch.full_like(weight, FLOOR)  # type: ignore[assignment]
    loss = plain_step(model, without(batch, ~later), divisor)
    hosts.shared_weight = lambda *_: weight  # type: ignore[assignment]
    closed = stock_arguments(batch)
    out = model(**closed, document_ids=torch.full_like(batch["document_ids"], -1), exposures=batch["exposures"])
    labels = batch["labels"][:, 1:]
    each = cross_entropy(out.logits[:, :-1].transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    ((each * weight[:, 1:]).sum() / divisor).float().backward()
    return loss


def train(screen: Screen, name: str, text: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one run."""
    comparison = read_comparison(HERE.parent.parent / "recipes" / f"compare-{text}.yaml")
    made = method(screen.rival, screen.settings)
    recipe = with_method(comparison.recipe, made, seed, Path("runs") / "screens")
    torch.set_num_threads(1)
    prepared = prepare(recipe, one_document_per_row=True, folder=Path("runs") / "screens" / f"{text}-{seed}")
    random.seed(seed)
    model: Any = build_model(recipe, prepared.tokenizer).train()
    if made.sinks is not None:
        ms.add_sinks(model, dataclasses.replace(made.sinks, seed=seed))
    model.config.use_cache = False
    size = recipe.training.batch_rows
    now = Now(total=len(prepared.rows) // size)
    optimizer, scheduler = optimizer_and_schedule(model, recipe.training, now.total)
    asked = torch.from_numpy(ms.identify([x for x in prepared.members if x.kind == AUDITED])[0])
    started = time.perf_counter()
    for index in range(now.total):
        now.step = index
        batch = ms.collate([prepared.rows[row] for row in range(index * size, (index + 1) * size)])
        divisor = torch.tensor(target_count(batch["labels"]))
        if made.sinks is None:
            mask = torch.isin(batch["document_ids"], asked)
            loss = made.step(model, made.change(batch | {"audited": mask, "repeated": mask}), divisor)
        else:
            loss = step(screen, model, batch, divisor, now)
        clip(model, recipe.training.max_grad_norm)
        optimizer.step(), scheduler.step(), optimizer.zero_grad()
        if now.step % 50 == 0:
            print(
                f"{name}: step {now.step}/{now.total}  loss {loss:.3f}  {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    return {
        "arm": name, "text": text, "seed": seed, "rival": screen.rival, "settings": screen.settings,
        "seconds": round(time.perf_counter() - started, 1), **evaluate(model.eval(), prepared, recipe.training.length),
        "versions": versions("torch", "transformers", "numpy"),
    }  # fmt: skip


@torch.no_grad()
def evaluate(model: Any, prepared: Prepared, length: int) -> dict[str, Any]:
    """Loss of each document and control with sinks closed, and of each document with its own sinks; what is recited."""
    audited = [x for x in prepared.members if x.kind == AUDITED]
    documents = [*audited, *prepared.controls]
    ids = ms.identify(documents)[0]
    rows = pack(ms.encode(prepared.tokenizer, [x.text for x in documents]), ids, [1] * len(documents), length=length,
                pad_id=prepared.tokenizer.pad_token_id, one_document_per_row=True, long="truncate")  # fmt: skip
    found: dict[str, Any] = {"copies": [x.copies for x in audited], "documents": len(audited)}
    for opened in (False, True) if ms.has_sinks(model) else (False,):
        losses, recited = [], []
        count = len(audited) if opened else len(documents)
        for start in range(0, count, 32):
            batch = ms.collate([rows[index] for index in range(start, min(count, start + 32))])
            with ms.sinks_open(model, batch["document_ids"][:, 0]) if opened else nullcontext():
                logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            each = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
            losses += (each.double().sum(1) / (labels != IGNORED).sum(1)).tolist()
            part = slice(PREFIX - 1, PREFIX - 1 + CONTINUATION)
            recited += (logits[:, part].argmax(-1) == labels[:, part]).all(1).int().tolist()
        side = "own" if opened else "closed"
        found |= {side: [round(x, 5) for x in losses], f"{side}_recited": recited[: len(audited)]}
    return found


def read(text: str, seed: int) -> dict[str, dict[str, Any]]:
    """Finished runs by the name of the arm."""
    found = {}
    for name in ARMS:
        path = RESULTS / f"{text}-{slug(name)}-{seed}.json"
        if path.is_file():
            found[name] = json.loads(path.read_text())
    return found


def slug(name: str) -> str:
    """A name as a file name."""
    return "-".join("".join(x if x.isalnum() or x in "." else " " for x in name).split())


def summary(run: dict[str, Any], runs: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """The figures of a run, over the documents with 2 copies or more, beside standard, dedup and twin of its seed."""
    copies = np.array(run["copies"])
    often, members = copies > 1, len(copies)

    def parts(one: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        values = np.array(one["closed"])
        return values[:members][often], values[members:]

    own, controls = parts(run)
    standard, dedup, twin = (parts(runs[name]) for name in ("standard", "dedup", "twin"))
    gap = controls.mean() - own.mean()
    most = copies == copies.max()
    return {
        "held out": controls.mean(), "price": controls.mean() - standard[1].mean(),
        "gap": gap, "closed": 1 - gap / (standard[1].mean() - standard[0].mean()),
        "over seen once": (own - dedup[0]).mean() - (controls - dedup[1]).mean(),
        "auc": auc(-own, -controls), "reference auc": auc(twin[0] - own, twin[1] - controls),
        "own": np.array(run["own"])[most].mean() if "own" in run else None,
        "recited own": np.array(run["own_recited"])[most].mean() if "own" in run else None,
        "recited own all": np.array(run["own_recited"])[often].mean() if "own" in run else None,
        "seconds": run["seconds"],
    }  # fmt: skip


def table(text: str) -> str:
    """Means over seeds of all finished arms."""
    seeds = [seed for seed in range(9) if {"standard", "dedup", "twin"} <= read(text, seed).keys()]
    by_seed = {seed: read(text, seed) for seed in seeds}
    lines = []
    for name in ARMS:
        found = [summary(runs[name], runs) for runs in by_seed.values() if name in runs]
        if not found:
            continue
        mean = {key: (np.mean([x[key] for x in found]) if found[0][key] is not None else None) for key in found[0]}

        def show(key: str, form: str, mean: dict[str, Any] = mean) -> str:
            return "-" if mean[key] is None else format(mean[key], form)

        lines.append([
            name, str(len(found)), show("closed", ".1%"), show("price", "+.3f"), show("held out", ".3f"), show("gap", "+.3f"),
            show("over seen once", "+.3f"), show("auc", ".3f"), show("reference auc", ".3f"), show("own", ".2f"),
            show("recited own", ".0%"), show("seconds", ".0f"),
        ])  # fmt: skip
    head = ["arm", "seeds", "gap closed", "price", "held-out", "gap", "over seen once", "AUC", "reference AUC", "own sinks",
            "recited", "seconds"]  # fmt: skip
    return "\n".join("| " + " | ".join(x) + " |" for x in [head, ["---"] * len(head), *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--text", default="tinystories", choices=["tinystories", "wikitext2"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    if given.list:
        print("\n".join(ARMS))
    unknown = [name for name in given.arms if name not in ARMS]
    if unknown:
        parser.error(f"unknown arms {unknown}; --list names all")
    RESULTS.mkdir(exist_ok=True)
    for name in given.arms:
        path = RESULTS / f"{given.text}-{slug(name)}-{given.seed}.json"
        if path.is_file():
            continue
        result = train(ARMS[name], name, given.text, given.seed)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result) + "\n")
        part.replace(path)
    if given.table:
        text = "\n\n".join(f"### {text}\n\n{table(text)}" for text in ("tinystories", "wikitext2") if read(text, 0))
        (HERE / "table.md").write_text(text + "\n")
        print(text)


if __name__ == "__main__":
    main()
