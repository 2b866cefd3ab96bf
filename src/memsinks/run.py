"""One run of a recipe: corpus -> rows -> model -> training -> a run folder.

output/recipe.yaml       the recipe, all defaults written out
output/run.json          versions, seed, counts, hashes, times
output/metrics.jsonl     a line each log_every steps
output/members.jsonl     every document trained on, with its copies; output/controls.jsonl the held-out ones
output/checkpoints/      what training resumes from
output/model/            the final model with its sinks and tokenizer
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import random
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from ._version import __version__
from .attach import add_sinks, has_sinks
from .checkpoint import load_stock
from .config import CheckpointError, ConfigError, DataError
from .documents import Document, cut_documents, read_documents, require_unique_keys, texts_hash, write_documents
from .families import ISOLATES_PACKED
from .identity import equal_repetition, exposures, identify, training_order
from .optim import AdamW, param_groups
from .packing import Rows, collate, pack
from .recipe import DataRecipe, Recipe, TrainingRecipe
from .synthetic import corpus
from .tokens import encode, load_tokenizer, train_tokenizer
from .training import ProgressCallback, SinkCallback


@dataclass(frozen=True)
class Prepared:
    """The corpus of a run: training rows, the documents in them, the held-out documents, the tokenizer."""

    rows: Rows
    members: list[Document]
    controls: list[Document]
    tokenizer: PreTrainedTokenizerBase


def choose_documents(data: DataRecipe, seed: int) -> list[Document]:
    """Read the corpus and give every document its number of copies; held-out documents get 0."""
    if data.path is None:
        documents = corpus(**data.synthetic)
    else:
        path = os.path.expandvars(data.path)
        if "$" in path:
            raise ConfigError(f"data.path {data.path!r} names an environment variable that is not set")
        found = read_documents(
            path, text_field=data.text_field, key_field=data.key_field, source_field=data.source_field,
            copies_field=data.copies_field, separator=data.separator, split=data.split, streaming=data.streaming,
        )  # fmt: skip
        if data.cut_characters is not None:
            found = cut_documents(found, data.cut_characters)
        documents = list(itertools.islice(found, data.limit))
    if data.unique_keys:
        require_unique_keys(documents)
    rng = random.Random(seed)
    order = [index for index, document in enumerate(documents) if document.copies > 0]
    rng.shuffle(order)
    # A text that stands in the corpus twice cannot be held out by taking one of them.
    times = Counter(document.text for document in documents)
    held_out = [index for index in order if times[documents[index].text] == 1][: data.held_out]
    chosen = set(held_out)
    rest = [index for index in order if index not in chosen]
    repeated = data.repeat.documents if data.repeat else 0
    if len(held_out) < data.held_out or repeated > len(rest) - 1:
        raise ConfigError(
            f"held_out ({data.held_out}) and repeat.documents ({repeated}) leave none of {len(order)} documents "
            f"({len(times)} different texts) to be seen once; lower them"
        )
    for index in held_out:
        documents[index] = replace(documents[index], copies=0)
    if data.repeat:
        copies = data.repeat.copies if isinstance(data.repeat.copies, list) else [data.repeat.copies]
        for place, index in enumerate(rest[:repeated]):
            documents[index] = replace(documents[index], copies=copies[place % len(copies)], kind=AUDITED)
    return documents


AUDITED = "audited"
"""The kind of the documents that ``data.repeat`` chose."""


def prepare(recipe: Recipe, one_document_per_row: bool = False) -> Prepared:
    """Documents -> identity -> training order -> exposures -> rows."""
    data, training = recipe.data, recipe.training
    documents = choose_documents(data, training.seed)
    members = [document for document in documents if document.copies > 0]
    controls = [document for document in documents if document.copies == 0]
    if recipe.tokenizer.path is not None:
        tokenizer = load_tokenizer(os.path.expandvars(recipe.tokenizer.path))
    else:
        assert recipe.tokenizer.vocab_size is not None
        tokenizer = train_tokenizer([document.text for document in members], recipe.tokenizer.vocab_size)
    order = training_order(members, training.seed, training.epochs)
    ids, groups = identify(members, data.identity)
    met = groups[order]
    counts = exposures(met)
    same = equal_repetition(met)
    if same and recipe.sinks and recipe.sinks.shared == "decay" and recipe.sinks.shared_decay:
        warnings.warn(
            f"every document is met {same} times: w(c) is then nearly the same for all tokens of a step, and AdamW divides "
            "a common factor out, so shared_decay does little (plain multi-epoch training)",
            stacklevel=2,
        )
    tokens = encode(tokenizer, [document.text for document in members])
    rows = pack(
        [tokens[index] for index in order],
        ids[order],
        counts,
        length=training.length,
        pad_id=int(tokenizer.pad_token_id),  # type: ignore[arg-type]
        apart_from=recipe.sinks.open_from if recipe.sinks and recipe.sinks.shared == "none" else None,
        one_document_per_row=one_document_per_row or _model_type(recipe) not in ISOLATES_PACKED,
        long=data.long,
    )
    if len(rows) < training.batch_rows:
        raise DataError(f"the corpus fills {len(rows)} rows, one step needs {training.batch_rows}; lower batch_rows")
    return Prepared(rows, members, controls, tokenizer)


def _model_type(recipe: Recipe) -> str:
    if recipe.model.pretrained is None:
        return str(recipe.model.config["model_type"])
    try:
        return str(AutoConfig.from_pretrained(recipe.model.pretrained).model_type)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load a model from {recipe.model.pretrained}: {error}") from error


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model of a recipe, with its sinks if it has any."""
    if recipe.model.pretrained is not None:
        model = load_stock(recipe.model.pretrained)
    else:
        settings = {
            "vocab_size": len(tokenizer), "max_position_embeddings": recipe.training.length,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id, **recipe.model.config,
        }  # fmt: skip
        kind = settings.pop("model_type")
        torch.manual_seed(recipe.training.seed)
        try:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
        except Exception as error:  # transformers and huggingface_hub raise some ten unrelated types here
            raise ConfigError(f"model.config gives no model: {error}") from error
    embeddings = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if len(tokenizer) > embeddings:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, the model has embeddings for {embeddings}; use the model's own "
            "tokenizer, or leave vocab_size out of model.config"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and context < recipe.training.length:
        raise ConfigError(
            f"training.length is {recipe.training.length}, but the model's context ends at {context} tokens; shorten rows"
        )
    if recipe.sinks is not None:
        print(add_sinks(model, recipe.sinks), flush=True)
    if recipe.training.gradient_checkpointing:
        getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )()  # renamed in transformers 5.23
    return model


