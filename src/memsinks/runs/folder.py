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
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memsinks.data.documents import Document, write_documents
from memsinks.errors import CheckpointError
from memsinks.files import remove_leftovers, write_json
from memsinks.provenance import refuse_other_settings
from memsinks.runs.recipe import Recipe
from memsinks.training.processes import main_process

RECIPE, FACTS = "recipe.yaml", "run.json"
WRITTEN = ("data", "model", RECIPE, FACTS)
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
        return self.path / "metrics.jsonl"

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return "seconds" in self.facts()

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
            before = dict(yaml.safe_load(path.read_text()))
        except (yaml.YAMLError, ValueError, TypeError) as error:
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
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.path / RECIPE, yaml.safe_dump(recipe.to_dict(), sort_keys=False))
        self.write_facts(facts)
        for name, documents in (("members", members), ("controls", controls)):
            write_documents(self.path / f"{name}.jsonl", documents)
        self.cut_metrics(0)

    def facts(self) -> dict[str, Any]:
        """What run.json says, {} if it is not there; CheckpointError if it is damaged."""
        path = self.path / FACTS
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); restore it, or start a new run") from error

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        write_json(self.path / FACTS, dict(facts))

    def require_corpus(self, digest: str) -> None:
        """CheckpointError if the run was started on another corpus (SHA-256)."""
        before = self.facts().get("corpus_sha256", "")
        if before != digest:
            raise CheckpointError(
                f"the corpus has changed since {self.path} was started (SHA-256 {before[:12]}..., now {digest[:12]}...); "
                "restore it, or start a new run"
            )

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(dict(line)) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Keep the lines up to `step`; the last one may have been cut off while it was written."""
        lines = self.metrics.read_text().split("\n") if self.metrics.is_file() else []
        whole = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        self.metrics.write_text("".join(line + "\n" for line in whole))

    def finish(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Mapping[str, Any]) -> None:
        """Write the final model, and that the run is finished; every process of a sharded model must call this."""
        model.save_pretrained(self.model)
        if not main_process():
            return
        tokenizer.save_pretrained(self.model)
        self.write_facts(facts)

    def drop_checkpoint(self, step: int) -> None:
        """Remove the checkpoint of the last step: the model itself is there."""
        shutil.rmtree(self.checkpoints / f"checkpoint-{step}", ignore_errors=True)


def _write(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that it is never half there."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    part.write_text(text)
    part.replace(path)
