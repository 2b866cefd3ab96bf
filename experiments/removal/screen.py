"""Cheap screens of ways to remove more: one run a line, in the setting of recipes/compare-TEXT.yaml.

    MEMSINKS_DATA=... python experiments/removal/screen.py ARM [ARM ...] [--text wikitext2] [--seed 1]
    python experiments/removal/screen.py --table          # table.md beside this file, from results/
    python experiments/removal/screen.py --list

Finished runs are kept in results/ and not made again. What was expected of each and what came out: experiments/LOG.md.
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
from memsinks._version import versions
from memsinks.auditing.membership import auc
from memsinks.batch import IGNORED, stock_arguments
from memsinks.data.packing import pack
from memsinks.research.compare.arm import with_method
from memsinks.research.compare.comparison import read_comparison
from memsinks.research.rivals.method import without
from memsinks.research.rivals.registry import method
from memsinks.runs.corpus import AUDITED
from memsinks.runs.model import build_model
from memsinks.runs.prepare import PreparedCorpus, prepare
from memsinks.runs.run import micro_batches
from memsinks.sinks import host_classes as hosts
from memsinks.sinks.routing import splitmix64
from memsinks.training.evaluate import batches, row_losses
from memsinks.training.loop import Training, plain_step, steps

HERE = Path(__file__).parent
RESULTS = HERE / "results"
RUNS = Path("runs") / "screens"
KEPT = RUNS / "models"
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
    content: int = 0
    """Sinks are opened by the last so many tokens instead of the document; 0 = by the document."""
    lazy: bool = True
    """Sink blocks without gradient do not move; False = they do, by their moments."""
    epochs: int = 0
    """Every document equally often, so many times, instead of some of them repeated; 0 = as the recipe has it."""
    base: str = ""
    """Trains nothing: settles the model of this arm."""
    settle: dict[str, Any] = field(default_factory=dict)


def by_count(exponent: float) -> Rule:
    """c^-exponent."""
    return lambda model, batch, now: batch["exposures"][:, 0].double().pow(-exponent)


def until(share: float, inner: Rule) -> Rule:
    """`inner` up to a share of the training, then nothing, for texts met before."""

    def rule(model: Any, batch: dict[str, Tensor], now: Now) -> Tensor:
        left = 1.0 if now.step < share * now.total else 0.0
        weight = inner(model, batch, now) * left
        return torch.where(batch["exposures"][:, 0] > 1, weight.clamp(min=FLOOR), 1.0)

    return rule


def content_ids(batch: dict[str, Tensor], last: int) -> Tensor:
    """An id for each position from its `last` tokens, its own included; int64 [rows, length], -1 at padding."""
    ids = torch.zeros_like(batch["input_ids"])
    for back in range(last):
        shifted = torch.nn.functional.pad(batch["input_ids"], (back, 0), value=-1)[:, : ids.shape[1]]
        ids = splitmix64(ids ^ splitmix64(shifted))
    return torch.where(batch["document_ids"] >= 0, ids & (2**63 - 1), batch["document_ids"])


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


WIDE = {"neurons": 4096, "active": 128, "shared_decay": 1.0}
HALF = WIDE | {"shared_decay": 0.5}
SETTLE = {"lr": 2e-4, "passes": 8}
EPOCHS = {"lr": 2e-4, "passes": 1, "unseen": True}
ARMS = {
    "standard": Screen("standard"),
    "twin": Screen("twin"),
    "dedup": Screen("cap", {"copies": 1}),
    "default": Screen(settings=WIDE | {"neurons": 512}),
    "pool 4096": Screen(settings=WIDE),
    "pool 4096, a=.5": Screen(settings=HALF),
    "pool 4096, a=0": Screen(settings=WIDE | {"shared_decay": 0.0}),
    "cap-8": Screen("cap", {"copies": 8}),
    "pool 4096, a=0 until .6": Screen(settings=WIDE, rule=until(0.6, by_count(0.0))),
    "pool 4096, a=.5 until .8": Screen(settings=WIDE, rule=until(0.8, by_count(0.5))),
    "two passes, level 2, -1 to 1": Screen(settings=WIDE, rule=by_level(2.0, -1.0), two_passes=True),
    "pool 4096, a=0, lr x10": Screen(settings=WIDE | {"shared_decay": 0.0, "sink_lr_factor": 10.0}),
    "pool 4096, a=.5, sinks first": Screen(settings=HALF | {"sinks_first": True}),
    "pool 4096, a=.5, block 8": Screen(settings=HALF | {"block_size": 8}),
    "pool 4096, a=.5, block 128": Screen(settings=HALF | {"block_size": 128}),
    "pool 4096, a=.5, open 64": Screen(settings=HALF | {"active": 64}),
    "pool 4096, a=.5, open 256": Screen(settings=HALF | {"active": 256}),
    "pool 16384, a=.5": Screen(settings=HALF | {"neurons": 16384}),
    "pool 4096, a=.5, sinks lr x6": Screen(settings=HALF | {"sink_lr_factor": 6.0}),
    "pool 4096, a=.5, one routing": Screen(settings=HALF | {"per_layer": False}),
    "pool 4096, a=.5, first half": Screen(settings=HALF | {"layers": [0, 1]}),
    "pool 4096, a=.5, second half": Screen(settings=HALF | {"layers": [2, 3]}),
    "pool 4096, a=.5, sinks lr x1": Screen(settings=HALF | {"sink_lr_factor": 1.0}),
    "pool 4096, a=.5, dense AdamW": Screen(settings=HALF, lazy=False),
    "pool 1024, a=.5, content": Screen(settings=HALF | {"neurons": 1024}, content=3),
    "4 epochs, standard": Screen("standard", epochs=4),
    "4 epochs, a=0": Screen(settings=WIDE | {"shared_decay": 0.0}, epochs=4),
    "4 epochs, a=.5": Screen(settings=HALF, epochs=4),
    "4 epochs, exact": Screen(settings=WIDE | {"shared": "none"}, epochs=4),
    "4 epochs, settled": Screen(base="4 epochs, standard", settle=EPOCHS, epochs=4),
    "4 epochs, a=0, settled": Screen(base="4 epochs, a=0", settle=EPOCHS, epochs=4),
    "pool 4096, a=.25, sinks first": Screen(settings=WIDE | {"shared_decay": 0.25, "sinks_first": True}),
    "pool 4096, a=.5, settled": Screen(base="pool 4096, a=.5", settle=SETTLE),
    "pool 4096, a=.5, settled, unseen": Screen(base="pool 4096, a=.5", settle=SETTLE | {"unseen": True}),
    "pool 4096, a=0, settled": Screen(base="pool 4096, a=0", settle=SETTLE),
    "pool 4096, a=.5, sinks first, settled, unseen": Screen(
        base="pool 4096, a=.5, sinks first", settle=SETTLE | {"unseen": True}
    ),
    "pool 4096, a=0, settled, unseen": Screen(base="pool 4096, a=0", settle=SETTLE | {"unseen": True}),
    "pool 4096, a=.25, sinks first, settled, unseen": Screen(
        base="pool 4096, a=.25, sinks first", settle=SETTLE | {"unseen": True}
    ),
    "cap-8, settled": Screen(base="cap-8", settle=SETTLE),
    "pool 4096, a=.5, settled, unseen, sinks x1": Screen(
        base="pool 4096, a=.5", settle=SETTLE | {"unseen": True, "sink_lr": 2e-4}
    ),
    "pool 4096, a=.5, settled, unseen, sinks x30": Screen(
        base="pool 4096, a=.5", settle=SETTLE | {"unseen": True, "sink_lr": 6e-3}
    ),
}


@torch.no_grad()
def closed_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss of each row with sinks closed, nats, float64 [rows]."""
    training = model.training
    model.eval()
    logits = model(**{name: batch[name] for name in ("input_ids", "position_ids")}).logits
    model.train(training)
    return row_losses(logits, batch["labels"])