def train(recipe: Recipe, *, resume: bool = False, label: str = "") -> Path:
    """Run a recipe to the end.

    Args:
        recipe: what to do.
        resume: continue the run in ``recipe.output`` from its last complete checkpoint.
        label: stands before each progress line.

    Returns:
        The folder of the final model, ``output/model``.

    Raises:
        ConfigError, DataError, ArchitectureError, CheckpointError: before training starts.
    """
    output = Path(recipe.output)
    final = output / "model"
    _check_output(recipe, output, resume)
    if resume and "seconds" in _run_facts(output):
        print(f"{output} is finished; nothing to resume", flush=True)
        return final
    if recipe.training.threads:
        torch.set_num_threads(recipe.training.threads)
    transformers.utils.logging.disable_progress_bar()
    prepared = prepare(recipe)
    model = build_model(recipe, prepared.tokenizer)
    started = time.time()
    trainer = _trainer(recipe, model, prepared, output, label)
    checkpoint = _last_checkpoint(output / "checkpoints") if resume else None
    if resume and checkpoint is None:
        print("no complete checkpoint yet: starting again from the beginning", flush=True)
    if checkpoint is None:
        _write_start(recipe, prepared, output)
    else:
        _check_corpus(recipe, prepared, output)
    (output / "metrics.jsonl").touch()
    _cut_metrics(output / "metrics.jsonl", int(checkpoint.name.split("-")[1]) if checkpoint else 0)
    trainer.args.resume_from_checkpoint = str(checkpoint) if checkpoint else None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.save_pretrained(final)
    prepared.tokenizer.save_pretrained(final)
    facts = _run_facts(output) | {"seconds": round(time.time() - started, 1)}
    (output / "run.json").write_text(json.dumps(facts, indent=2) + "\n")
    return final


def _run_facts(output: Path) -> dict[str, Any]:
    path = output / "run.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _check_output(recipe: Recipe, output: Path, resume: bool) -> None:
    if resume:
        path = output / "recipe.yaml"
        if not path.is_file():
            raise CheckpointError(f"{output} holds no run to resume (recipe.yaml is missing); start without resume")
        before, now = yaml.safe_load(path.read_text()), yaml.safe_load(yaml.safe_dump(recipe.to_dict()))
        if before != now:
            raise CheckpointError(
                f"{path} differs from this recipe in {', '.join(differing(before, now))}; resume with the same recipe and "
                "the same --set, or choose another output"
            )
    elif output.exists() and any(output.iterdir()):
        raise CheckpointError(f"{output} is not empty; resume the run, or choose another output")


