"""What a changed copy of the model shows: rounded to few bits, or trained a little further.

Removal that hides a text under a push leaves its trace: a few steps of training on anything, or learning half of the texts
again, bring it back. Each probe changes a copy without sinks and takes the loss of every document again; the gap between
controls and documents is then set beside that of the twin and of the model that saw each text once, changed alike.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from memsinks.auditing.corpus import Corpus
from memsinks.auditing.retrain import bare_copy, round_weights, seconds_of_a_step, train_further
from memsinks.auditing.scores import ScoreTable, claim, default_batch_tokens, hash_of, keep, score
from memsinks.auditing.settings import AuditSettings
from memsinks.errors import DataError

logger = logging.getLogger(__name__)

BITS = (8, 4, 3)
HARMLESS_STEPS = (10, 60)
HALF_STEPS, BEGINNING_STEPS = 40, 60
BATCH_ROWS = 16
"""Texts of one step of the probes that train."""
ROUNDED = {f"rounded to {bits} bits": bits for bits in BITS}
HARMLESS = {f"{steps} harmless steps": steps for steps in HARMLESS_STEPS}
HALF, BEGINNINGS = "half relearned", "beginnings relearned"
PROBES = {
    **{name: f"every weight rounded to one of {2**bits - 1} values" for name, bits in ROUNDED.items()},
    **{name: f"after {steps} steps of training on other text" for name, steps in HARMLESS.items()},
    HALF: f"of each half of the documents, after {HALF_STEPS} steps of training on the other half",
    BEGINNINGS: f"of what follows the beginnings, after {BEGINNING_STEPS} steps of training on the beginnings alone",
}
"""Name of each probe, in the order of the report, and what the gap is then of."""
TRAINING_STEPS = max(HARMLESS_STEPS) + 2 * HALF_STEPS + BEGINNING_STEPS
"""Steps that the probes that train make, for each model."""


def means_something_alone(name: str) -> bool:
    """Whether a gap above 0 is a trace by itself. Learning beginnings helps to tell how they go on also where nothing is known,
    so that this gap says something only beside another model's."""
    return name != BEGINNINGS


@dataclass(frozen=True)
class Probed:
    """Which texts the probes look at and learn from; index arrays, int64.

    asked: documents and controls whose losses are taken. halves: of the target documents. harmless: texts to train on, integer
    [tokens] each. aside: the controls among them, which are then no controls.
    """

    asked: np.ndarray
    halves: tuple[np.ndarray, np.ndarray]
    harmless: list[np.ndarray]
    aside: np.ndarray


