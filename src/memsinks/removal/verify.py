"""Does a checkpoint load in a fresh process without memsinks, and compute what it should?"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from memsinks.errors import CheckpointError
from memsinks.sinks.families import context_of
from memsinks.sinks.opening import sinks_closed, sinks_open
from memsinks.sinks.sharding import is_sharded
from memsinks.training.evaluate import evaluating, unpatched

CHECK_ROWS, CHECK_TOKENS = 2, 32
"""Rows and tokens of the text that is read for the check."""
TOLERANCE, HALF_TOLERANCE = 1e-4, 3e-2
"""Greatest difference of logits over the greatest logit, for float32 and for half precision."""
CHECK = """
import sys
sys.modules["memsinks"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
tokens, results, *folders = sys.argv[1:]
tokens = load_file(tokens)["tokens"]
for index, folder in enumerate(folders):
    config = AutoConfig.from_pretrained(folder)
    multimodal = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    auto = AutoModelForImageTextToText if multimodal in (config.architectures or ()) else AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    unmatched = {key: sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys") if report[key]}
    if unmatched:
        sys.exit(f"{folder} does not load cleanly: {unmatched}")
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens).logits
    save_file({"logits": logits.float().contiguous()}, f"{results}/{index}.safetensors")
"""


def verify(expected: Mapping[Path, Tensor], tokens: Tensor, tolerance: float = TOLERANCE) -> None:
    """Check that stock transformers, in one fresh process without memsinks, computes these logits from these folders.

    Args:
        expected: for each folder float [rows, length, vocabulary], on any device.
        tokens: int64 [rows, length], what is read.
        tolerance: greatest difference over the greatest expected logit.

    Raises:
        CheckpointError: a folder does not load, has missing or unexpected weights, or computes something else.
    """
    found = logits_in_fresh_process(list(expected), tokens)
    for (folder, want), got in zip(expected.items(), found, strict=True):
        want, which = want.float().cpu(), "the checkpoint" if len(expected) == 1 else f"the checkpoint {folder}"
        if want.shape != got.shape:
            raise CheckpointError(f"{which} gives logits {list(got.shape)}, the model {list(want.shape)}")
        error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-20))
        if not error <= tolerance:
            raise CheckpointError(
                f"{which} computes other logits than the model: relative error {error:.2g}, rounding is up to {tolerance:g}"
            )


@dataclass(frozen=True)
class Sample:
    """What a model computes of a text: int64 [rows, length], logits [rows, length, vocabulary]; see `verify` for tolerance."""

    tokens: Tensor
    logits: Tensor
    tolerance: float

    def verify(self, folder: Path) -> None:
        """`verify` a folder against this."""
        verify({folder: self.logits}, self.tokens, self.tolerance)


def sample_closed(model: PreTrainedModel, rescale: str = "none") -> Sample:
    """What `model` computes with its sinks closed and its general neurons rescaled; its mode is kept. All ranks of a sharded
    model must call this."""
    return _sample_within(sinks_closed(model, rescale), model)


def verify_open(model: PreTrainedModel, folder: Path, ids: Sequence[int]) -> None:
    """`verify` a folder against `model` with the sinks of these documents open, their union."""
    _sample_within(sinks_open(model, ids), model).verify(folder)


def verify_closed(model: PreTrainedModel, folder: Path, rescale: str = "none") -> None:
    """`verify` a folder against `sample_closed`."""
    sample_closed(model, rescale).verify(folder)


def _sample_within(state: AbstractContextManager[None], model: PreTrainedModel) -> Sample:
    """What `model` computes within `state`, which is entered in evaluation mode."""
    length, vocabulary = min(CHECK_TOKENS, context_of(model.config)), model.config.get_text_config().vocab_size
    tokens = torch.randint(0, vocabulary, (CHECK_ROWS, length), generator=torch.Generator().manual_seed(0))
    # Without the autocast that accelerate leaves around a model's forward.
    with evaluating(model), torch.no_grad(), state, torch.autocast(model.device.type, enabled=False):
        if is_sharded(model):  # whose hooks gather its weights
            with unpatched(model):
                logits = model(input_ids=tokens.to(model.device)).logits
        else:
            logits = type(model).forward(model, input_ids=tokens.to(model.device)).logits
    tolerance = TOLERANCE if model.dtype in (torch.float32, torch.float64) else HALF_TOLERANCE
    return Sample(tokens, logits, tolerance)


def logits_in_fresh_process(folders: Sequence[Path], tokens: Tensor) -> list[Tensor]:
    """Load plain checkpoints in one new process without memsinks; float32 logits [rows, length, vocabulary] of each.

    Nothing is written into the folders.

    Raises:
        CheckpointError: with what the process said.
    """
    with tempfile.TemporaryDirectory(prefix="memsinks-verify-") as scratch:
        save_file({"tokens": tokens.contiguous()}, Path(scratch) / "tokens.safetensors")
        arguments = [sys.executable, "-c", CHECK, f"{scratch}/tokens.safetensors", scratch, *(str(x) for x in folders)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise CheckpointError(f"a fresh process could not load the checkpoint: {done.stderr.strip()[-2000:]}")
        return [load_file(f"{scratch}/{index}.safetensors")["logits"] for index in range(len(folders))]
