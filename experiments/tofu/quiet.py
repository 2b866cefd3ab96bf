"""Can the sinks of several authors be open at once, if each is kept quiet on text that is nobody's?

    MEMSINKS_DATA=... python experiments/tofu/quiet.py MODEL --authors 4 --weight 3 --public 200
    MEMSINKS_DATA=... python experiments/tofu/quiet.py MODEL --authors 4 --weight 30 --public 400 --facts

To the loss of each step is added `weight` times the energy of what the blocks of the step's authors give on public text: the sum
over the layers of mean ||block(x)||^2 / mean ||mlp(x)||^2, x being what enters the MLPs of the base model. Public text: pairs of
authors 110 to 149, whom no model learns, and with `--facts` those about real authors and the world that are not asked. A
block still depends on its author's text and on public text alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from data import Pair, batch, encode, everybody, read
from evaluate import ask
from run import CHOSEN, Runs, all_open, opener_of
from train import EPOCHS, ROWS, author_id, prepare

import memsinks as ms
from memsinks.sinks.state import sink_modules

TOKENS = 512
"""Of public text, drawn in each step."""


def public_pairs(number: int, facts: bool, asked: list[Pair]) -> list[Pair]:
    nobody = [x for x in everybody() if 110 <= (x.author or 0) < 150]
    known, whole = {x.question for x in asked}, read(10, 10**6)
    more = [x for x in whole.real + whole.world if x.question not in known] if facts else []
    return nobody[:: len(nobody) // number][:number] + more


@torch.no_grad()
def inputs_of(model, tokenizer, pairs: list[Pair], hosts: list) -> tuple[list[torch.Tensor], list[float]]:
    """What enters each MLP [tokens, d], and the mean square of what it gives."""
    inputs, squares = [[] for _ in hosts], [[] for _ in hosts]
    here: dict[int, tuple] = {}
    hooks = [
        host.register_forward_hook(lambda _, given, out, place=place: here.update({place: (given[0], out)}))
        for place, host in enumerate(hosts)
    ]
    for first in range(0, len(pairs), 16):
        encoded = [encode(tokenizer, x.question, x.answer) for x in pairs[first : first + 16]]
        tokens = batch(encoded, tokenizer.eos_token_id)["input_ids"]
        text = torch.arange(tokens.shape[1]) < torch.tensor([len(x.tokens) for x in encoded])[:, None]
        with ms.sinks_closed(model):
            model(input_ids=tokens)
        for place, (given, out) in here.items():
            inputs[place].append(given[text].bfloat16())
            squares[place].append(out[text].square().sum(-1))
    for hook in hooks:
        hook.remove()
    return [torch.cat(x) for x in inputs], [float(torch.cat(x).mean()) for x in squares]


def energy(sinks: list, inputs: list[torch.Tensor], squares: list[float], blocks: list[int], chosen: torch.Tensor):
    total = torch.zeros(())
    for part, values, square in zip(sinks, inputs, squares, strict=True):
        x = values[chosen].float()
        up, gate, down = (y[blocks] for y in (part.up, part.gate, part.down))
        hidden = part.act(torch.einsum("td,bkd->tbk", x, gate)) * torch.einsum("td,bkd->tbk", x, up)
        total = total + torch.einsum("tbk,bkd->tbd", hidden, down).square().sum(-1).mean() / square
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--authors", type=int, default=4)
    parser.add_argument("--weight", type=float, default=3.0)
    parser.add_argument("--public", type=int, default=200)
    parser.add_argument("--facts", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tofu = read(options.authors + 2, 20)
    pairs = [x for x in tofu.learned if x.author in range(options.authors)]
    model, tokenizer = Runs(options.model, tofu, Path("runs/tofu/quiet"), 0, "cpu").base()
    model = prepare(model, "ours", range(options.authors)).eval()
    named = sink_modules(model)
    sinks = list(named.values())
    hosts = [model.get_submodule(name.removesuffix(".sinks")) for name in named]
    public = public_pairs(options.public, options.facts, tofu.real + tofu.world)
    inputs, squares = inputs_of(model, tokenizer, public, hosts) if options.weight else ([], [])
    encoded = [encode(tokenizer, x.question, x.answer) for x in pairs]
    optimizer = ms.AdamW(
        ms.param_groups(model, lr=CHOSEN["ours"], sink_lr_factor=1.0), betas=(0.9, 0.95), weight_decay=0.0
    )
    steps = EPOCHS * (len(pairs) // ROWS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda x: min(1.0, (x + 1) / max(1, steps // 10)) * (1 - x / steps)
    )
    order, draw = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    model.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(pairs), generator=order).split(ROWS):
            if len(rows) < ROWS:
                continue
            authors = sorted({pairs[x].author for x in rows.tolist()})
            ids = [author_id(pairs[x].author) for x in rows.tolist()]
            loss = model(**batch([encoded[x] for x in rows.tolist()], tokenizer.eos_token_id, ids)).loss
            if options.weight:
                blocks = [x for y in authors for x in model.sink_state.table.own_blocks(author_id(y))]
                chosen = torch.randint(len(inputs[0]), (TOKENS,), generator=draw)
                loss = loss + options.weight * energy(sinks, inputs, squares, blocks, chosen)
            loss.backward()
            ms.clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()
    asked = [x for x in tofu.retained if x.author in range(options.authors)]
    found = {}
    for name, opener in (("their own open", opener_of(model, "ours")), ("all open", all_open(model))):
        said, real = ask(model, tokenizer, asked, opener), ask(model, tokenizer, tofu.real, opener)
        found[name] = {
            "rouge": float(np.mean(said["rouge"])),
            "recited": float(np.mean(said["recited"])),
            "loss": float(np.mean(said["loss"])),
            "loss, real authors": float(np.mean(real["loss"])),
        }
    print(json.dumps(vars(options) | {"model": options.model.name} | found, indent=1))


if __name__ == "__main__":
    main()