def differing(before: Any, now: Any, name: str = "") -> list[str]:
    """The dotted names of the settings in which two recipes (as dicts) differ."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if before == now else [name]
    keys = sorted(set(before) | set(now))
    return [x for key in keys for x in differing(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))]


def rows_per_step(training: TrainingRecipe) -> int:
    """Rows of one optimizer step over all processes that torchrun started."""
    return training.batch_rows * int(os.environ.get("WORLD_SIZE", "1"))


def _trainer(recipe: Recipe, model: PreTrainedModel, prepared: Prepared, output: Path, label: str) -> Trainer:
    training = recipe.training
    step_rows = rows_per_step(training)
    steps = len(prepared.rows) // step_rows
    args = transformers.TrainingArguments(
        output_dir=str(output / "checkpoints"),
        per_device_train_batch_size=training.batch_rows // training.accumulate,
        gradient_accumulation_steps=training.accumulate,
        max_steps=steps,
        learning_rate=training.lr,
        max_grad_norm=training.max_grad_norm,
        bf16=training.precision == "bf16",
        seed=training.seed,
        train_sampling_strategy="sequential",
        logging_steps=training.log_every,
        save_strategy="steps" if training.save_every else "no",
        save_steps=training.save_every or 500,
        save_total_limit=training.keep,
        disable_tqdm=True,
        remove_unused_columns=False,
        report_to=[],
        dataloader_num_workers=0,
        use_cpu=not torch.cuda.is_available(),
    )
    optimizer, scheduler = optimizer_and_schedule(model, training, steps)

    def record(line: dict[str, Any]) -> None:
        with (output / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    callbacks: list[Any] = [ProgressCallback(step_rows * training.length, record, label)]
    if has_sinks(model):
        callbacks.append(SinkCallback())
    trainer = Trainer(
        model, args, train_dataset=prepared.rows, data_collator=collate if has_sinks(model) else _collate_stock,  # type: ignore
        optimizers=(optimizer, scheduler), callbacks=callbacks,
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def optimizer_and_schedule(
    model: PreTrainedModel, training: TrainingRecipe, steps: int
) -> tuple[AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with the groups of a recipe, with or without sinks; linear warm-up, then a cosine over the rest of `steps`."""
    if has_sinks(model):
        groups = param_groups(model, training.lr, training.weight_decay, training.sink_lr_factor)
    else:
        matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=training.lr, betas=(training.betas[0], training.betas[1]))
    warmup = round(steps * training.warmup)

    def cosine(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        share = (step - warmup) / max(1, steps - warmup)
        return training.min_lr_ratio + (1 - training.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)


def stock_arguments(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a model without sinks takes of a batch of `collate`."""
    return {name: batch[name] for name in ("input_ids", "labels", "position_ids")}


def _collate_stock(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return stock_arguments(collate(rows))


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end (the Trainer writes trainer_state.json last but its arguments)."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def _cut_metrics(path: Path, step: int) -> None:
    """Keep the lines up to `step`; the last one may have been cut off while it was written."""
    whole = [line for line in path.read_text().split("\n") if line.endswith("}")]
    path.write_text("".join(line + "\n" for line in whole if json.loads(line)["step"] <= step))


def _write_start(recipe: Recipe, prepared: Prepared, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    (output / "run.json").write_text(json.dumps(_facts(recipe, prepared), indent=2) + "\n")
    for name, documents in (("members", prepared.members), ("controls", prepared.controls)):
        write_documents(output / f"{name}.jsonl", documents)


def _facts(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    rows = prepared.rows
    packages = ("torch", "transformers", "accelerate", "tokenizers", "numpy", "safetensors")
    return {
        "seed": recipe.training.seed,
        "documents": len(prepared.members), "controls": len(prepared.controls),
        "rows": len(rows), "rows_left_out": len(rows) % rows_per_step(recipe.training),
        "tokens": rows.tokens, "fill": round(rows.fill, 4),
        "corpus_sha256": texts_hash(prepared.members),
        "versions": {"memsinks": __version__, "python": platform.python_version()}
        | {name: version(name) for name in packages},
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def _check_corpus(recipe: Recipe, prepared: Prepared, output: Path) -> None:
    before = _run_facts(output).get("corpus_sha256", "")
    now = _facts(recipe, prepared)["corpus_sha256"]
    if before != now:
        raise CheckpointError(
            f"the corpus has changed since {output} was started (SHA-256 {before[:12]}..., now {now[:12]}...); restore it, "
            "or start a new run"
        )
