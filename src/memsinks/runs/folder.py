"""The folder of a run.

recipe.yaml      the recipe, all defaults written out; written first: from then on the run is resumed
run.json         versions, seed, counts, hashes, times
metrics.jsonl    a line each log_every steps
members.jsonl    every document trained on, with its copies; controls.jsonl the held-out ones
data/            the tokens, where there is a background; see `prepare`
checkpoints/     what training resumes from
model/           the final model with its sinks and tokenizer, settled if the recipe says so
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memsinks.checks import is_int
from memsinks.data.documents import Document, write_documents
from memsinks.data.tokens import save_tokenizer
from memsinks.errors import CheckpointError
from memsinks.files import file_hash, locked, remove_leftovers, write_json
from memsinks.provenance import refuse_other_settings
from memsinks.runs.recipe import Recipe
from memsinks.runs.sections import load_yaml
from memsinks.training.processes import main_process

logger = logging.getLogger(__name__)

RECIPE, FACTS, METRICS = "recipe.yaml", "run.json", "metrics.jsonl"
MEMBERS, CONTROLS = "members.jsonl", "controls.jsonl"
OF_CORPUS = {
    "corpus_sha256": "the corpus",
    "identity_sha256": "what is known of the documents (keys, sources, clusters, isolation, prompts)",
    "tokenizer_sha256": "the tokenizer",
}
"""Hashes among the facts that resuming compares."""
WRITTEN = ("data", "model", RECIPE, FACTS, MEMBERS, CONTROLS, METRICS)
"""What is written beside its place and renamed."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run: what is in it, reading and writing it."""

    path: Path

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return "seconds" in self.facts()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder and keep other processes out; CheckpointError if one is at work there, or it cannot be made."""
        new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error}; choose another output") from error
        busy = "another process trains or takes somebody out there; wait for it, or choose another output"
        with locked(self.path, busy):
            try:
                yield
            finally:
                if new:
                    with suppress(OSError):  # something was written
                        self.path.rmdir()

    def open_new(self) -> None:
        """Make sure that a run can start here; CheckpointError if there is one, or something else.

        A run that was killed before it wrote its recipe leaves nothing but its data.
        """
        self._clean()
        if self.path.exists() and any(entry.name != "data" for entry in self.path.iterdir()):
            raise CheckpointError(f"{self.path} is not empty; resume the run, or choose another output")

    def open_again(self, recipe: Recipe) -> None:
        """Make sure that the run of this recipe can go on here; CheckpointError if there is none, or one of another recipe."""
        path = self.path / RECIPE
        if not path.is_file():
            raise CheckpointError(f"{self.path} holds no run to resume ({RECIPE} is missing); start without resume")
        self._clean()
        try:
            before = dict(load_yaml(path.read_bytes(), path.name))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); restore it, or choose another output") from error
        refuse_other_settings(
            before,
            recipe.to_dict(),
            path,
            kinds={"": Recipe},
            ignored=("training.batch_rows", "training.accumulate", "training.shard"),  # see `Training.resume`
            remedy="resume with the same recipe and the same --set, or choose another output",
        )

    def _clean(self) -> None:
        for name in WRITTEN:
            remove_leftovers(self.path, name, age=0)

    def start(
        self, recipe: Recipe, facts: Mapping[str, Any], members: Sequence[Document], controls: Sequence[Document]
    ) -> None:
        """Write what is known before training."""
        _write(self.path / RECIPE, yaml.safe_dump(recipe.to_dict(), sort_keys=False).encode())
        for name, documents in ((MEMBERS, members), (CONTROLS, controls)):
            write_documents(self.path / name, documents)
        self.write_facts(dict(facts) | {"members_sha256": file_hash(self.path / MEMBERS)})
        self.cut_metrics(0)

    def facts(self) -> dict[str, Any]:
        """What run.json says, {} if it is not there; CheckpointError if it is damaged."""
        path = self.path / FACTS
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); restore it, or start a new run") from error

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        write_json(self.path / FACTS, dict(facts))

    def require_corpus(self, facts: Mapping[str, Any]) -> None:
        """CheckpointError if the run was started on another corpus than that of these facts, by the hashes of `OF_CORPUS`."""
        before = self.facts()
        for name in (x for x in OF_CORPUS if x in facts):
            now = str(facts[name])
            was = str(before.get(name, "" if name == "corpus_sha256" else now))  # runs of before have this hash alone
            if was != now:
                raise CheckpointError(
                    f"{OF_CORPUS[name]} has changed since {self.path} was started (SHA-256 {was[:12]}..., now {now[:12]}...); "
                    "restore it, or start a new run"
                )

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(dict(line)) + "\n")

    def cut_metrics(self, step: int, every: int = 1) -> None:
        """Keep the lines up to `step`; the last one may have been cut off while it was written.

        Says so where some are missing, one being written each `every` steps.
        """
        lines = self.metrics.read_bytes().split(b"\n") if self.metrics.is_file() else []
        steps = [_step_of(line) for line in lines]
        kept = [line + b"\n" for line, x in zip(lines, steps, strict=True) if x is not None and x <= step]
        if len(kept) < step // every:
            logger.warning("%s has %d of %d lines: the others are lost", self.metrics, len(kept), step // every)
        _write(self.metrics, b"".join(kept))

    def finish(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Mapping[str, Any], step: int
    ) -> None:
        """Write the final model, drop the checkpoint of the last `step`, for the model itself is there, and say that the run is
        finished; every process of a sharded model must call this."""
        model.save_pretrained(self.model)
        if not main_process():
            return
        save_tokenizer(tokenizer, self.model)
        shutil.rmtree(self.checkpoints / f"checkpoint-{step}", ignore_errors=True)
        self.write_facts(facts)


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics, None if it is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if is_int(step) else None


def _write(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it, so that it is never half there."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)
