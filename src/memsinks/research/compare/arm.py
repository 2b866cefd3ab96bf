"""One arm of a comparison: a way of training, run to its end on the CPU or one GPU.

seed-0/data/            the tokens that all arms of a seed train on, see `prepared`
seed-0/NAME.part/       what a run that was cut off continues from, every `save_every` steps
seed-0/NAME/            the finished run: model, documents, controls, run.json
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memsinks._version import versions
from memsinks.batch import collate, target_count
from memsinks.data.documents import write_documents
from memsinks.data.identity import identify
from memsinks.errors import CheckpointError, ConfigError
from memsinks.files import written_beside
from memsinks.removal.export import export
from memsinks.removal.settle import require_settleable, settle, settling_texts
from memsinks.research.rivals.method import Batch, EditingMethod, TrainingMethod
from memsinks.research.rivals.registry import method
from memsinks.runs.estimate import meta_model
from memsinks.runs.prepare import AUDITED, Prepared, prepare
from memsinks.runs.recipe import Recipe, SettleRecipe, TrainingRecipe
from memsinks.runs.run import build_model, optimizer_and_schedule
from memsinks.runs.sections import differing
from memsinks.sinks.attach import add_sinks
from memsinks.sinks.state import has_sinks, require_sinks, shared_parameters, sink_parameters
from memsinks.training.first import sinks_first
from memsinks.training.optim import clip_grad_norm_

RUN, SETTINGS, STATE = "run.json", "settings.json", "state.pt"
NO_MATTER = ("training.threads", "training.save_every", "training.keep")
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

    A step is `accumulate` micro-batches whose gradients add up; the divisor of the loss is the targets of the whole step.
    With precision bf16 the forward runs under autocast, weights and moments stay float32. A run that was cut off continues
    from its last checkpoint to the same bits (on the CPU; on a GPU as far as its kernels repeat their bits).

    Args:
        steps: stop after so many and write nothing, to see how long a step takes.

    Raises:
        CheckpointError: what lies there is of other settings, is damaged, or cannot be written.
    """
    made, settings = arm.training, settings_of(recipe, arm)
    recipe = with_method(recipe, made, seed, folder)
    training = recipe.training
    if training.threads:
        torch.set_num_threads(training.threads)
    if recipe.data.background is not None:
        meta_model(
            dataclasses.replace(recipe, sinks=made.sinks)
        )  # what is wrong with the model is said before hours of reading
    data = folder.parent / "data"
    in_memory = steps is not None and recipe.data.background is None and not data.exists()
    prepared = prepare(recipe, one_document_per_row=True, folder=None if in_memory else data)
    texts = settling_texts(prepared.rows, prepared.unseen) if made.settle is not None else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    random.seed(seed)
    model: Any = _build(recipe, made, seed, prepared.tokenizer).to(device)  # type: ignore[arg-type]
    total = len(prepared.rows) // training.batch_rows
    optimizer, scheduler = optimizer_and_schedule(model, training, total)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    asked = _asked_ids(prepared, recipe)
    if made.settle is not None:
        require_settleable(model)
    in_training = sum(x.numel() for x in model.parameters())
    part = folder.with_name(f"{folder.name}.part")
    done = _load(part, settings, parts) if steps is None else None
    first, curve, seconds = done or (0, [], [])
    if first:
        print(f"{arm.name}, seed {seed}: continues after step {first} of {total}", flush=True)
    use_cache = getattr(model.config, "use_cache", None)
    _set_up(model.train(), training, device)
    for step in range(first, total if steps is None else min(steps, total)):
        start = time.perf_counter()
        batch = _batch(prepared, step, training.batch_rows, asked)
        loss = _update(model, optimizer, made, batch, training, device)
        scheduler.step()
        seconds.append(time.perf_counter() - start)
        if step % training.log_every == 0:
            curve.append(round(loss, 4))
            rate = training.batch_rows * training.length / seconds[-1]
            print(
                f"{arm.name}, seed {seed}: step {step}/{total}  loss {loss:.3f}  {rate:,.0f} tokens/s  {sum(seconds):.0f} s",
                flush=True,
            )
        if steps is None and training.save_every and (step + 1) % training.save_every == 0 and step + 1 < total:
            _store(part, settings, parts, (step + 1, curve, seconds))
    each = statistics.median(seconds)
    facts = {
        "arm": arm.name, "rival": arm.rival, "settings": arm.settings, "seed": seed, "steps": total,
        "seconds": round(sum(seconds), 1), "seconds_per_step": round(each, 4), "curve": curve,
        "parameters": {"training": in_training, "open": in_training - _closed_parameters(model)},
        "rows": len(prepared.rows), "tokens": prepared.rows.tokens,
        "tokens_per_second": round(training.batch_rows * training.length / each),
        "threads": torch.get_num_threads(), "precision": training.precision, "device": _device_name(device),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "versions": versions("torch", "transformers", "numpy"),
    }  # fmt: skip
    if steps is None:
        _take_down(model, use_cache)
        if made.settle is not None and texts is not None:
            _store(part, settings, parts, (total, curve, seconds))
            start, micro = time.perf_counter(), training.batch_rows // training.accumulate
            found = settle(model, *texts, micro_rows=micro, seed=seed, say=print, **made.settle)
            facts["settled"] = str(found)
            facts["seconds"] = round(facts["seconds"] + time.perf_counter() - start, 1)
        _save(folder, model.eval(), made, prepared, settings, facts)
        shutil.rmtree(part, ignore_errors=True)
    return facts


