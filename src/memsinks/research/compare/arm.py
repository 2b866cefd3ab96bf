"""One arm of a comparison: a way of training, run to its end on the CPU or one GPU.

seed-0/data/            the tokens that all arms of a seed train on, see `prepare`
seed-0/NAME.part/       checkpoints of a run that was cut off, every `save_every` steps
seed-0/NAME/            the finished run: model, documents, controls, run.json
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
import shutil
import statistics
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memsinks._version import versions
from memsinks.data.documents import write_documents
from memsinks.data.identity import identify
from memsinks.data.packing import Rows
from memsinks.data.tokens import save_tokenizer
from memsinks.errors import ConfigError, DataError
from memsinks.files import remove_leftovers, written_beside
from memsinks.provenance import refuse_other_settings
from memsinks.removal.export import export
from memsinks.removal.settle import repeated_and_once, require_settleable, settle, settling_texts
from memsinks.research.compare.fresh import with_fresh_text
from memsinks.research.rivals.method import EditingMethod, TrainingMethod
from memsinks.research.rivals.registry import SETTINGS_OF_A_RUN, method
from memsinks.runs.corpus import AUDITED
from memsinks.runs.estimate import meta_model
from memsinks.runs.model import build_model
from memsinks.runs.prepare import PreparedCorpus, prepare
from memsinks.runs.recipe import Recipe
from memsinks.runs.run import micro_batches, train_sinks_last
from memsinks.sinks.attach import add_sinks
from memsinks.sinks.state import has_sinks, require_sinks, shared_parameters, sink_parameters
from memsinks.training.checkpoint import Checkpoint, last_checkpoint
from memsinks.training.evaluate import AnyRows
from memsinks.training.loop import Batch, Batches, Training
from memsinks.training.loop import steps as training_steps

logger = logging.getLogger(__name__)

RUN, SETTINGS = "run.json", "settings.json"
NO_MATTER = ("recipe.training.threads", "recipe.training.save_every", "recipe.training.keep")
"""Settings that may differ between the two parts of a run that was cut off."""


@dataclass(frozen=True)
class Arm:
    """A method of `rivals` with settings, by the name it has in the table."""

    name: str
    rival: str
    settings: dict[str, Any]

    @cached_property
    def training(self) -> TrainingMethod:
        """How its model is trained: ordinarily, where it edits the model of another arm."""
        made = method(self.rival, self.settings)
        return made if isinstance(made, TrainingMethod) else TrainingMethod()

    @cached_property
    def editing(self) -> EditingMethod | None:
        """How it edits the model of another arm, if it does."""
        made = method(self.rival, self.settings)
        return made if isinstance(made, EditingMethod) else None

    @property
    def models(self) -> dict[str, str]:
        """The arm's models beyond its folder ``model``: folder -> name in the table."""
        sweep = self.editing.sweep if self.editing else ()
        return {x: f"{self.name}, rescale {x}" for x in self.training.rescales} | {
            x: f"{self.name}, {x}" for x in sweep
        }

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return "-".join("".join(x if x.isalnum() or x == "." else " " for x in self.name).split())


def train(recipe: Recipe, arm: Arm, seed: int, folder: Path, steps: int | None = None) -> dict[str, Any]:
    """Train one arm with one seed and write its folder, model last; returns its facts.

    A run that was cut off continues from its last whole checkpoint.

    Args:
        steps: stop after so many and write nothing, to see how long a step takes.

    Raises:
        CheckpointError: what lies there is of other settings, is damaged, or cannot be written.
        KeyboardInterrupt: after the step that Ctrl-C interrupted is finished and saved.
    """
    made, settings = arm.training, settings_of(recipe, arm)
    recipe = with_method(recipe, made, seed, folder)
    config, said = recipe.training, f"{arm.name}, seed {seed}"
    if config.threads:
        torch.set_num_threads(config.threads)
    if recipe.data.background is not None:  # what is wrong with the model is said before hours of reading
        meta_model(dataclasses.replace(recipe, sinks=made.sinks))
    data = folder.parent / "data"
    in_memory = steps is not None and recipe.data.background is None and not data.exists()
    prepared = prepare(recipe, one_document_per_row=True, folder=None if in_memory else data)
    if prepared.rows.masks is not None:
        raise DataError(
            "comparisons are audited as plain text; chats and prompts with completions are for memsinks train"
        )
    rows = rows_of_arm(made, prepared)
    repeated = repeated_and_once(prepared.rows)[0] if made.sinks_last else None
    texts = settling_texts(prepared.rows, prepared.unseen) if made.settle is not None else None
    random.seed(seed)
    training = training_of(recipe, made, seed, prepared)
    if texts is not None:
        require_settleable(training.model)
    part = folder.with_name(f"{folder.name}.part")
    if steps is None:
        remove_leftovers(folder.parent, folder.name, age=0)
        checkpoint = last_checkpoint(part)
        if checkpoint is not None:
            _resume(training, checkpoint, settings)
            logger.info("%s: continues after step %d of %d", said, training.step, training.total)
    at_end = training.step == training.total
    _make_steps(
        training, batches_of(prepared, rows, recipe), said, steps, None if steps is not None else part, settings
    )
    facts = _facts(arm, seed, training, prepared)
    if steps is None:
        if (texts is not None or repeated is not None) and not at_end:
            training.save(part, {"settings": settings})
        start = time.perf_counter()
        if texts is not None:
            facts["settled"] = _settle(training, made, texts, seed)
        if repeated is not None:
            facts["sinks_last"] = train_sinks_last(training.model, repeated, config, made.sinks_last)
        facts["seconds"] = round(facts["seconds"] + time.perf_counter() - start, 1)
        _save(folder, training.model.eval(), made, prepared, settings, facts)
        shutil.rmtree(part, ignore_errors=True)
    return facts


