"""One run of a recipe: corpus -> rows -> model -> training -> a run folder.

output/recipe.yaml       the recipe, all defaults written out
output/run.json          versions, seed, counts, hashes, times
output/metrics.jsonl     a line each log_every steps
output/members.jsonl     every document trained on, with its copies; output/controls.jsonl the held-out ones
output/data/             the tokens, where there is a background; see `prepared`
output/checkpoints/      what training resumes from
output/unsettled/        the trained model, while it is settled
output/model/            the final model with its sinks and tokenizer, settled if the recipe says so
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from memsinks._version import versions
from memsinks.batch import collate, stock_arguments
from memsinks.data.documents import texts_hash, write_documents
from memsinks.errors import CheckpointError, ConfigError
from memsinks.files import written_beside
from memsinks.removal.settle import require_settleable, settle, settling_texts
from memsinks.runs.prepare import Prepared, prepare
from memsinks.runs.recipe import Recipe, TrainingRecipe
from memsinks.runs.sections import differing
from memsinks.sinks.attach import add_sinks
from memsinks.sinks.checkpoint import load_any, load_stock
from memsinks.sinks.state import has_sinks
from memsinks.training.optim import AdamW, param_groups
from memsinks.training.trainer import ProgressCallback, SinkCallback, SinkTrainer

UNSETTLED = "unsettled"


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
        enable = getattr(model, "activation_checkpointing_enable", None)  # renamed in transformers 5.23
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
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
    prepared = prepare(recipe, folder=output / "data" if recipe.data.background else None)
    texts = settling_texts(prepared.rows, prepared.unseen) if recipe.settle is not None else None
    model = build_model(recipe, prepared.tokenizer)
    if recipe.settle is not None:
        require_settleable(model)
    started = time.time()
    trainer = _trainer(recipe, model, prepared, output, label)
    unsettled = output / UNSETTLED
    checkpoint = _last_checkpoint(output / "checkpoints") if resume else None
    if resume and checkpoint is None and not unsettled.is_dir():
        print("no complete checkpoint yet: starting again from the beginning", flush=True)
    if checkpoint is None and not unsettled.is_dir():
        _write_start(recipe, prepared, output)
    else:
        _check_corpus(recipe, prepared, output)
    (output / "metrics.jsonl").touch()
    steps, done = trainer.args.max_steps, int(checkpoint.name.split("-")[1]) if checkpoint else 0
    ended = unsettled if unsettled.is_dir() else checkpoint if done >= steps else None
    _cut_metrics(output / "metrics.jsonl", steps if ended else done)
    if ended is not None:  # the Trainer would take one step more
        model = load_any(ended).to(trainer.args.device)  # type: ignore[arg-type]
    else:
        trainer.args.resume_from_checkpoint = str(checkpoint) if checkpoint else None
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    facts = _run_facts(output)
    if recipe.settle is not None and texts is not None:
        if ended is None:
            with written_beside(unsettled) as part:
                model.save_pretrained(part)
        training = recipe.training
        micro, settings = training.batch_rows // training.accumulate, recipe.settle.after_training(training.lr)
        found = settle(model, *texts, settings, micro_rows=micro, seed=training.seed)
        facts["settled"] = str(found)
    model.save_pretrained(final)
    prepared.tokenizer.save_pretrained(final)
    facts |= {"seconds": round(time.time() - started, 1)}
    (output / "run.json").write_text(json.dumps(facts, indent=2) + "\n")
    shutil.rmtree(unsettled, ignore_errors=True)
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
    elif output.exists() and any(path.name != "data" for path in output.iterdir()):
        raise CheckpointError(f"{output} is not empty; resume the run, or choose another output")


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
        torch_compile=training.compile,
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
    kind = SinkTrainer if training.sinks_first and has_sinks(model) else Trainer
    trainer = kind(
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
        "versions": versions(*packages),
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
