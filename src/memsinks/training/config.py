"""How a model is trained: the settings of the training loop, and the section `training` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memsinks.checks import at_least, int_at_least, is_number, one_of, positive, share
from memsinks.errors import refuse


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained.

    Args:
        length: tokens per row.
        batch_rows: rows per optimizer step and process; split into micro-batches by `accumulate`.
        accumulate: micro-batches per step.
        epochs: times the corpus is met; unrolled into the training order.
        lr: peak learning rate of the shared weights.
        min_lr_ratio: the cosine ends at ``lr * min_lr_ratio``.
        warmup: share of the steps.
        sink_lr_factor: the sinks' learning rate is ``lr`` times this.
        sinks_first: where there are sinks and their texts go on to teach the shared weights (``shared="decay"``), each step
            begins with so many updates of the sinks alone at most, see `sinks_first`; True = 1, False = 0.
        sinks_first_until: a row takes part in one more of them while its loss is above this, nats.
        sinks_last: where there are sinks, passes over the repeated texts after training that train the sinks alone, see
            `sinks_last`; None = `PASSES` in exact mode (``shared="none"``) with ``open_from`` above 1, otherwise 0. Rows that
            would train their sinks alone are then left out of the steps; the shared weights end on the same bits.
        sinks_last_until: a text whose loss was at or below this in such a pass, nats, is met no more; 0 = each in every pass.
        weight_decay: of the shared matrices.
        betas: of AdamW.
        max_grad_norm: gradient norm of the shared weights and, separately, of the sinks; 0 = no clipping.
        precision: ``"fp32"`` or ``"bf16"`` (autocast).
        gradient_checkpointing: recompute activations in the backward pass.
        compile: torch.compile the model; the first steps then take minutes.
        seed: start values, order, choice of held-out and repeated documents, tokenizer text.
        shard: where several processes train together, shard the model over them (FSDP2) instead of a copy each (DDP).
        threads: CPU threads; None = torch's choice.
        save_every: steps between checkpoints; 0 = none. Resuming continues from the last one.
        keep: checkpoints kept.
        log_every: steps between lines of metrics.

    Raises:
        ConfigError: listing every problem at once.
    """

    length: int = 256
    batch_rows: int = 16
    accumulate: int = 1
    epochs: int = 1
    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    warmup: float = 0.05
    sink_lr_factor: float = 3.0
    sinks_first: bool | int = 1
    sinks_first_until: float = 0.0
    sinks_last: int | None = None
    sinks_last_until: float = 0.0
    weight_decay: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    shard: bool = False
    threads: int | None = None
    save_every: int = 0
    keep: int = 2
    log_every: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if isinstance(self.sinks_first, bool):
            object.__setattr__(self, "sinks_first", int(self.sinks_first))
        refuse(self._problems(), "invalid TrainingConfig")

    @property
    def micro_rows(self) -> int:
        """Rows of one micro-batch."""
        return self.batch_rows // self.accumulate

    def _problems(self) -> list[str]:
        least = {
            "length": 2,
            "batch_rows": 1,
            "accumulate": 1,
            "epochs": 1,
            "sinks_first": 0,
            "seed": 0,
            "save_every": 0,
            "keep": 1,
            "log_every": 1,
        }
        counts = {name: int_at_least(name, getattr(self, name), value) for name, value in least.items()}
        problems = [problem for found in counts.values() for problem in found]
        for name, value in (("threads", 1), ("sinks_last", 0)):
            problems += [] if getattr(self, name) is None else int_at_least(name, getattr(self, name), value)
        problems += positive("lr", self.lr) + positive("sink_lr_factor", self.sink_lr_factor)
        for name in ("sinks_first_until", "sinks_last_until"):
            problems += at_least(name, getattr(self, name), 0)
        problems += at_least("weight_decay", self.weight_decay, 0) + at_least("max_grad_norm", self.max_grad_norm, 0)
        problems += share("min_lr_ratio", self.min_lr_ratio) + share("warmup", self.warmup)
        problems += one_of("precision", self.precision, ("fp32", "bf16"))
        if self.shard and self.compile:
            problems.append("shard and compile were not tried together; leave one of them out")
        if len(self.betas) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in self.betas):
            problems.append(f"betas must be two numbers in [0, 1), got {list(self.betas)}")
        if not counts["batch_rows"] + counts["accumulate"] and self.batch_rows % self.accumulate:
            problems.append(f"accumulate ({self.accumulate}) must divide batch_rows ({self.batch_rows})")
        if not counts["save_every"] + counts["log_every"] and self.save_every % self.log_every:
            problems.append(
                f"save_every ({self.save_every}) must be a multiple of log_every ({self.log_every}), so that a resumed run "
                "logs the same losses"
            )
        return problems
