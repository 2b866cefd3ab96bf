"""Training on the Hugging Face Trainer: a Trainer whose sinks learn first, and a callback for any other Trainer.

    ms.SinkTrainer(model, args, train_dataset=rows).train()

    Trainer(model, args, train_dataset=rows, data_collator=ms.collate, callbacks=[ms.SinkCallback()],
            optimizers=(ms.AdamW(ms.param_groups(model, lr=6e-4)), None)).train()

Exposures are counted over the training order, so rows are met once and in order. `SinkTrainer` sees to it; another Trainer needs
``train_sampling_strategy="sequential"`` in its `args`.
"""

from __future__ import annotations

import inspect
import logging
import math
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import has_length
from transformers.training_args import OptimizerNames

from memsinks.batch import FIELDS, ISOLATION, PLACES, collate, target_count
from memsinks.data.packing import Rows
from memsinks.data.sampling import refuse_shuffling
from memsinks.errors import ArchitectureError, CheckpointError, ConfigError, DataError, refuse
from memsinks.sinks.checkpoint import load_sinks
from memsinks.sinks.owners import require_owners_and_texts
from memsinks.sinks.quantized import quantizer_of, refuse_unsavable, taken_as_trainable
from memsinks.sinks.reading import same_stock_weights
from memsinks.sinks.state import SinkState, has_sinks, require_sinks, unwrap
from memsinks.sinks.storage import has_saved_sinks
from memsinks.training.arguments import check_settings_of_trl
from memsinks.training.first import sinks_first
from memsinks.training.optim import AdamW, clip_grad_norm_, norm_limit, param_groups

logger = logging.getLogger(__name__)

DEFAULT_ORDER = "random"
"""`train_sampling_strategy` where nobody chose one."""
TORCH_ADAMW = ("adamw_torch", "adamw_torch_fused")
"""`optim` in whose place `SinkTrainer` takes the AdamW that leaves closed sinks alone."""