def _update(
    model: Any,
    optimizer: torch.optim.Optimizer,
    made: TrainingMethod,
    batch: Batch,
    training: TrainingRecipe,
    device: torch.device,
) -> float:
    """One optimizer step over the micro-batches of `batch`; returns the loss, nats."""
    divisor = torch.tensor(target_count(batch["labels"]))
    loss, each = 0.0, training.batch_rows // training.accumulate
    parts = [
        made.change({name: x[start : start + each].to(device, non_blocking=True) for name, x in batch.items()})
        for start in range(0, training.batch_rows, each)
    ]
    if made.sinks_first:
        sinks_first(model, optimizer, parts, max_norm=training.max_grad_norm, num_items_in_batch=divisor)
    for micro in parts:
        loss += made.step(model, micro, divisor)
    clip(model, training.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def step_seconds(recipe: Recipe, arms: Sequence[Arm], seed: int, turns: int) -> dict[str, list[float]]:
    """Seconds of single steps of untrained models, by the name of the arm; the arms take turns on the same batches.

    Args:
        turns: steps timed; their batches are spread over the run. One more comes first and is not counted.
    """
    training = recipe.training
    if training.threads:
        torch.set_num_threads(training.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepared = prepare(with_method(recipe, TrainingMethod(), seed, Path(recipe.output)), one_document_per_row=True)
    total = len(prepared.rows) // training.batch_rows
    asked, ready = _asked_ids(prepared, recipe), {}
    for arm in arms:
        made = arm.training
        model: Any = _build(with_method(recipe, made, seed, Path()), made, seed, prepared.tokenizer).to(device)  # type: ignore
        optimizer, _ = optimizer_and_schedule(model, training, total)
        _set_up(model.train(), training, device)
        ready[arm.name] = (model, optimizer, made)
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for turn in range(-1, turns):
        batch = _batch(prepared, max(turn, 0) * total // turns, training.batch_rows, asked)
        for name, (model, optimizer, made) in ready.items():
            start = time.perf_counter()
            _update(model, optimizer, made, batch, training, device)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def settings_of(recipe: Recipe, arm: Arm) -> dict[str, Any]:
    """What a run of an arm depends on beside its seed, JSON-ready."""
    values = {name: value for name, value in recipe.to_dict().items() if name != "output"}
    made = arm.training
    method = {"sinks": made.sinks and made.sinks.to_dict(), "sinks_first": made.sinks_first, "settle": made.settle}
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
        config["num_key_value_heads"] = config.get("num_key_value_heads", config["num_attention_heads"]) + made.heads
    return dataclasses.replace(
        recipe, output=str(output), model=dataclasses.replace(recipe.model, config=config),
        training=dataclasses.replace(
            recipe.training, seed=seed, sink_lr_factor=made.sink_lr_factor, sinks_first=made.sinks_first
        ),
    )  # fmt: skip


def recipe_of_arm(recipe: Recipe, arm: Arm) -> Recipe:
    """What an arm makes of the recipe of its comparison, for an estimate."""
    made = arm.training
    settle = None if made.settle is None else SettleRecipe()
    return dataclasses.replace(with_method(recipe, made, 0, Path()), sinks=made.sinks, settle=settle)


def _build(recipe: Recipe, made: TrainingMethod, seed: int, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    model = build_model(recipe, tokenizer)
    if made.sinks is not None:
        add_sinks(model, dataclasses.replace(made.sinks, seed=seed))
    return model


def _set_up(model: Any, training: TrainingRecipe, device: torch.device) -> None:
    """No cache, with which packed documents see each other; autocast around the forward only; compilation."""
    model.config.use_cache = False
    if training.precision == "bf16":
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
    if training.compile:
        model.compile()


def _take_down(model: Any, use_cache: Any) -> None:
    if use_cache is not None:
        model.config.use_cache = use_cache
    vars(model).pop("forward", None)
    model._compiled_call_impl = None


def _asked_ids(prepared: Prepared, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Ids of the audited documents and of those of them with 2 copies or more, int64."""
    audited = [x for x in prepared.members if x.kind == AUDITED]
    sides = {"audited": audited, "repeated": [x for x in audited if x.copies > 1]}
    return {name: torch.from_numpy(identify(side, recipe.data.by)[0]) for name, side in sides.items()}


def _batch(prepared: Prepared, step: int, size: int, asked: Mapping[str, torch.Tensor]) -> Batch:
    batch = collate([prepared.rows[index] for index in range(step * size, (step + 1) * size)])
    return batch | {name: torch.isin(batch["document_ids"], ids) for name, ids in asked.items()}


def clip(model: PreTrainedModel, norm: float) -> None:
    """Clip gradient norms, those of sinks apart if there are any; 0 = no clipping."""
    if not norm:
        return
    if has_sinks(model):
        clip_grad_norm_(model, norm)
    else:
        torch.nn.utils.clip_grad_norm_(model.parameters(), norm)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


def _closed_parameters(model: PreTrainedModel) -> int:
    """Sink parameters that no document of one token opens."""
    if not has_sinks(model):
        return 0
    config = require_sinks(model).config
    total = sum(x.numel() for x in sink_parameters(model))
    return total - round(total * config.active / config.neurons)


# What is written


Progress = tuple[int, list[float], list[float]]
"""Steps done, losses logged, seconds of each step."""


def _store(part: Path, settings: dict[str, Any], parts: dict[str, Any], done: Progress) -> None:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    state = {name: x.state_dict() for name, x in parts.items()}
    state |= {"settings": settings, "done": done, "random": (random.getstate(), torch.get_rng_state(), cuda)}
    with written_beside(part) as beside:
        try:
            torch.save(state, beside / STATE)
        except RuntimeError as error:  # what torch raises when the disk is full
            raise OSError(str(error)) from error


def _load(part: Path, settings: dict[str, Any], parts: dict[str, Any]) -> Progress | None:
    path = part / STATE
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle, zip and torch raise half a dozen types
        raise CheckpointError(f"{path} cannot be read ({error}); remove {part} to start this arm again") from error
    other = [x for x in differing(state["settings"], settings) if x.removeprefix("recipe.") not in NO_MATTER]
    if other:
        raise CheckpointError(
            f"{part} was started with other settings ({', '.join(other)}); remove it, or choose another output"
        )
    for name, x in parts.items():
        x.load_state_dict(state[name])
    python, cpu, cuda = state["random"]
    random.setstate((python[0], tuple(python[1]), python[2]))
    torch.set_rng_state(cpu)
    if cuda and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
    step, curve, seconds = state["done"]
    return step, list(curve), list(seconds)


def _save(
    folder: Path,
    model: PreTrainedModel,
    made: TrainingMethod,
    prepared: Prepared,
    settings: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    with written_beside(folder) as part:
        if has_sinks(model):
            model.save_pretrained(part / "model")
            prepared.tokenizer.save_pretrained(part / "model")
            for rescale in made.rescales:
                export(model, part / rescale, tokenizer=prepared.tokenizer, rescale=rescale, verify=False)
            exported = sum(x.numel() for x in shared_parameters(model))
        else:
            made.remove(model)
            model.save_pretrained(part / "model")
            prepared.tokenizer.save_pretrained(part / "model")
            exported = sum(x.numel() for x in model.parameters())
        facts["parameters"]["exported"] = exported
        write_documents(part / "documents.jsonl", [x for x in prepared.members if x.kind == AUDITED])
        write_documents(part / "controls.jsonl", prepared.controls)
        (part / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
        (part / RUN).write_text(json.dumps(facts, indent=2) + "\n")
