"""One run of a recipe: corpus -> rows -> model -> training -> a run folder (see `folder`)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from memsinks._version import versions
from memsinks.batch import collate
from memsinks.data.documents import Document
from memsinks.data.identity import By
from memsinks.data.packing import Rows
from memsinks.data.stored import tokenizer_hash
from memsinks.errors import DataError
from memsinks.removal.settle import repeated_and_once, require_settleable, settle, settling_texts
from memsinks.runs.folder import RunFolder
from memsinks.runs.model import build_model, check_model
from memsinks.runs.prepare import PreparedCorpus, prepare
from memsinks.runs.recipe import OwnRecipe, Recipe
from memsinks.runs.stored import identity_hash, ids_of, members_hash
from memsinks.sinks.own import assign
from memsinks.training.checkpoint import last_checkpoint
from memsinks.training.config import TrainingConfig
from memsinks.training.evaluate import AnyRows
from memsinks.training.last import PASSES, require_one_text_each, sinks_last
from memsinks.training.loop import Batches, Training, steps
from memsinks.training.prefix import prefix_kept
from memsinks.training.processes import joined_processes, main_process, main_process_first, process_count, process_rank

logger = logging.getLogger(__name__)


def train(recipe: Recipe, *, resume: bool = False, label: str = "", after: float = 0.0) -> Path:
    """Run a recipe to the end.

    Under torchrun its processes train together, each on `batch_rows` rows of every step, with a copy of the model each or, with
    ``training.shard``, a part of it; the first one settles and writes, which the others wait for where the model is sharded.

    Args:
        recipe: what to do.
        resume: continue the run in ``recipe.output`` from its last whole checkpoint.
        label: stands before each line of progress.
        after: how long what comes after takes, in times of the steps of this run; the time left that is said counts it.

    Returns:
        The folder of the final model, ``output/model``.

    Raises:
        ConfigError, DataError, ArchitectureError, CheckpointError: before training starts.
        KeyboardInterrupt: after the step that Ctrl-C interrupted is finished and saved; resume goes on from there.
    """
    folder = RunFolder(Path(recipe.output))
    with joined_processes() as device, folder.held() if main_process() else nullcontext():
        if main_process():
            folder.open_again(recipe) if resume else folder.open_new()
        if resume and folder.finished:
            logger.info("%s is finished; nothing to resume", folder.path)
            return folder.model
        if recipe.training.threads:
            torch.set_num_threads(recipe.training.threads)
        transformers.utils.logging.disable_progress_bar()
        with main_process_first():
            check_model(recipe)
            prepared = prepare(recipe, folder=folder.data if recipe.data.background else None)
        texts = settling_texts(prepared.rows, prepared.unseen) if recipe.settle is not None else None
        repeated = _texts_of_sinks(recipe, prepared.rows)
        model: Any = build_model(recipe, prepared.tokenizer)
        if recipe.own is not None:
            _give_own_blocks(model, recipe.own, prepared.members, recipe.data.by)
        if texts is not None:
            require_settleable(model)
        transformers.set_seed(recipe.training.seed)
        steps_of_all = len(prepared.rows) // rows_per_step(recipe.training)
        if not steps_of_all:
            raise DataError(
                f"the corpus fills {len(prepared.rows)} rows, one step of {process_count()} processes needs "
                f"{rows_per_step(recipe.training)}; lower batch_rows"
            )
        if main_process() and (left := len(prepared.rows) % rows_per_step(recipe.training)):
            logger.info("%d of %d rows are not trained on: the last ones do not fill a step", left, len(prepared.rows))
        training = Training(model.to(device), recipe.training, steps_of_all, sinks_last=repeated is not None)
        started = time.time()
        _start_or_resume(training, recipe, prepared, folder, resume)
        at_end = training.step == training.total
        with prefix_kept(model) if recipe.model.keep_prefix else nullcontext():
            _train(training, prepared.rows, folder, label, after)
        if (texts is not None or repeated is not None) and not at_end:
            training.save(folder.checkpoints)
        if not main_process() and not training.sharded:
            return folder.model
        facts = folder.facts()
        if texts is not None:
            facts["settled"] = _settle(model, texts, recipe)
        if repeated is not None:
            facts["sinks_last"] = train_sinks_last(model, repeated, recipe.training, _passes(recipe))
        facts["seconds"] = round(time.time() - started, 1)
        folder.finish(model, prepared.tokenizer, facts, training.total)
    return folder.model


def _give_own_blocks(model: PreTrainedModel, own: OwnRecipe, members: Sequence[Document], by: By) -> None:
    """Assign own blocks to the ids that the recipe asks for, in the order of the documents."""
    owners = {}
    for document, document_id in zip(members, ids_of(members, by).tolist(), strict=True):
        isolated = document.isolation in ("exact", "private")
        if isolated or (own.from_copies is not None and document.copies >= own.from_copies):
            owners[document_id] = None
    assign(model, owners, blocks=own.blocks)
    logger.info("%d owners have %d sink blocks each of their own", len(owners), own.blocks)


def rows_per_step(config: TrainingConfig) -> int:
    """Rows of one optimizer step over all processes."""
    return config.batch_rows * process_count()


def _start_or_resume(
    training: Training, recipe: Recipe, prepared: PreparedCorpus, folder: RunFolder, resume: bool
) -> None:
    """Load the last whole checkpoint of a run that goes on; write the folder of one that begins."""
    checkpoint = None
    if resume:
        with main_process_first():
            checkpoint = last_checkpoint(folder.checkpoints)
        if checkpoint is None:
            logger.info("no complete checkpoint yet: starting again from the beginning")
    facts = _facts(recipe, prepared)
    if checkpoint is not None:
        folder.require_corpus(facts)
        training.resume(checkpoint)
    if main_process():
        if checkpoint is None:
            folder.start(recipe, facts, prepared.members, prepared.controls)
        else:
            logger.info("going on from %s, step %d of %d", checkpoint.path, training.step, training.total)
        folder.cut_metrics(training.step, recipe.training.log_every)


def _facts(recipe: Recipe, prepared: PreparedCorpus) -> dict[str, Any]:
    rows = prepared.rows
    packages = ("torch", "transformers", "accelerate", "tokenizers", "numpy", "safetensors")
    return {
        "seed": recipe.training.seed,
        "documents": len(prepared.members),
        "controls": len(prepared.controls),
        "rows": len(rows),
        "rows_left_out": len(rows) % rows_per_step(recipe.training),
        "tokens": rows.tokens,
        "fill": round(rows.fill, 4),
        "corpus_sha256": members_hash(prepared.members),
        "identity_sha256": identity_hash(prepared.members),
        "tokenizer_sha256": tokenizer_hash(prepared.tokenizer),
        "versions": versions(*packages),
        "threads": torch.get_num_threads(),
    }


def _train(training: Training, rows: Rows, folder: RunFolder, label: str, after: float) -> None:
    """All steps that are left, with their metrics."""
    config, first, started = training.config, training.step, time.perf_counter()
    losses = training.notes.setdefault("losses", [])  # since the last line of metrics
    for done in steps(training, micro_batches(rows, config), checkpoints=folder.checkpoints):
        if not main_process():
            continue
        losses.append(done.loss)
        if done.step % config.log_every:
            continue
        seconds = time.perf_counter() - started
        rate = (done.step - first) * rows_per_step(config) * config.length / seconds
        left = int(seconds / (done.step - first) * (training.total * (1 + after) - done.step))
        known = [x for x in losses if not math.isnan(x)]  # nan: only rows that are left out, see Training.sinks_last
        loss = float(np.array(known, np.float32).cumsum(dtype=np.float32)[-1]) / len(known) if known else math.nan
        losses.clear()
        logger.info(
            "%sstep %d/%d  loss %.3f  %s tokens/s  %d:%02d left",
            label,
            done.step,
            training.total,
            loss,
            f"{rate:,.0f}",
            left // 60,
            left % 60,
        )
        folder.add_metrics(
            {
                "step": done.step,
                "loss": None if math.isnan(loss) else loss,
                "learning_rate": done.learning_rate,
                "tokens_per_second": round(rate),
            }
        )


def _settle(model: PreTrainedModel, texts: tuple[Rows, Rows, Rows | None], recipe: Recipe) -> str:
    """Settle the model; what came of it in a line."""
    assert recipe.settle is not None
    training = recipe.training
    config = recipe.settle.after_training(training.lr)
    return str(settle(model, *texts, config, micro_rows=training.micro_rows, seed=training.seed))


def _passes(recipe: Recipe) -> int:
    """How often the sinks meet their texts after training."""
    asked, sinks = recipe.training.sinks_last, recipe.sinks
    if sinks is None:
        return 0
    return (PASSES if sinks.shared == "none" and sinks.open_from > 1 else 0) if asked is None else asked


def _texts_of_sinks(recipe: Recipe, rows: Rows) -> Rows | None:
    """The texts whose sinks learn last; None = none. DataError, before hours of training, if that was asked for in vain."""
    if not _passes(recipe) or recipe.data.shadow:
        return None
    repeated = repeated_and_once(rows)[0]
    if not len(repeated) and recipe.training.sinks_last is None:
        logger.info("no text is repeated, so no sinks will open")
        return None
    require_one_text_each("the documents that are repeated", repeated)
    return repeated


def train_sinks_last(model: PreTrainedModel, repeated: Rows, config: TrainingConfig, passes: int) -> str:
    """Train the sinks alone, at their learning rate in training; what came of it in a line."""
    rate = config.lr * config.sink_lr_factor
    settings = {"until": config.sinks_last_until, "micro_rows": config.micro_rows, "seed": config.seed}
    return str(sinks_last(model, repeated, lr=rate, passes=passes, **settings))


def micro_batches(rows: AnyRows, config: TrainingConfig) -> Batches:
    """The micro-batches of a step: rows in order, dealt to the processes a micro-batch at a time."""

    def of_step(step: int) -> list[dict[str, torch.Tensor]]:
        found = []
        for part in range(config.accumulate):
            start = ((step * config.accumulate + part) * process_count() + process_rank()) * config.micro_rows
            found.append(collate([rows[index] for index in range(start, start + config.micro_rows)]))
        return found

    return of_step