class SinkCallback(TrainerCallback, ExportableState):
    """What a Trainer must do for a model with sinks.

    - Refuses, before training starts, whatever would meet rows in another order than that of their exposures, or twice.
    - Clips the gradient norm of shared weights and sinks apart, each to ``args.max_grad_norm`` (0 or less = no clipping).
    - Restores the sinks when training resumes or the best model is loaded; refuses a checkpoint that does not fit.

    The Trainer itself saves the sinks, because it saves with `save_pretrained`.
    """

    def __init__(self) -> None:
        self.rows_per_step = 0
        self._trained: weakref.ref[nn.Module] | None = None
        self._passes = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in the form of `ExportableState`."""
        return {"args": {}, "attributes": {"rows_per_step": self.rows_per_step}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        sinks = _sink_state(model)
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
        self._kept(state)[type(self).__name__] = self.state()
        self._passes = 0
        if state.global_step:
            sinks.place = None  # type: ignore[attr-defined]  # rows met before the checkpoint are behind it
        _restore(model, [args.resume_from_checkpoint, f"{args.output_dir}/checkpoint-{state.global_step}"])
        trainer = _calling_trainer()
        if trainer is not None:
            clip_apart(trainer)

    def _repetitions(self, args: TrainingArguments, state: TrainerState, loader: Any, model: nn.Module) -> list[str]:
        """What would meet rows again, or leave some out, whose exposures count."""
        problems = []
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
        if self._passes > 1 and _sink_state(kwargs["model"]).config.needs_exposures:
            raise DataError(
                f"the rows ended after {state.global_step} steps of {state.max_steps} and would begin again, with exposures "
                f"that were counted once; set max_steps={state.global_step}, or give more rows"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trained = weakref.ref(unwrap(kwargs["model"]))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _restore(kwargs["model"], [state.best_model_checkpoint])


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
        whole = [x.full_tensor() if isinstance(x, DTensor) else x for x in norms]
        return torch.linalg.vector_norm(torch.stack([x.to(whole[0].device) for x in whole]))

    clip.apart = True  # type: ignore[attr-defined]
    accelerator.clip_grad_norm_ = clip


def _calling_trainer() -> Trainer | None:
    """The Trainer that has called a callback, which is not told, but cannot keep it from clipping jointly otherwise."""
    frame = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    return None


def _sink_state(model: Any) -> SinkState:
    """Also of a model whose sinks are missing; ArchitectureError if it never had any."""
    return unwrap(model).sink_state if has_sinks(model) else require_sinks(model)


def _restore(model: Any, folders: list[Any]) -> None:
    """Load the sinks that belong to the stock weights the Trainer has just loaded, if it has."""
    if not _sink_state(model).sinks_missing:
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


class SinkTrainer(Trainer):
    """A Trainer for models with sinks, right by itself: ``SinkTrainer(model, args, train_dataset=rows).train()``.

    Where nothing else is given it takes `collate`, rows in order (where exposures count), the columns that sinks need,
    `AdamW` over `param_groups` with the learning rate, decay and betas of `args`, and `SinkCallback`. With ``shared="decay"``
    each step begins with an update of the sinks alone, on the rows of all its micro-batches and with the loss that the step
    learns, see `sinks_first`; in exact mode call `sinks_last` after training.

    Args:
        arguments, settings: those of `Trainer`; `args` may be an SFTConfig of TRL, whose settings of how rows are made are not
            looked at, which is said.
        sink_lr_factor: the sinks' learning rate is ``args.learning_rate`` times this, see `param_groups`.
        sinks_first_updates, sinks_first_until: `updates` and `until` of `sinks_first`.

    Raises:
        ArchitectureError: a model without sinks; fp16, DeepSpeed or FSDP; checkpoints of a quantized model that cannot be saved.
        ConfigError: a `max_grad_norm` or an `optim` that cannot be; settings of TRL for another loss.
        DataError: rows of an id without blocks, or owners without rows, in a model to which nothing is hashed; in `train`, rows
            in another order than that of their exposures, or met twice, see `SinkCallback`.
    """

    def __init__(
        self,
        *arguments: Any,
        sink_lr_factor: float = 3.0,
        sinks_first_updates: int = 1,
        sinks_first_until: float = 0.0,
        **settings: Any,
    ) -> None:
        given: dict[str, Any] = inspect.signature(Trainer).bind(*arguments, **settings).arguments
        callbacks = given.get("callbacks") or []
        if not any(isinstance(x, SinkCallback) or x is SinkCallback for x in callbacks):
            given["callbacks"] = [*callbacks, SinkCallback()]
        if given.get("data_collator") is None:
            given["data_collator"] = collate
        self.sink_lr_factor = sink_lr_factor
        self.sinks_first_updates, self.sinks_first_until = sinks_first_updates, sinks_first_until
        self._waiting: list[Mapping[str, Any]] | None = None
        with taken_as_trainable(given.get("model")):
            super().__init__(**given)
        _sink_state(self.model)
        if isinstance(self.train_dataset, Rows):
            require_owners_and_texts(unwrap(self.model), np.unique(self.train_dataset.segments["document_id"]).tolist())
        refuse_norm(self.args)
        check_settings_of_trl(self.args)
        if self.args.save_strategy != "no":
            refuse_unsavable(unwrap(self.model))
        if self.args.fp16 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ArchitectureError(
                "SinkTrainer takes neither fp16, whose scaled gradients it would step past, nor DeepSpeed or FSDP; use bf16 "
                "and DDP, or a stock Trainer"
            )

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        clip_apart(self)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        data = self.train_dataset if train_dataset is None else train_dataset
        free = not _sink_state(self.model).config.needs_exposures
        if free or self.args.train_sampling_strategy != DEFAULT_ORDER or not has_length(data):
            return super()._get_train_sampler(train_dataset)
        return SequentialSampler(data)  # type: ignore[arg-type]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or []), *FIELDS, PLACES, ISOLATION]))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """`AdamW` with the groups of `param_groups`, or what was given."""
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            return super().create_optimizer(model)
        args = self.args
        if args.optim not in TORCH_ADAMW:
            raise ConfigError(
                f"SinkTrainer makes AdamW ({' or '.join(TORCH_ADAMW)}) by itself, optim is "
                f"{OptimizerNames(args.optim).value}; give optimizers=(YOURS(memsinks.param_groups(model, lr)), None)"
            )
        trained: Any = self.model if model is None else model
        groups = param_groups(trained, args.learning_rate, args.weight_decay, self.sink_lr_factor)
        self.optimizer = AdamW(
            groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon
        )
        return self.optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._quantized():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        _restore(self.model, [resume_from_checkpoint])

    def _load_best_model(self) -> None:
        if not self._quantized():
            super()._load_best_model()

    def _quantized(self) -> bool:
        """Whether the weights are quantized, so that they do not change and the sinks alone are to be restored."""
        quantized = bool(quantizer_of(unwrap(self.model)))
        _sink_state(self.model).sinks_missing |= quantized
        return quantized

    def get_batch_samples(self, *arguments: Any, **settings: Any) -> Any:
        """The micro-batches of a step, which are kept until its first one is trained on."""
        batches, targets = super().get_batch_samples(*arguments, **settings)
        self._waiting = batches
        return batches, targets

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """A micro-batch as the Trainer does it; before the first one of a step the sinks learn from all of them."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None and _sink_state(self.model).config.shared == "decay":
            batches = [self._prepare_inputs(dict(x)) for x in waiting]
            model.train()
            optimizer: Any = self.optimizer
            sinks_first(
                model,
                optimizer,
                batches,
                updates=self.sinks_first_updates,
                until=self.sinks_first_until,
                max_norm=self.args.max_grad_norm,
                loss=lambda model, rows, batch: self._loss_of(model, rows, batch, num_items_in_batch),
            )
        return super().training_step(model, inputs, num_items_in_batch)

    def _loss_of(
        self, model: nn.Module, rows: dict[str, Tensor], batch: Mapping[str, Tensor], num_items_in_batch: Any
    ) -> Tensor:
        """The share of some rows of a micro-batch in the loss that the Trainer learns."""
        share = 1.0 if num_items_in_batch is not None else target_count(rows["labels"]) / target_count(batch["labels"])
        with self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, rows, num_items_in_batch=num_items_in_batch)
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            knows = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = knows or self.compute_loss_func is not None
        return loss * share if scaled else loss * share / self.current_gradient_accumulation_steps
