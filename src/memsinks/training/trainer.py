"""Training on the Hugging Face Trainer: one callback, usable with a stock Trainer too, and a Trainer whose sinks learn first.

    trainer = Trainer(model, args, train_dataset=rows, data_collator=ms.collate, callbacks=[ms.SinkCallback()],
                      optimizers=(ms.AdamW(ms.param_groups(model, lr=6e-4)), None))

`args` needs ``train_sampling_strategy="sequential"``: exposures are numbered over the training order.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from memsinks.data.sampling import refuse_shuffling
from memsinks.errors import ArchitectureError, CheckpointError, DataError
from memsinks.sinks.checkpoint import load_sinks
from memsinks.sinks.state import require_sinks, unwrap
from memsinks.sinks.storage import has_saved_sinks, same_stock_weights
from memsinks.training.first import sinks_first
from memsinks.training.optim import clip_grad_norm_


class SinkCallback(TrainerCallback):
    """What a Trainer must do for a model with sinks.

    - Refuses a sampler that shuffles, and epochs that are not unrolled into the exposures, before training starts.
    - Clips the gradient norm of shared weights and sinks separately (to ``args.max_grad_norm``).
    - Restores the sinks when training resumes or the best model is loaded; refuses a checkpoint that does not fit.

    The Trainer itself saves the sinks, because it saves with `save_pretrained`.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        config = require_sinks(model).config
        if args.n_gpu > 1:
            raise ArchitectureError(
                f"the Trainer would use DataParallel over {args.n_gpu} GPUs, whose replicas share one routing plan; start "
                "one process a GPU (torchrun) or show it one GPU (CUDA_VISIBLE_DEVICES)"
            )
        loader = kwargs.get("train_dataloader")
        if config.needs_exposures:
            if loader is not None:
                refuse_shuffling(loader)
            if has_length(loader) and state.num_train_epochs > 1:
                raise DataError(
                    f"num_train_epochs={args.num_train_epochs} or max_steps={args.max_steps} asks for "
                    f"{state.num_train_epochs} epochs, which would repeat the exposure numbers of the first; unroll "
                    "them into the rows (exposures of the whole training order) and train one epoch"
                )
        self._restore(model, args, [args.resume_from_checkpoint, f"{args.output_dir}/checkpoint-{state.global_step}"])
        # With an infinite norm the Trainer unscales and measures the gradients (fp16, logs) but leaves the clipping to
        # us. The user's norm is kept on args, so that it outlives an interrupted run.
        if math.isfinite(args.max_grad_norm):
            args.separate_max_grad_norm = args.max_grad_norm  # type: ignore[attr-defined]
        if args.max_grad_norm:
            args.max_grad_norm = math.inf

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.separate_max_grad_norm:  # type: ignore[attr-defined]
            clip_grad_norm_(kwargs["model"], args.separate_max_grad_norm)  # type: ignore[attr-defined]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        args.max_grad_norm = args.separate_max_grad_norm  # type: ignore[attr-defined]
        self._restore(kwargs["model"], args, [state.best_model_checkpoint])

    @staticmethod
    def _restore(model: Any, args: TrainingArguments, folders: list[Any]) -> None:
        """Load the sinks that belong to the stock weights the Trainer has just loaded, if it has."""
        if not require_sinks(model).sinks_missing:
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
    """A Trainer that calls `sinks_first` before each micro-batch; it takes `SinkCallback` as a stock Trainer does.

    Raises:
        ArchitectureError: fp16, DeepSpeed or FSDP.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        if self.args.fp16 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ArchitectureError(
                "SinkTrainer takes neither fp16, whose scaled gradients it would step past, nor DeepSpeed or FSDP; use bf16 "
                "and DDP, or a stock Trainer"
            )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Sinks first, then the step of the Trainer."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        norm = getattr(self.args, "separate_max_grad_norm", self.args.max_grad_norm)
        optimizer: Any = self.optimizer
        sinks_first(model, optimizer, [inputs], max_norm=norm, num_items_in_batch=num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)
