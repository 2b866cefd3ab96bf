"""Which model is looked at, in which state of its sinks: live or from a path, loaded only while it is needed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from memsinks._version import versions
from memsinks.data.tokens import load_tokenizer
from memsinks.errors import ConfigError
from memsinks.sinks.checkpoint import load_any, load_config
from memsinks.sinks.state import has_sinks, require_sinks, shared_parameters, sink_parameters, unwrap
from memsinks.sinks.storage import TABLE, fingerprint, has_saved_sinks
from memsinks.training.evaluate import unpatched

State = Literal["open", "closed", "absent"]
WHERE = ("_name_or_path", "transformers_version")
"""What a configuration says of where it comes from."""
OF_ADAPTERS = ("active_adapters", "disable_adapters", "scaling", "merged")
"""What a layer of PEFT computes depends on, beside its weights."""
Role = Literal["audited", "against", "twin", "seen once", "other"]


@dataclass(frozen=True)
class Subject:
    """A model to be looked at.

    Args:
        model: live, also inside torch.compile, DDP or a PeftModel (with its adapter as it is); or the path or name of a
            checkpoint.
        state: of its sinks, ``"open"`` (each document's own) or ``"closed"``; None for a model without.
        name: as it stands in the report; default: its role, or the path.
    """

    model: PreTrainedModel | str | os.PathLike[str]
    state: State | None = None
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> Subject:
        """Read ``[NAME=]PATH[@open|@closed]``, as the command line takes it."""
        name, path, state = None, text, None
        if not Path(path).exists():
            if path.endswith(("@open", "@closed")):
                path, _, state = path.rpartition("@")
            if "=" in path and not Path(path).exists():
                name, _, path = path.partition("=")
        return cls(path, state, name)  # type: ignore[arg-type]

    @property
    def path(self) -> Path | None:
        """Where it is loaded from; None for a live model."""
        return Path(self.model) if isinstance(self.model, str | os.PathLike) else None

    def config(self) -> PretrainedConfig:
        """The model's configuration, read without loading weights; CheckpointError if there is none."""
        if self.path is None:
            return self.live().config
        return load_config(self.path)

    def live(self) -> PreTrainedModel:
        """The live model that is given, out of what it is wrapped in; ConfigError where a wrapper changes what it reads."""
        prompts = getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False)
        if prompts:
            raise ConfigError(
                "a PeftModel with learned prompts reads tokens that no text has and cannot be audited; adapters in the "
                "weights (LoRA) can"
            )
        model: Any = unwrap(self.model)
        base: Any = getattr(model, "get_base_model", None)  # of a PeftModel: the model with the adapter in it
        return model if base is None else base()

    def checked_state(self) -> State:
        """The state, ``"absent"`` for a model without sinks; ConfigError if it is missing or not possible."""
        sinks = has_saved_sinks(self.path) if self.path else has_sinks(self.live())
        state = "absent" if self.state is None and not sinks else self.state
        possible = ("open", "closed") if sinks else ("absent",)
        if state not in possible:
            raise ConfigError(
                f"state must be one of {possible} for {self.path or 'this model'}, got {state!r}: sinks "
                + ("open and closed are two different models, say which to audit" if sinks else "are not there")
            )
        return state  # type: ignore[return-value]

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer beside the checkpoint; None for a live model or where there is none."""
        if self.path is None:
            return None
        try:
            return load_tokenizer(self.path)
        except ConfigError:
            return None

    @contextmanager
    def loaded(self) -> Iterator[PreTrainedModel]:
        """The live model, or the one of the path, in eval mode, on a GPU if there is one, and let go after.

        A live model computes in the precision of its weights: a Trainer's autocast is set aside, as it is in a checkpoint.
        """
        if self.path is None:
            model = self.live()
            with unpatched(model) if "_original_forward" in vars(model) else nullcontext():
                yield model
            return
        model = load_any(self.path)
        yield model.to("cuda") if torch.cuda.is_available() else model  # type: ignore[arg-type]


def weights_hash(model: PreTrainedModel) -> str:
    """SHA-256 of all weights by name, shape, dtype and bytes, hexadecimal; about a second a gigabyte.

    With sinks also of their settings and assignment table: which sinks a document opens is no weight.
    """
    found = hashlib.sha256()
    if has_sinks(model):
        table = require_sinks(model).table
        found.update(fingerprint(model).encode())
        found.update(str([getattr(table, name).tolist() for name in TABLE]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(_bytes(tensor).data)
    return found.hexdigest()


def computation_hash(model: PreTrainedModel, weights: str) -> str:
    """SHA-256 of the hash of its weights, its configuration, which adapters are on and how strong, and the versions of torch and
    transformers, hexadecimal."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in WHERE}
    parts: list[Any] = [weights, config, versions("torch", "transformers")]
    for name, part in model.named_modules():
        if type(part).__module__.startswith("peft."):
            parts.append([name, *(str(getattr(part, x, None)) for x in OF_ADAPTERS)])
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """The values of a tensor, row by row, whatever its strides; uint8 [bytes]."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy()  # one value may have any stride


def facts(model: PreTrainedModel) -> dict[str, Any]:
    """What a result says about a model: architecture, parameters of the stock part and of the sinks, hash of the weights."""
    return {
        "model_type": model.config.model_type,
        "parameters": sum(x.numel() for x in shared_parameters(model)),
        "sink_parameters": sum(x.numel() for x in sink_parameters(model)),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights_sha256": weights_hash(model),
    }