def rows_of_arm(made: TrainingMethod, prepared: PreparedCorpus) -> AnyRows:
    """The rows that an arm trains on."""
    return with_fresh_text(prepared.rows, prepared.fresh) if made.fresh else prepared.rows


def training_of(recipe: Recipe, made: TrainingMethod, seed: int, prepared: PreparedCorpus) -> Training:
    """A new model of an arm, and how it learns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = _build(recipe, made, seed, prepared.tokenizer)
    total = len(prepared.rows) // recipe.training.batch_rows
    last = made.sinks_last > 0
    return Training(model.to(device), recipe.training, total, learn=made.step, change=made.change, sinks_last=last)


def _resume(training: Training, checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
    refuse_other_settings(
        checkpoint.facts["settings"], settings, checkpoint.path.parent, kinds=SETTINGS_OF_A_RUN, ignored=NO_MATTER
    )
    training.resume(checkpoint)


def _make_steps(
    training: Training, batches: Batches, said: str, until: int | None, part: Path | None, settings: dict[str, Any]
) -> None:
    """The steps that are left; in the notes the loss of every `log_every`th and the seconds of each."""
    config = training.config
    curve, seconds = (training.notes.setdefault(name, []) for name in ("curve", "seconds"))
    for done in training_steps(training, batches, until=until, checkpoints=part, facts={"settings": settings}):
        seconds.append(done.seconds)
        if (done.step - 1) % config.log_every == 0:
            curve.append(None if math.isnan(done.loss) else round(done.loss, 4))
            logger.info(
                "%s: step %d/%d  loss %.3f  %s tokens/s  %.0f s",
                said,
                done.step - 1,
                training.total,
                done.loss,
                f"{config.batch_rows * config.length / done.seconds:,.0f}",
                sum(seconds),
            )


def _facts(arm: Arm, seed: int, training: Training, prepared: PreparedCorpus) -> dict[str, Any]:
    model, config, seconds = training.model, training.config, training.notes["seconds"]
    each, in_training = statistics.median(seconds), sum(x.numel() for x in model.parameters())
    cuda = model.device.type == "cuda"
    return {
        "arm": arm.name,
        "rival": arm.rival,
        "settings": arm.settings,
        "seed": seed,
        "steps": training.total,
        "seconds": round(sum(seconds), 1),
        "seconds_per_step": round(each, 4),
        "curve": training.notes["curve"],
        "parameters": {"training": in_training, "open": in_training - _closed_parameters(model)},
        "rows": len(prepared.rows),
        "tokens": prepared.rows.tokens,
        "tokens_per_second": round(config.batch_rows * config.length / each),
        "threads": torch.get_num_threads(),
        "precision": config.precision,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "versions": versions("torch", "transformers", "numpy"),
    }


def _settle(training: Training, made: TrainingMethod, texts: tuple[Rows, Rows, Rows | None], seed: int) -> str:
    """Settle the model; what came of it in a line."""
    assert made.settle is not None
    settled = settle(training.model, *texts, made.settle, micro_rows=training.config.micro_rows, seed=seed)
    return str(settled)


def settings_of(recipe: Recipe, arm: Arm) -> dict[str, Any]:
    """What a run of an arm depends on beside its seed, JSON-ready."""
    values = {name: value for name, value in recipe.to_dict().items() if name != "output"}
    made = arm.training
    settle = made.settle and {"lr": made.settle.lr, "passes": made.settle.passes}  # what an arm can set
    method = {"sinks": made.sinks and made.sinks.to_dict(), "sinks_first": made.sinks_first, "settle": settle}
    method |= {
        name: getattr(made, name) for name in ("sinks_first_until", "sinks_last", "fresh") if getattr(made, name)
    }
    return json.loads(json.dumps({"recipe": values, "rival": arm.rival, "settings": arm.settings, "method": method}))


def with_method(recipe: Recipe, made: TrainingMethod, seed: int, output: Path) -> Recipe:
    """The recipe with the method's extra neurons and heads, its learning rate of the sinks, and the seed."""
    config = dict(recipe.model.config)
    if made.extra_neurons:
        name = "n_inner" if "n_inner" in config else "intermediate_size"
        if name not in config:
            raise ConfigError(
                f"model.config needs intermediate_size (n_inner for gpt2), to which {made.extra_neurons} neurons are added"
            )
        config[name] += made.extra_neurons
        if config[name] < 1:
            raise ConfigError(
                f"extra_neurons {made.extra_neurons} leaves no general neurons of {config[name] - made.extra_neurons}"
            )
    if made.heads:
        config["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        config["num_attention_heads"] += made.heads
        config["num_key_value_heads"] = config["num_attention_heads"]
    return dataclasses.replace(
        recipe,
        output=str(output),
        model=dataclasses.replace(recipe.model, config=config),
        training=dataclasses.replace(
            recipe.training,
            seed=seed,
            sink_lr_factor=made.sink_lr_factor,
            sinks_first=made.sinks_first,
            sinks_first_until=made.sinks_first_until,
        ),
    )


def recipe_of_arm(recipe: Recipe, arm: Arm) -> Recipe:
    """What an arm makes of the recipe of its comparison, for an estimate."""
    made = arm.training
    return dataclasses.replace(with_method(recipe, made, 0, Path()), sinks=made.sinks, settle=made.settle)


def _build(recipe: Recipe, made: TrainingMethod, seed: int, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    model = build_model(recipe, tokenizer)
    if made.sinks is not None:
        add_sinks(model, dataclasses.replace(made.sinks, seed=seed))
    return model


def batches_of(prepared: PreparedCorpus, rows: AnyRows, recipe: Recipe) -> Batches:
    """Micro-batches with the masks of `rivals.method.Batch`."""
    audited = [x for x in prepared.members if x.kind == AUDITED]
    sides = {"audited": audited, "repeated": [x for x in audited if x.copies > 1]}
    asked = {name: torch.from_numpy(identify(side, recipe.data.by)[0]) for name, side in sides.items()}
    plain = micro_batches(rows, recipe.training)

    def masked(batch: Batch) -> Batch:
        return batch | {name: torch.isin(batch["document_ids"], ids) for name, ids in asked.items()}

    return lambda step: [masked(batch) for batch in plain(step)]


def _closed_parameters(model: PreTrainedModel) -> int:
    """Sink parameters that no document of one token opens."""
    if not has_sinks(model):
        return 0
    config = require_sinks(model).config
    total = sum(x.numel() for x in sink_parameters(model))
    return total - round(total * config.active / config.neurons)


def _save(
    folder: Path,
    model: PreTrainedModel,
    made: TrainingMethod,
    prepared: PreparedCorpus,
    settings: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    with written_beside(folder) as part:
        if has_sinks(model):
            model.save_pretrained(part / "model")
            save_tokenizer(prepared.tokenizer, part / "model")
            for rescale in made.rescales:
                export(model, part / rescale, tokenizer=prepared.tokenizer, rescale=rescale, verify=False)
            exported = sum(x.numel() for x in shared_parameters(model))
        else:
            made.remove(model)
            model.save_pretrained(part / "model")
            save_tokenizer(prepared.tokenizer, part / "model")
            exported = sum(x.numel() for x in model.parameters())
        facts["parameters"]["exported"] = exported
        write_documents(part / "documents.jsonl", [x for x in prepared.members if x.kind == AUDITED])
        write_documents(part / "controls.jsonl", prepared.controls)
        (part / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
        (part / RUN).write_text(json.dumps(facts, indent=2) + "\n")
