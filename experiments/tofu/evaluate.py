"""The figures of a model on TOFU: loss of right, paraphrased and wrong answers, generated answers, membership."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from data import Encoded, Pair, Tofu, encode

from memsinks.auditing.attacks_reference import differences, error_zone_attack
from memsinks.auditing.membership import auc
from memsinks.auditing.scores import FIELDS, DocumentScore, score
from memsinks.research.tofu import (
    model_utility,
    probability,
    probability_among,
    rouge_l,
    truth,
    truth_ratio,
)

NEW_TOKENS = 64


class Opener(NamedTuple):
    """What is open while a question is answered.

    who: of a pair, whose sinks or adapter. opened: of that, a context in which the model answers.
    """

    who: Callable[[Pair], Any]
    opened: Callable[[Any], AbstractContextManager[Any]]


def groups(pairs: Sequence[Pair], opener: Opener) -> dict[Any, list[int]]:
    """Indices of the pairs that are answered alike."""
    by: dict[Any, list[int]] = {}
    for index, pair in enumerate(pairs):
        by.setdefault(opener.who(pair), []).append(index)
    return by


def scores(model: Any, encoded: Sequence[Encoded]) -> list[DocumentScore]:
    with tempfile.TemporaryDirectory() as scratch:
        return list(score(model, [x.tokens for x in encoded], Path(scratch) / "scores"))


def answer_loss(one: DocumentScore, encoded: Encoded) -> float:
    """Mean loss of the answer, nats a token."""
    return -float(one.logprob[encoded.start - one.first :].mean())


def generate(model: Any, tokenizer: Any, questions: Sequence[Encoded]) -> list[str]:
    """Greedy answers."""
    width, pad = max(x.start for x in questions), tokenizer.eos_token_id
    tokens = torch.full((len(questions), width), pad)
    mask = torch.zeros_like(tokens)
    for row, one in enumerate(questions):
        tokens[row, width - one.start :] = torch.from_numpy(one.tokens[: one.start])
        mask[row, width - one.start :] = 1
    with torch.no_grad():
        out = model.generate(
            input_ids=tokens.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=pad,
        )
    return [x.strip() for x in tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]


def ask(model: Any, tokenizer: Any, pairs: Sequence[Pair], opener: Opener) -> dict[str, list[Any]]:
    """Figures of each pair: loss, paraphrased, wrong (losses), rouge, recited."""
    found: dict[str, list[Any]] = {
        name: [None] * len(pairs) for name in ("loss", "paraphrased", "wrong", "said", "recited")
    }
    for who, group in groups(pairs, opener).items():
        chosen = [pairs[index] for index in group]
        texts = [[x.answer, x.paraphrased or x.answer, *x.wrong] for x in chosen]
        encoded = [encode(tokenizer, x.question, text) for x, own in zip(chosen, texts, strict=True) for text in own]
        with opener.opened(who):
            table = scores(model, encoded)
            first = np.cumsum([0, *map(len, texts)])
            said = generate(model, tokenizer, [encoded[x] for x in first[:-1]])
        for place, index in enumerate(group):
            part = range(first[place], first[place + 1])
            losses = [answer_loss(table[x], encoded[x]) for x in part]
            found["loss"][index], found["paraphrased"][index], found["wrong"][index] = losses[0], losses[1], losses[2:]
            right, one = table[part[0]], encoded[part[0]]
            found["recited"][index] = bool((right.rank[one.start - right.first :] == 0).all())
            found["said"][index] = said[place]
    found["rouge"] = rouge_l([x.answer for x in pairs], found["said"]).tolist()
    return found


def figures(asked: dict[str, dict[str, list[Any]]]) -> dict[str, float]:
    """Utility and its parts, and what is known of the forgotten."""
    parts: dict[str, float] = {}
    for name in ("retained", "real", "world"):
        one = asked[name]
        chance = probability(one["loss"]) if name == "retained" else probability_among(one["loss"], one["wrong"])
        parts[f"{name} probability"] = float(chance.mean())
        parts[f"{name} rouge"] = float(np.mean(one["rouge"]))
        parts[f"{name} truth"] = float(truth(truth_ratio(one["paraphrased"], one["wrong"])).mean())
    gone = asked["forgotten"]
    return (
        {"utility": model_utility(list(parts.values()))}
        | parts
        | {
            "retained recited": float(np.mean(asked["retained"]["recited"])),
            "forgotten probability": float(probability(gone["loss"]).mean()),
            "forgotten rouge": float(np.mean(gone["rouge"])),
            "forgotten recited": float(np.mean(gone["recited"])),
        }
    )


def ratios(asked: dict[str, dict[str, list[Any]]]) -> list[float]:
    """Truth ratios on the forgotten authors."""
    gone = asked["forgotten"]
    return truth_ratio(gone["paraphrased"], gone["wrong"]).tolist()


def answers(model: Any, tokenizer: Any, tofu: Tofu, opener: Opener) -> list[DocumentScore]:
    """Scores of the answers about the forgotten and about authors that nobody learned."""
    found: list[Any] = []
    for pairs in (tofu.forgotten, tofu.unseen):
        own: list[Any] = [None] * len(pairs)
        for who, part in groups(pairs, opener).items():
            encoded = [encode(tokenizer, pairs[x].question, pairs[x].answer) for x in part]
            with opener.opened(who):
                table = scores(model, encoded)
            for index, one, text in zip(part, table, encoded, strict=True):
                said = {name: getattr(one, name)[text.start - one.first :] for name in FIELDS}
                own[index] = DocumentScore(**said, first=text.start)
        found += own
    return found


def error_zone(model: Any, tokenizer: Any, tofu: Tofu, opener: Opener, base: list[DocumentScore]) -> float:
    """AUC of EZ-MIA on answers: the forgotten against authors that nobody learned; base: `answers` of the model before.

    Differences of less than .001 nats are the noise of how texts were batched, and count as none.
    """
    own = answers(model, tokenizer, tofu, opener)
    zone = np.array([error_zone_attack(x, differences(x, y).round(3)) for x, y in zip(own, base, strict=True)])
    members = len(tofu.forgotten)
    return auc(zone[:members], zone[members:])


def everything(model: Any, tokenizer: Any, tofu: Tofu, opener: Opener) -> dict[str, dict[str, list[Any]]]:
    """What is asked of a model, by set of questions; see `ask`."""
    sets = {"forgotten": tofu.forgotten, "retained": tofu.retained, "real": tofu.real, "world": tofu.world}
    return {name: ask(model, tokenizer, pairs, opener) for name, pairs in sets.items()}
