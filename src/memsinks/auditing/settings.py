"""How an audit is made."""

from __future__ import annotations

import warnings
from dataclasses import InitVar, dataclass
from typing import Literal

from memsinks.checks import int_at_least, is_int, is_number, one_of, positive
from memsinks.data.identity import BY, By
from memsinks.errors import refuse


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """How an audit is made.

    Args:
        prefix, continuation: tokens given and tokens that must come out, for the main figure of extraction.
        prefixes, offsets: also asked: `continuation` tokens after every prefix length at every offset, the model reading
            nothing before the offset. Offsets other than 0 cost a pass over those tokens each.
        by: how documents got their ids in training, for open sinks.
        end: whether each document ends with the tokenizer's end token, as in training with `pack`.
        k: share of tokens Min-K% and Min-K%++ look at.
        queries_p: probability p of (n, p)-extraction.
        generate: how many of the most repeated documents are also generated, to check the teacher-forced figure.
        collateral: how many documents' sinks are closed, one after the other, to see what others lose.
        attacks: ``"forward"`` makes those that need forward passes alone, ``"all"`` also those that train copies of each model,
            see `probes`.
        beginning: tokens of each document that the last of these learns.
        attack_lr: learning rate of those that train.
        probed: target documents, and controls, that `probes` look at, at most.
        shown: how many of the most remembered documents stand in the report with their text; 0 keeps all text out.
        margin_loss, margin_auc: margins of the equivalence tests, nats per token and AUC.
        resamples, seed: of the bootstrap over documents.
        batch_tokens: tokens in one forward; None = chosen from the size of the vocabulary.
        identity: the old name of `by`.

    Raises:
        ConfigError: listing every problem at once.
    """

    prefix: int = 32
    continuation: int = 32
    prefixes: tuple[int, ...] = (8, 16, 32, 64)
    offsets: tuple[int, ...] = (0,)
    by: By = "content"
    end: bool = True
    k: float = 0.2
    queries_p: float = 0.5
    generate: int = 16
    collateral: int = 8
    attacks: Literal["forward", "all"] = "forward"
    beginning: int = 40
    attack_lr: float = 3e-4
    probed: int = 500
    shown: int = 6
    margin_loss: float = 0.03
    margin_auc: float = 0.03
    resamples: int = 1000
    seed: int = 0
    batch_tokens: int | None = None
    identity: InitVar[By | None] = None

    def __post_init__(self, identity: By | None) -> None:
        if identity is not None:
            warnings.warn("AuditSettings(identity=...) is now by=...", DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "by", identity)
        for name in ("prefixes", "offsets"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        refuse(self._problems(), "invalid AuditSettings")

    def _problems(self) -> list[str]:
        problems = []
        for name, least in (
            ("prefix", 1),
            ("continuation", 1),
            ("generate", 0),
            ("collateral", 0),
            ("beginning", 1),
            ("probed", 2),
            ("shown", 0),
            ("resamples", 100),
            ("seed", 0),
        ):
            problems += int_at_least(name, getattr(self, name), least)
        for name, least in (("prefixes", 1), ("offsets", 0)):
            if not all(is_int(x) and x >= least for x in getattr(self, name)):
                problems.append(f"{name} must be ints of at least {least}, got {getattr(self, name)!r}")
        for name in ("k", "queries_p"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < 1:
                problems.append(f"{name} must lie in (0, 1), got {value!r}")
        for name in ("margin_loss", "margin_auc", "attack_lr"):
            problems += positive(name, getattr(self, name))
        problems += one_of("attacks", self.attacks, ("forward", "all"))
        if self.batch_tokens is not None:
            problems += int_at_least("batch_tokens", self.batch_tokens, 1)
        return problems + one_of("by", self.by, BY)