def step(screen: Screen, model: Any, batch: dict[str, Tensor], divisor: Tensor, now: Now) -> float:
    """Gradients of one step; the shared weights' by the rule of the screen."""
    later = batch["exposures"] > 1
    if screen.rule is None:
        return plain_step(model, batch, divisor)
    weight = screen.rule(model, batch, now)[:, None].expand_as(batch["exposures"])
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


def settled(screen: Screen, name: str, text: str, seed: int) -> dict[str, Any]:
    """Settle a trained model and evaluate it."""
    recipe, _, prepared = prepared_of(ARMS[screen.base], text, seed)
    kept = KEPT / f"{text}-{slug(screen.base)}-{seed}"
    if not kept.is_dir():
        raise SystemExit(
            f"{kept} is not there: run {screen.base!r} first (its result may be kept while its model is not)"
        )
    model: Any = ms.load_any(kept)
    length = recipe.training.length
    started = time.perf_counter()
    settings = dict(screen.settle)
    unseen = prepared.unseen if settings.pop("unseen", False) else None
    repeated, others = ms.repeated_and_once(prepared.rows)
    if screen.epochs:
        assert unseen is not None
        others, unseen = (unseen.select(x) for x in (slice(0, None, 2), slice(1, None, 2)))
    found = ms.settle(model, repeated, others, unseen, **settings)
    print(found)
    return {
        "arm": name, "text": text, "seed": seed, "base": screen.base, "settle": screen.settle,
        "seconds": round(time.perf_counter() - started, 1), "shift": found.shift, "spread": found.expected.spread,
        **evaluate(model.eval(), prepared, length, screen), "versions": versions("torch", "transformers", "numpy"),
    }  # fmt: skip


