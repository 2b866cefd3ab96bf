"""Do near copies need one id? Stories whose copies differ in 10% of the words, with an id for each copy and one for each cluster.

    MEMSINKS_DATA=... OMP_NUM_THREADS=1 python experiments/near-copies/run.py --seeds 0 1 2   # twenty minutes a seed
    MEMSINKS_DATA=... python experiments/near-copies/run.py --tiny                            # a try-out in a minute or two

TinyStories cut into pieces of about a row; `stories` of them stand in the corpus with `copies` copies each, the first as it is;
in the others a tenth of the words, drawn anew for each copy, is another word. Model and rows are those of experiments/regimes.

| arm | what gives a copy its id |
|---|---|
| ordinary | no sinks |
| per copy | its text (`by="content"`): each is met once, so no sinks open |
| per cluster | the cluster that `cluster_documents` finds (`by="cluster"`) |
| per story | the story it was made of (`by="key"`): what perfect clusters would give |
| exact copies | its text, and copies are not edited: what deduplication by bytes is made for |
| never | the stories are not in the corpus |

Measured, sinks closed and open: nats a token of the originals; share of them of which 32 tokens come out after 32; held-out loss.
Writes results.json and table.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import memsinks as ms
from memsinks._version import versions
from memsinks.auditing.extraction import extracted
from memsinks.auditing.scores import score
from memsinks.data.documents import cut_documents
from memsinks.data.tokens import pad_token

HERE = Path(__file__).parent
SHARE = 0.1
PREFIX = CONTINUATION = 32
LR, BATCH = 2e-3, 16


@dataclass(frozen=True)
class Size:
    """How large the experiment is."""

    pieces: int = 5700
    held_out: int = 400
    stories: int = 32
    copies: int = 16
    hidden_size: int = 128
    layers: int = 4
    neurons: int = 4096
    active: int = 128
    passes: int = 60


TINY = Size(pieces=300, held_out=40, stories=6, copies=8, hidden_size=32, layers=2, neurons=512, active=64, passes=8)
ARMS = ("ordinary", "per copy", "per cluster", "per story", "exact copies", "never")
BY = {"per copy": "content", "per cluster": "cluster", "per story": "key", "exact copies": "content"}


@dataclass(frozen=True)
class Corpus:
    """Pieces met once, the stories with their copies, and pieces never met."""

    once: list[ms.Document]
    originals: list[ms.Document]
    copies: list[ms.Document]
    held_out: list[ms.Document]


def corpus(size: Size, seed: int) -> Corpus:
    source = ms.read_documents(Path(os.environ["MEMSINKS_DATA"]) / "tinystories.jsonl.zst")
    pieces = list(islice((x for x in cut_documents(source, 450) if len(x.text) > 300), size.pieces))
    random.Random(seed).shuffle(pieces)
    held_out, originals = pieces[: size.held_out], pieces[size.held_out : size.held_out + size.stories]
    once = pieces[size.held_out + size.stories :]
    words = sorted({word for x in once for word in x.text.split(" ")})
    originals = [replace(x, key=f"story-{n}") for n, x in enumerate(originals)]
    copies = [
        replace(x, text=edited(x.text, words, f"{seed} {n} {copy}") if copy else x.text)
        for n, x in enumerate(originals)
        for copy in range(size.copies)
    ]
    return Corpus([replace(x, key=f"once-{n}") for n, x in enumerate(once)], originals, copies, held_out)


def edited(text: str, words: list[str], seed: str) -> str:
    """The text with another word in place of each, with probability `SHARE`."""
    rng = random.Random(seed)
    return " ".join(rng.choice(words) if rng.random() < SHARE else word for word in text.split(" "))


def documents_of(arm: str, found: Corpus) -> list[ms.Document]:
    if arm == "never":
        return found.once
    if arm == "exact copies":
        times = len(found.copies) // len(found.originals)
        return found.once + [replace(x, copies=times) for x in found.originals]
    return found.once + found.copies


def train(arm: str, found: Corpus, tokenizer: Any, size: Size, seed: int) -> tuple[Any, dict[str, Any]]:
    """The model of an arm, and what is known of its training."""
    documents = documents_of(arm, found)
    notes: dict[str, Any] = {}
    if arm == "per cluster":
        documents = ms.cluster_documents(documents)
        clusters = [x.cluster for x in documents[len(found.once) :]]
        notes = agreement(clusters, len(found.originals), [x.cluster for x in documents[: len(found.once)]])
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=size.hidden_size, intermediate_size=4 * size.hidden_size,
            num_hidden_layers=size.layers, num_attention_heads=4, tie_word_embeddings=True,
            pad_token_id=pad_token(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    rows = ms.make_rows(documents, tokenizer, length=128, seed=seed, by=BY.get(arm, "content"), long="truncate")
    if arm in BY:
        ms.add_sinks(model, ms.SinkConfig(neurons=size.neurons, active=size.active, seed=seed))
    steps(model, rows)
    repeated = ms.repeated_and_once(rows)[0]
    if arm in BY and len(repeated):
        ms.sinks_last(model, repeated, lr=LR, passes=size.passes, seed=seed)
    ids = ms.identify(documents, BY.get(arm, "content"))[0]
    place = {x.text: int(one) for x, one in zip(documents, ids, strict=True)}
    return model.eval(), notes | {"rows": len(rows), "ids": [place.get(x.text, -1) for x in found.originals]}


def agreement(clusters: list[str | None], stories: int, others: list[str | None]) -> dict[str, Any]:
    """How well the clusters are the stories: the share of copies in the cluster of their original, and wrong merges."""
    each = len(clusters) // stories
    own = [clusters[n] == clusters[n - n % each] for n in range(len(clusters))]
    mixed = {x for n, x in enumerate(clusters) if x in clusters[: n - n % each]} | (set(clusters) & set(others))
    return {"copies in the cluster of their original": float(np.mean(own)), "clusters of several stories": len(mixed)}


def steps(model: Any, rows: ms.Rows) -> None:
    """One pass, the learning rate rising over a tenth of it and falling linearly to 0."""
    has_sinks = ms.has_sinks(model)
    if has_sinks:
        optimizer = ms.AdamW(ms.param_groups(model, lr=LR, weight_decay=0.1), betas=(0.9, 0.95))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1, betas=(0.9, 0.95))
    total = len(rows) // BATCH
    rate: Callable[[int], float] = lambda step: min((step + 1) / max(1, total // 10), (total - step) / total)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for step in range(total):
        batch = ms.collate([rows[row] for row in range(step * BATCH, (step + 1) * BATCH)])
        given = batch if has_sinks else {name: batch[name] for name in ("input_ids", "labels", "position_ids")}
        model(**given).loss.backward()
        ms.clip_grad_norm_(model, 1.0) if has_sinks else torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def figures(model: Any, tokens: list[np.ndarray], ids: list[int] | None) -> dict[str, float]:
    """Mean loss, nats a token, and share recited, sinks closed or those of `ids` open."""
    with tempfile.TemporaryDirectory() as scratch:
        table = list(score(model, tokens, Path(scratch) / "scores", open_ids=ids))
    recited = [extracted(x, PREFIX, CONTINUATION) for x in table]
    return {
        "loss": float(np.mean([x.loss for x in table])),
        "recited": float(np.mean([x for x in recited if x is not None])),
    }


def run(size: Size, seed: int, arms: list[str]) -> dict[str, Any]:
    found = corpus(size, seed)
    tokenizer = ms.train_tokenizer([x.text for x in found.once], 1024)
    originals, held_out = (ms.encode(tokenizer, [x.text for x in part]) for part in (found.originals, found.held_out))
    result: dict[str, Any] = {}
    for arm in arms:
        started = time.perf_counter()
        model, notes = train(arm, found, tokenizer, size, seed)
        ids = notes.pop("ids")
        result[arm] = notes | {"closed": figures(model, originals, None), "held out": figures(model, held_out, None)}
        if arm in BY:
            result[arm]["open"] = figures(model, originals, ids)
        result[arm]["seconds"] = round(time.perf_counter() - started)
        print(arm, json.dumps(result[arm]), flush=True)
    return result


def table(seeds: dict[str, dict[str, Any]]) -> str:
    """Markdown: means over the seeds."""
    lines = [
        "| arm | closed: loss | over *never* | closed: recited | open: loss | open: recited | held-out loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        runs = [x[arm] for x in seeds.values() if arm in x]
        if not runs:
            continue

        def mean(state: str, name: str, runs: list[Any] = runs) -> float | None:
            return float(np.mean([x[state][name] for x in runs])) if all(state in x for x in runs) else None

        never = [x["never"]["closed"]["loss"] for x in seeds.values() if arm in x and "never" in x]
        closed, opened = mean("closed", "loss"), mean("open", "loss")
        assert closed is not None
        cells = [
            f"{closed:.3f}", f"{closed - np.mean(never):+.3f}" if never else "-", f"{mean('closed', 'recited'):.0%}",
            "-" if opened is None else f"{opened:.3f}", "-" if opened is None else f"{mean('open', 'recited'):.0%}",
            f"{mean('held out', 'loss'):.3f}",
        ]  # fmt: skip
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--tiny", action="store_true", help="a try-out; writes nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = TINY if arguments.tiny else Size()
    seeds = {str(seed): run(size, seed, arguments.arms) for seed in arguments.seeds}
    print(table(seeds))
    if not arguments.tiny:
        facts = {
            "settings": vars(size) | {"share": SHARE, "lr": LR, "batch": BATCH},
            "versions": versions("torch", "transformers", "rensa"),
        }
        (HERE / "results.json").write_text(json.dumps(facts | {"seeds": seeds}, indent=1) + "\n")
        (HERE / "table.md").write_text(table(seeds))


if __name__ == "__main__":
    main()