def probed_texts(corpus: Corpus, settings: AuditSettings) -> Probed:
    """Choose them, by the seed: at most `AuditSettings.probed` target documents and as many controls.

    Raises:
        DataError: fewer than 2 target documents, too few controls to set some aside, or nothing with a target to learn, where
            probes that train are asked for.
    """
    rng = np.random.default_rng(settings.seed)
    targets, controls = (rng.permutation(np.flatnonzero(x))[: settings.probed] for x in (corpus.target, corpus.control))
    harmless, aside = corpus.harmless, np.zeros(0, np.int64)
    if harmless is None:
        aside = controls[: len(controls) // 3]
        harmless = [corpus.tokens[index] for index in aside]
    if settings.attacks == "all":
        if len(targets) < 2:
            raise DataError(
                f"the attacks that train halve the target documents and need at least 2, there is {len(targets)}"
            )
        if not harmless:
            raise DataError(
                "the attacks that train need harmless text: give some (harmless=, --harmless), or 3 controls or more, of "
                f"which a third is then set aside; there are {len(controls)}"
            )
        least = 2 - len(corpus.start)
        if settings.beginning < least or max(map(len, harmless)) < least:
            raise DataError(
                f"the attacks that train need texts of at least {least} tokens: beginning={settings.beginning}, the longest "
                f"harmless text has {max(map(len, harmless))}"
            )
    halves = np.sort(targets[0::2]), np.sort(targets[1::2])
    return Probed(np.sort(np.concatenate([targets, controls])), halves, harmless, aside)


def probe(
    model: PreTrainedModel,
    corpus: Corpus,
    settings: AuditSettings,
    folder: Path,
    *,
    name: str,
    weights: str,
    models: int = 1,
) -> dict[str, np.ndarray]:
    """The loss of each document under each changed copy, sinks gone; nats per token, float64 [n], nan where it was not asked.

    Args:
        folder: what is finished is kept there, and not made again for the same weights, texts and settings.
        name: of the model, for progress. weights: their hash. models: how many an audit asks, for the time that is said.

    Returns:
        By name, in the order of `PROBES`; those that train only where ``settings.attacks`` is "all". Empty where the weights are
        not floating point numbers.
    """
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        return {}
    texts = probed_texts(corpus, settings)
    used = {name: getattr(settings, name) for name in ("end", "probed", "seed")}
    read = hash_of([corpus.start, *corpus.tokens], str([corpus.members, corpus.target.tolist()]))
    key = {"weights": weights, "read": read, "aside": texts.aside.tolist()} | used
    prober = _Prober(model, corpus, settings, texts, name)
    rounding: _Todo = {(said,): lambda bits=bits: [prober.rounded(bits)] for said, bits in ROUNDED.items()}
    found = _made(rounding, folder / "rounded", key)
    if settings.attacks == "all":
        training: _Todo = {tuple(HARMLESS): prober.harmless, (HALF,): prober.half, (BEGINNINGS,): prober.beginnings}
        more = {"harmless": hash_of(texts.harmless), "beginning": settings.beginning, "lr": settings.attack_lr}
        found |= _made(training, folder / "trained", key | more, lambda: prober.say_time(models))
    return found


_Todo = dict[tuple[str, ...], Callable[[], list[np.ndarray]]]


def _made(
    todo: _Todo, folder: Path, key: dict[str, Any], before: Callable[[], None] = lambda: None
) -> dict[str, np.ndarray]:
    """The losses of some probes, by name; what lies in the folder, made under the same key, is not made again.

    `before` is called if there is anything to make.
    """
    claim(folder, key)
    if not all((folder / _file(names[-1])).exists() for names in todo):
        before()
    found: dict[str, np.ndarray] = {}
    for names, make in todo.items():
        kept = keep([folder / _file(one) for one in names], lambda make=make: [{"loss": one} for one in make()])
        found |= {one: values["loss"] for one, values in zip(names, kept, strict=True)}
    return found


def _file(name: str) -> str:
    return f"{name.replace(' ', '-')}.safetensors"


@dataclass(frozen=True)
class _Prober:
    model: PreTrainedModel
    corpus: Corpus
    settings: AuditSettings
    texts: Probed
    name: str

    def rounded(self, bits: int) -> np.ndarray:
        copied = bare_copy(self.model)
        round_weights(copied, bits)
        return self.losses(copied, self.texts.asked)

    def harmless(self) -> list[np.ndarray]:
        asked = np.setdiff1d(self.texts.asked, self.texts.aside)
        copied, texts = bare_copy(self.model), self._read(self.texts.harmless)
        return self._train(copied, texts, HARMLESS_STEPS, lambda: self.losses(copied, asked), "harmless steps")

    def half(self) -> list[np.ndarray]:
        """Each half of the documents after learning the other, the controls in the mean of both."""
        controls = self.texts.asked[self.corpus.control[self.texts.asked]]
        found = [
            self._half(learned, np.sort(np.concatenate([asked, controls])))
            for learned, asked in (self.texts.halves, self.texts.halves[::-1])
        ]
        known = ~np.isnan(found)
        return [np.divide(np.nansum(found, 0), known.sum(0), out=np.full(len(found[0]), np.nan), where=known.any(0))]

    def _half(self, learned: np.ndarray, asked: np.ndarray) -> np.ndarray:
        copied, texts = bare_copy(self.model), self._read([self.corpus.tokens[index] for index in learned])
        (found,) = self._train(copied, texts, (HALF_STEPS,), lambda: self.losses(copied, asked), "half")
        return found

    def beginnings(self) -> list[np.ndarray]:
        """Of the tokens after the first `beginning`, after learning those of the documents."""
        beginning, corpus = self.settings.beginning, self.corpus
        targets = np.sort(np.concatenate(self.texts.halves))
        copied, texts = bare_copy(self.model), self._read([corpus.tokens[index][:beginning] for index in targets])
        long = np.array([len(one) > beginning for one in corpus.tokens])
        asked = self.texts.asked[long[self.texts.asked]]
        look = lambda: self.losses(copied, asked, beginning)  # noqa: E731
        return self._train(copied, texts, (BEGINNING_STEPS,), look, "beginnings")

    def losses(self, model: PreTrainedModel, asked: np.ndarray, start: int = 0) -> np.ndarray:
        """Mean loss of the tokens from `start` on of each text asked, [n]; nan for the others."""
        found = np.full(len(self.corpus.tokens), np.nan)
        if not len(asked):
            return found
        with tempfile.TemporaryDirectory(prefix="memsinks-probe-") as scratch:
            try:
                table: ScoreTable = score(
                    model,
                    [self.corpus.tokens[index] for index in asked],
                    Path(scratch) / "scores",
                    start=self.corpus.start,
                    batch_tokens=self.settings.batch_tokens,
                    label=f"{self.name}: losses",
                )
            except DataError as error:
                raise DataError(
                    f"a changed copy of {self.name} cannot be measured ({error}); if it has diverged, give a lower attack_lr "
                    f"(now {self.settings.attack_lr:g})"
                ) from error
            for index, one in zip(asked, table, strict=True):
                found[index] = -one.logprob[max(0, start - one.first) :].mean(dtype=np.float64)
        return found

    def say_time(self, models: int) -> None:
        """How long the probes that train will take, from one step."""
        each = seconds_of_a_step(bare_copy(self.model), self._read(self.texts.harmless), BATCH_ROWS, self._batch_tokens)
        logger.info(
            "%s: attacks that train, %d steps of %d texts on copies, about %.0f s for this model%s",
            self.name,
            TRAINING_STEPS,
            BATCH_ROWS,
            each * TRAINING_STEPS,
            f" and for each of the {models} models" if models > 1 else "",
        )

    @property
    def _batch_tokens(self) -> int:
        return self.settings.batch_tokens or default_batch_tokens(self.model)

    def _read(self, tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The texts to learn from as the model reads them, without those that have no target."""
        read = [np.concatenate([self.corpus.start, one]) for one in tokens]
        return [one for one in read if len(one) > 1]

    def _train(
        self,
        model: PreTrainedModel,
        texts: list[np.ndarray],
        steps: Sequence[int],
        look: Callable[[], np.ndarray],
        what: str,
    ) -> list[np.ndarray]:
        with torch.enable_grad():
            return train_further(
                model,
                texts,
                steps,
                look,
                lr=self.settings.attack_lr,
                batch_rows=BATCH_ROWS,
                batch_tokens=self._batch_tokens,
                seed=self.settings.seed,
                label=f"{self.name}: {what}",
            )
