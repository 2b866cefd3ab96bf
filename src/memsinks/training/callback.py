"""What any Trainer must do for a model with sinks, as a callback.

    Trainer(model, args, train_dataset=rows, data_collator=ms.collate, callbacks=[ms.SinkCallback()],
            optimizers=(ms.AdamW(ms.param_groups(model, lr=6e-4)), None)).train()

Exposures are counted over the training order, so rows are met once and in order; the Trainer needs
``train_sampling_strategy="sequential"`` in its `args`.
"""

from __future__ import annotations

import hashlib
import math
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import has_length

from memsinks.data.sampling import refuse_shuffling
from memsinks.errors import ArchitectureError, CheckpointError, ConfigError, DataError, refuse
from memsinks.sinks.checkpoint import load_sinks
from memsinks.sinks.reading import same_stock_weights
from memsinks.sinks.state import SinkState, has_adapters, has_sinks, require_sinks, unwrap
from memsinks.sinks.storage import TABLE, has_saved_sinks
from memsinks.training.complete import mark_complete, require_complete
from memsinks.training.optim import clip_grad_norm_, norm_limit
from memsinks.training.processes import process_count


class SinkCallback(TrainerCallback, ExportableState):
    """What a Trainer must do for a model with sinks.

    - Refuses, before training starts, whatever would meet rows in another order than that of their exposures, or twice.
    - Clips the gradient norm of shared weights and sinks apart, each to ``args.max_grad_norm`` (0 or less = no clipping).
    - Restores the sinks when training resumes or the best model is loaded; refuses a checkpoint that does not fit.
    - Marks checkpoints as complete, and refuses to resume from others, see `complete`.

    The Trainer itself saves the sinks, because it saves with `save_pretrained`.
    """

    def __init__(self) -> None:
        self.rows_per_step = 0
        self.table = ""
        self._trained: weakref.ref[nn.Module] | None = None
        self._passes = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in the form of `ExportableState`."""
        return {"args": {}, "attributes": {"rows_per_step": self.rows_per_step, "table": self.table}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        sinks = sink_state(model)
        if args.n_gpu > 1:
            raise ArchitectureError(
                f"the Trainer would use DataParallel over {args.n_gpu} GPUs, whose replicas share one routing plan; start "
                "one process a GPU (torchrun) or show it one GPU (CUDA_VISIBLE_DEVICES)"
            )
        refuse_norm(args)
        self.rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if sinks.config.needs_exposures:
            loader = kwargs.get("train_dataloader")
            if loader is not None:
                refuse_shuffling(loader)
            refuse(self._repetitions(args, state, loader, model), "the Trainer cannot train on these rows", DataError)
        self._check_table(state, model)
        self._kept(state)[type(self).__name__] = self.state()
        self._passes = 0
        if state.global_step:
            sinks.place = None  # type: ignore[attr-defined]  # rows met before the checkpoint are behind it
        trainer, resumed = _calling_trainer()
        restore(model, [resumed, args.resume_from_checkpoint, f"{args.output_dir}/checkpoint-{state.global_step}"])
        if state.global_step and resumed is not None:
            require_complete(resumed)
        if trainer is not None:
            clip_apart(trainer)

    def _check_table(self, state: TrainerState, model: nn.Module) -> None:
        """CheckpointError if the sinks of an adapter's checkpoint, which does not say whose they are, are others' here."""
        if not has_adapters(model):
            return
        table, found = sink_state(model).table, hashlib.sha256()
        for name in TABLE:
            found.update(getattr(table, name).numpy().tobytes())
        self.table = found.hexdigest()
        before = self._kept(state).get(type(self).__name__, {}).get("attributes", {})
        if state.global_step and before.get("table", self.table) != self.table:
            raise CheckpointError(
                "owners have other blocks in this model than in the checkpoint, so some would get another's sinks; give it the "
                "owners of then, in the order of then (add_owners, assign), none taken out since"
            )

    def _repetitions(self, args: TrainingArguments, state: TrainerState, loader: Any, model: nn.Module) -> list[str]:
        """What would meet rows again, or leave some out, whose exposures count."""
        problems = repeated_at_the_end(loader)
        if has_length(loader) and state.num_train_epochs > 1:
            problems.append(
                f"num_train_epochs={args.num_train_epochs} or max_steps={args.max_steps} asks for "
                f"{state.num_train_epochs} epochs, which would repeat the exposure numbers of the first; unroll "
                "them into the rows (exposures of the whole training order) and train one epoch"
            )
        if args.auto_find_batch_size:
            problems.append(
                "auto_find_batch_size starts again from the first row with sinks that have learned; find the batch size "
                "beforehand and leave it out"
            )
        if self._trained is not None and self._trained() is unwrap(model) and not state.global_step:
            problems.append(
                "train() was called before on this model and would meet its rows a second time; resume from a checkpoint, "
                "start from a new model, or make a new Trainer for new rows"
            )
        if state.global_step and args.ignore_data_skip:
            problems.append("ignore_data_skip meets the rows again that the checkpoint has learned from; leave it out")
        before = self._kept(state).get(type(self).__name__, {})
        rows = before.get("attributes", {}).get("rows_per_step", self.rows_per_step)
        if state.global_step and rows != self.rows_per_step:
            problems.append(
                f"the checkpoint was trained with {rows} rows a step, this resumes with {self.rows_per_step}, so rows would be "
                "met twice or left out; use the same batch size, accumulation and number of processes"
            )
        return problems

    @staticmethod
    def _kept(state: TrainerState) -> dict[str, Any]:
        """What checkpoints keep of the callbacks; after a resume, what the checkpoint kept."""
        kept: Any = getattr(state, "stateful_callbacks", None)
        return kept if isinstance(kept, dict) else {}

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._passes += 1
        if self._passes > 1 and sink_state(kwargs["model"]).config.needs_exposures:
            raise DataError(
                f"the rows ended after {state.global_step} steps of {state.max_steps} and would begin again, with exposures "
                f"that were counted once; set max_steps={state.global_step}, or give more rows"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trained = weakref.ref(unwrap(kwargs["model"]))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if process_count() > 1:
            torch.distributed.barrier()  # each process writes its random state
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        saves = state.is_local_process_zero if args.save_on_each_node else state.is_world_process_zero
        if saves and folder.is_dir():
            mark_complete(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        restore(kwargs["model"], [state.best_model_checkpoint])


def repeated_at_the_end(loader: Any) -> list[str]:
    """What Accelerate would do to give all processes as many batches: meet the first rows again at the end."""
    sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(sampler, BatchSamplerShard) or not sampler.even_batches or sampler.drop_last:
        return []
    inside: Any = sampler.batch_sampler
    rows, at_once = len(inside.sampler), inside.batch_size * sampler.num_processes
    if sampler.num_processes == 1 or rows % at_once == 0:
        return []
    return [
        f"{rows} rows do not divide by {at_once} (rows a batch times processes), so the first would be met again at the end; "
        "set dataloader_drop_last=True, or leave out or add rows"
    ]


def refuse_norm(args: TrainingArguments) -> None:
    """ConfigError for a `max_grad_norm` that is no number."""
    if args.max_grad_norm is None:
        raise ConfigError("max_grad_norm is None, which the Trainer cannot take; 0 turns clipping off")
    norm_limit(args.max_grad_norm)


def clip_apart(trainer: Trainer) -> None:
    """From now on this Trainer clips shared weights and sinks apart; its arguments stay as they are."""
    accelerator: Any = trainer.accelerator
    stock = accelerator.clip_grad_norm_
    if getattr(stock, "apart", False):
        return

    def clip(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        if not math.isfinite(max_norm):  # only measured
            return stock(parameters, max_norm, norm_type)
        accelerator.unscale_gradients()
        model: Any = trainer.model
        norms = clip_grad_norm_(model, max_norm)
        return torch.linalg.vector_norm(torch.stack([x.to(norms[0].device) for x in norms]))

    clip.apart = True  # type: ignore[attr-defined]
    accelerator.clip_grad_norm_ = clip


def _calling_trainer() -> tuple[Trainer | None, Path | None]:
    """The Trainer that has called a callback, and the checkpoint it resumes from.

    A callback is told neither, but cannot keep it from clipping jointly, or from resuming from half a checkpoint, otherwise.
    """
    frame, trainer = sys._getframe(), None
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            trainer = caller
            resumed = frame.f_locals.get("resume_from_checkpoint")
            if isinstance(resumed, str | Path):
                return trainer, Path(resumed)
        frame = frame.f_back
    return trainer, None


def sink_state(model: Any) -> SinkState:
    """Also of a model whose sinks are missing; ArchitectureError if it never had any."""
    return unwrap(model).sink_state if has_sinks(model) else require_sinks(model)


def restore(model: Any, folders: list[Any]) -> None:
    """Load the sinks that belong to the stock weights the Trainer has just loaded, if it has."""
    if not sink_state(model).sinks_missing:
        return
    model = unwrap(model)
    for folder in folders:
        if isinstance(folder, str | Path) and has_saved_sinks(folder) and same_stock_weights(model, folder):
            load_sinks(model, folder)
            return
    raise CheckpointError(
        f"the sinks of the checkpoint that the Trainer loaded are in none of {[str(x) for x in folders if x]}; resume "
        "from one in args.output_dir, or set args.resume_from_checkpoint to its folder"
    )
