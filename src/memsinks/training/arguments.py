"""Settings of TRL that a Trainer for models with sinks is given and cannot follow."""

from __future__ import annotations

import logging

from transformers import TrainingArguments

from memsinks.errors import ConfigError

logger = logging.getLogger(__name__)

OF_ROWS = {
    "packing": False,
    "eval_packing": None,
    "padding_free": False,
    "max_length": 1024,
    "truncation_mode": "keep_start",
    "completion_only_loss": None,
    "assistant_only_loss": False,
    "chat_template_path": None,
    "dataset_text_field": "text",
    "eos_token": None,
    "pad_token": None,
}
"""Settings of TRL's SFTConfig that say how its trainer makes rows, and their defaults."""


def check_settings_of_trl(args: TrainingArguments) -> None:
    """Say which settings of an SFTConfig are not looked at, because the rows are made already.

    Raises:
        ConfigError: settings of another trainer of TRL, or another loss than the model's own.
    """
    kind = type(args)
    if not any(base.__module__.partition(".")[0] == "trl" for base in kind.__mro__):
        return
    if not any(base.__name__ == "SFTConfig" for base in kind.__mro__):
        raise ConfigError(
            f"{kind.__name__} is for a loss over pairs or rewards, which models with sinks are not trained with; give TRL's "
            "SFTConfig or TrainingArguments"
        )
    loss = getattr(args, "loss_type", "nll")
    if loss not in ("nll", "chunked_nll"):
        raise ConfigError(f"SinkTrainer learns the model's own loss, loss_type is {loss!r}; leave it out")
    other = [name for name, default in OF_ROWS.items() if getattr(args, name, default) != default]
    if other:
        logger.warning(
            "%s of %s say how rows are made and are not looked at: SinkTrainer takes rows of memsinks.make_rows(..., length=, "
            "long=), which pack, and of which answers alone are learned",
            ", ".join(other),
            kind.__name__,
        )