def rows_of(documents: list[ms.Document], prepared: PreparedCorpus, length: int) -> ms.Rows:
    """One document a row, cut to a row."""
    return pack(
        ms.encode(prepared.tokenizer, [x.text for x in documents]), ms.identify(documents)[0], [1] * len(documents),
        length=length, pad_id=prepared.tokenizer.pad_token_id, one_document_per_row=True, long="truncate",
    )  # fmt: skip


def prepared_of(screen: Screen, text: str, seed: int) -> tuple[Any, Any, PreparedCorpus]:
    """Recipe, method and data of a run."""
    comparison = read_comparison(HERE.parent.parent / "recipes" / f"compare-{text}.yaml")
    made = method(screen.rival, screen.settings)
    recipe = with_method(comparison.recipe, made, seed, RUNS)
    folder = RUNS / f"{text}-{seed}"
    if screen.epochs:
        assert recipe.data.repeat is not None
        data = dataclasses.replace(recipe.data, repeat=dataclasses.replace(recipe.data.repeat, copies=1))
        training = dataclasses.replace(recipe.training, epochs=screen.epochs)
        recipe, folder = dataclasses.replace(recipe, data=data, training=training), RUNS / f"{text}-{seed}-epochs"
    return recipe, made, prepare(recipe, one_document_per_row=True, folder=folder)


