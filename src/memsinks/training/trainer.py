"""Training on the Hugging Face Trainer: a Trainer for models with sinks that is right by itself.

    ms.SinkTrainer(model, args, train_dataset=rows).train()

For any other Trainer there is `SinkCallback`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import has_length
from transformers.training_args import OptimizerNames

from memsinks.batch import FIELDS, ISOLATION, PLACES, collate, target_count
from memsinks.data.packing import Rows
from memsinks.errors import ArchitectureError, CheckpointError, ConfigError, refuse
from memsinks.sinks.exact import without_rows_alone
from memsinks.sinks.opening import sinks_open, with_blocks
from memsinks.sinks.owners import require_owners_and_texts
from memsinks.sinks.quantized import quantizer_of, refuse_unsavable, taken_as_trainable
from memsinks.sinks.state import unwrap
from memsinks.training.arguments import check_settings_of_trl
from memsinks.training.callback import SinkCallback, clip_apart, refuse_norm, restore, sink_state
from memsinks.training.complete import last_complete, require_complete
from memsinks.training.exchange import send_open_blocks
from memsinks.training.first import sinks_first
from memsinks.training.optim import AdamW, param_groups

logger = logging.getLogger(__name__)

DEFAULT_ORDER = "random"
"""`train_sampling_strategy` where nobody chose one."""
TORCH_ADAMW = ("adamw_torch", "adamw_torch_fused")
"""`optim` in whose place `SinkTrainer` takes the AdamW that leaves closed sinks alone."""


class SinkTrainer(Trainer):
    """A Trainer for models with sinks, right by itself: ``SinkTrainer(model, args, train_dataset=rows).train()``.

    Where nothing else is given it takes `collate`, rows in order (where exposures count), the columns that sinks need,
    `AdamW` over `param_groups` with the learning rate, decay and betas of `args`, and `SinkCallback`. With ``shared="decay"``
    each step begins with an update of the sinks alone, on the rows of all its micro-batches and with the loss that the step
    learns, see `sinks_first`; in exact mode call `sinks_last` after training, and say so here.

    Args:
        arguments, settings: those of `Trainer`; `args` may be an SFTConfig of TRL, whose settings of how rows are made are not
            looked at, which is said.
        sink_lr_factor: the sinks' learning rate is ``args.learning_rate`` times this, see `param_groups`.
        sinks_first_updates, sinks_first_until: `updates` and `until` of `sinks_first`.
        sinks_last: the sinks will learn after training, so rows that would train them alone are left out of the steps, see
            `without_rows_alone`. The loss that is logged counts their targets, but not their loss.

    Raises:
        ArchitectureError: a model without sinks; fp16, DeepSpeed or FSDP1; FSDP on CPUs, which Accelerate
            would leave out; checkpoints of a quantized model that cannot be saved.
        ConfigError: a `max_grad_norm`, an `optim` or a `sinks_last` that cannot be; settings of TRL for another loss.
        DataError: rows of an id without blocks, or owners without rows, in a model to which nothing is hashed; in `train`, rows
            in another order than that of their exposures, or met twice, see `SinkCallback`.
    """

    def __init__(
        self,
        *arguments: Any,
        sink_lr_factor: float = 3.0,
        sinks_first_updates: int = 1,
        sinks_first_until: float = 0.0,
        sinks_last: bool = False,
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
        self.sinks_last = sinks_last
        self._waiting: list[Mapping[str, Any]] | None = None
        self._sparing: nn.Module | None = None
        self._made_optimizer = False
        self._used_optimizer: Any = None
        with taken_as_trainable(given.get("model")):
            super().__init__(**given)
        sink_state(self.model)
        if isinstance(self.train_dataset, Rows):
            require_owners_and_texts(unwrap(self.model), np.unique(self.train_dataset.segments["document_id"]).tolist())
        refuse_norm(self.args)
        if sinks_last:
            self._check_sinks_last()
        check_settings_of_trl(self.args)
        if self.args.save_strategy != "no":
            refuse_unsavable(unwrap(self.model))
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise ArchitectureError(
                "Accelerate shards on GPUs and other accelerators alone, and would train a copy of the model in each process; "
                "leave out fsdp, or shard a loop of your own (examples/fsdp.py) or a recipe (training.shard)"
            )
        fsdp1 = self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2
        if self.args.fp16 or self.is_deepspeed_enabled or fsdp1:
            raise ArchitectureError(
                "SinkTrainer takes neither fp16, whose scaled gradients it would step past, nor DeepSpeed or FSDP1; use bf16 "
                'with DDP or FSDP2 (fsdp_config={"version": 2})'
            )

    def _check_sinks_last(self) -> None:
        config, problems = sink_state(self.model).config, []
        if config.shared == "none" and config.open_from == 1:
            problems.append("every text opens its sinks (open_from=1), so all rows would be left out of the steps")
        if self.args.label_smoothing_factor:
            problems.append("label smoothing takes the mean over the targets at hand, which are fewer then")
        refuse(problems, "sinks_last=True cannot be; leave it out")

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **settings: Any) -> Any:
        """As `Trainer.train`; ``resume_from_checkpoint=True`` goes on from the newest complete checkpoint, see `complete`.

        Called again, it makes another optimizer in place of the one that it made: owners may have come since, or left.
        """
        if self.optimizer is not None and self.optimizer is self._used_optimizer:
            self.optimizer = self.lr_scheduler = None
        self._made_optimizer = self._made_optimizer and self.optimizer is not None
        if resume_from_checkpoint is True:
            last = last_complete(Path(str(self.args.output_dir)))
            if last is None:
                raise CheckpointError(f"{self.args.output_dir} holds no complete checkpoint; start without resuming")
            resume_from_checkpoint = str(last)
        elif resume_from_checkpoint:
            require_complete(Path(resume_from_checkpoint))
        try:
            return super().train(resume_from_checkpoint, *arguments, **settings)
        finally:
            self._used_optimizer = self.optimizer if self._made_optimizer else None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        clip_apart(self)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        data = self.train_dataset if train_dataset is None else train_dataset
        free = not sink_state(self.model).config.needs_exposures
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
        self._made_optimizer = True
        self.optimizer = AdamW(
            groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon
        )
        return self.optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._quantized():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        restore(self.model, [resume_from_checkpoint])

    def _load_best_model(self) -> None:
        if not self._quantized():
            super()._load_best_model()

    def _quantized(self) -> bool:
        """Whether the weights are quantized, so that they do not change and the sinks alone are to be restored."""
        quantized = bool(quantizer_of(unwrap(self.model)))
        sink_state(self.model).sinks_missing |= quantized
        return quantized

    def get_batch_samples(self, *arguments: Any, **settings: Any) -> Any:
        """The micro-batches of a step, which are kept until its first one is trained on."""
        batches, targets = super().get_batch_samples(*arguments, **settings)
        self._waiting = batches
        return batches, targets

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """A micro-batch as the Trainer does it; before the first one of a step the sinks learn from all of them."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None and isinstance(model, DistributedDataParallel) and model is not self._sparing:
            self._sparing = model
            send_open_blocks(model)
        if waiting is not None and sink_state(self.model).config.shared == "decay":
            if isinstance(model, FSDPModule):  # which holds gradients back until the last micro-batch of a step
                model.set_requires_gradient_sync(True)
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
        if self.sinks_last:
            if num_items_in_batch is None:
                raise ConfigError(
                    "sinks_last=True needs the targets of the step as divisor, which the Trainer does not count for this model; "
                    "leave it out"
                )
            inputs = without_rows_alone(unwrap(self.model), inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **settings: Any) -> Any:
        """As the Trainer does it: with closed sinks; in a model of owners alone, with those of each row's owner open.

        Rows of ids that have no blocks there, or none any more, are measured with closed sinks.
        """
        state, ids = sink_state(self.model), inputs.get("document_ids")
        if ids is None or state.config.hashed_blocks:
            return super().prediction_step(model, inputs, *arguments, **settings)
        with sinks_open(model, with_blocks(state, ids)):
            return super().prediction_step(model, inputs, *arguments, **settings)

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