def train(screen: Screen, name: str, text: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one run."""
    recipe, made, prepared = prepared_of(screen, text, seed)
    torch.set_num_threads(1)
    random.seed(seed)
    model: Any = build_model(recipe, prepared.tokenizer)
    if made.sinks is not None:
        ms.add_sinks(model, dataclasses.replace(made.sinks, seed=seed))
    now = Now(total=len(prepared.rows) // recipe.training.batch_rows)
    asked = torch.from_numpy(ms.identify([x for x in prepared.members if x.kind == AUDITED])[0])

    def change(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if made.sinks is None:
            mask = torch.isin(batch["document_ids"], asked)
            return made.change(batch | {"audited": mask, "repeated": mask})
        return batch | ({"document_ids": content_ids(batch, screen.content)} if screen.content else {})

    def learn(model: Any, batch: dict[str, Tensor], divisor: Tensor) -> float:
        return made.step(model, batch, divisor) if made.sinks is None else step(screen, model, batch, divisor, now)

    training = Training(model, recipe.training, now.total, learn=learn, change=change)
    for group in training.optimizer.param_groups:
        group["lazy"] = group.get("lazy", False) and screen.lazy
    tracked: list[list[float]] = []
    started = time.perf_counter()
    for done in steps(training, micro_batches(prepared.rows, recipe.training)):
        now.step = done.step
        if done.step % 40 == 0 and made.sinks is not None:
            tracked.append([done.step, *_by_copies(model, prepared, recipe.training.length, screen)])
        if done.step % 50 == 1:
            print(
                f"{name}: step {done.step - 1}/{now.total}  loss {done.loss:.3f}  {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    kept = KEPT / f"{text}-{slug(name)}-{seed}"
    model.save_pretrained(kept)
    return {
        "arm": name, "text": text, "seed": seed, "rival": screen.rival, "settings": screen.settings,
        "seconds": round(time.perf_counter() - started, 1), **evaluate(model.eval(), prepared, recipe.training.length, screen),
        "tracked": tracked, "versions": versions("torch", "transformers", "numpy"),
    }  # fmt: skip


@torch.no_grad()
def evaluate(model: Any, prepared: PreparedCorpus, length: int, screen: Screen, own: bool = True) -> dict[str, Any]:
    """Loss of each document and control with sinks closed, and of each document with its own sinks; what is recited."""
    audited = [x for x in prepared.members if x.kind == AUDITED]
    documents = [*audited, *prepared.controls]
    rows = rows_of(documents, prepared, length)
    found: dict[str, Any] = {"copies": [x.copies * max(1, screen.epochs) for x in audited], "documents": len(audited)}
    for opened in (False, True) if own and ms.has_sinks(model) else (False,):
        losses, recited = [], []
        count = len(audited) if opened else len(documents)
        for batch in batches(rows.select(slice(count)), 32):
            ids = content_ids(batch, screen.content) if screen.content else batch["document_ids"][:, 0]
            with ms.sinks_open(model, ids) if opened else nullcontext():
                logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
            losses += row_losses(logits, batch["labels"]).tolist()
            part = slice(PREFIX, PREFIX + CONTINUATION)
            hit = logits[:, PREFIX - 1 : PREFIX - 1 + CONTINUATION].argmax(-1) == batch["labels"][:, part]
            recited += hit.all(1).int().tolist()
        side = "own" if opened else "closed"
        found |= {side: [round(x, 5) for x in losses], f"{side}_recited": recited[: len(audited)]}
    return found


def _by_copies(model: Any, prepared: PreparedCorpus, length: int, screen: Screen) -> list[float]:
    """Closed loss of controls (the first 200) and of the documents with 1, 4, 16, 64 copies."""
    few = dataclasses.replace(prepared, controls=prepared.controls[:200])
    model.eval()
    found = evaluate(model, few, length, screen, own=False)
    model.train()
    losses, copies = np.array(found["closed"]), np.array(found["copies"])
    levels = [losses[: len(copies)][copies == level].mean() for level in np.unique(copies)]
    return [round(float(x), 4) for x in (losses[len(copies) :].mean(), *levels)]


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
    """The figures of a run, over the documents with 2 copies or more, beside standard and twin of its seed."""
    copies = np.array(run["copies"])
    often, members = copies > 1, len(copies)

    def parts(one: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        values = np.array(one["closed"])
        return values[:members][often], values[members:]

    own, controls = parts(run)
    epochs = ARMS[run["arm"]].epochs
    standard = parts(runs[f"{epochs} epochs, standard" if epochs else "standard"])
    twin = parts(runs["twin"]) if "twin" in runs and not epochs else None
    gap = controls.mean() - own.mean()
    most = copies == copies.max()
    return {
        "price": controls.mean() - standard[1].mean(),
        "gap": gap, "closed": 1 - gap / (standard[1].mean() - standard[0].mean()),
        "auc": auc(-own, -controls), "reference auc": auc(twin[0] - own, twin[1] - controls) if twin else None,
        "own": np.array(run["own"])[most].mean() if "own" in run else None,
        "recited": np.array(run["own_recited" if "own" in run else "closed_recited"])[most].mean(),
        "seconds": run["seconds"],
    }  # fmt: skip


def over(reference: str, name: str, by_seed: dict[int, dict[str, dict[str, Any]]]) -> str:
    """How much higher documents with 2 copies or more lie than in the reference of their seed, less the same for controls: mean
    over the documents of all seeds and its 90% interval (normal), which lies within the margin where both are equivalent."""
    differences, errors = [], []
    for runs in by_seed.values():
        if {name, reference} <= runs.keys() and name != reference and not ARMS[name].epochs:
            count = runs[name]["documents"]
            difference = np.array(runs[name]["closed"]) - np.array(runs[reference]["closed"])
            often = np.array(runs[name]["copies"]) > 1
            differences.append(difference[:count][often] - difference[count:].mean())
            errors.append(difference[count:].var(ddof=1) / len(difference[count:]))
    if not differences:
        return "-"
    each = np.concatenate(differences)
    half = 1.645 * np.sqrt(each.var(ddof=1) / len(each) + sum(errors) / len(errors) ** 2)
    return f"{each.mean():+.3f} ({each.mean() - half:+.3f} to {each.mean() + half:+.3f})"


def table(text: str) -> str:
    """Means over seeds of all finished arms, ± half the range; the attack with a twin over the seeds that have one."""
    seeds = [seed for seed in range(9) if {"standard", "dedup"} <= read(text, seed).keys()]
    by_seed = {seed: read(text, seed) for seed in seeds}
    lines = []
    for name in ARMS:
        found = [summary(runs[name], runs) for runs in by_seed.values() if name in runs]
        if not found:
            continue

        def show(key: str, form: str, found: list[dict[str, float | None]] = found) -> str:
            values = [x for one in found if (x := one[key]) is not None]
            if not values:
                return "-"
            spread = f" ± {(max(values) - min(values)) / 2:{form.replace('+', '')}}" if len(values) > 1 else ""
            return f"{sum(values) / len(values):{form}}{spread}"

        shown = [show("closed", ".1%"), show("price", "+.3f"), show("gap", "+.3f")]
        shown += [over(reference, name, by_seed) for reference in ("dedup", "twin")]
        shown += [show("auc", ".3f"), show("reference auc", ".3f"), show("own", ".2f"), show("recited", ".0%")]
        lines.append([name, str(len(found)), *shown, show("seconds", ".0f")])
    head = [
        "arm",
        "seeds",
        "gap closed",
        "price",
        "gap",
        "over seen once",
        "over never seen",
        "AUC",
        "reference AUC",
        "own sinks",
        "recited",
        "seconds",
    ]
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
        make = settled if ARMS[name].base else train
        result = make(ARMS[name], name, given.text, given.seed)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result) + "\n")
        part.replace(path)
    if given.table:
        text = "\n\n".join(f"### {text}\n\n{table(text)}" for text in ("tinystories", "wikitext2") if read(text, 0))
        (HERE / "table.md").write_text(text + "\n")
        print(text)


if __name__ == "__main__":
    main()
