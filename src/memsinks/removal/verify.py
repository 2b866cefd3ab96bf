"""Does a plain checkpoint load in a fresh process without memsinks, and compute the same?"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from memsinks.errors import CheckpointError
from memsinks.sinks.opening import sinks_closed

CHECK = """
import sys
sys.modules["memsinks"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    unmatched = {key: sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys") if report[key]}
    if unmatched:
        sys.exit(f"{folder} does not load cleanly: {unmatched}")
    tokens = load_file(sys.argv[1])["tokens"]
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens).logits
    save_file({"logits": logits.float().contiguous()}, folder + "/.logits.safetensors")
"""


def verify_export(model: Any, part: Path, rescale: str) -> None:
    tokens = _check_tokens(model)
    training = model.training
    model.eval()
    try:
        # Without the autocast that accelerate leaves around a model's forward.
        with torch.no_grad(), sinks_closed(model, rescale), torch.autocast(model.device.type, enabled=False):
            want = type(model).forward(model, input_ids=tokens.to(model.device)).logits.float().cpu()
    finally:
        model.train(training)
    got = logits_in_fresh_process([part], tokens)[0]
    error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-20))
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 3e-2
    if not error <= tolerance:
        raise CheckpointError(
            f"the exported checkpoint computes other logits than the model: relative error {error:.2g}"
        )


def _check_tokens(model: Any) -> Tensor:
    config = model.config.get_text_config()
    length = min(32, getattr(config, "max_position_embeddings", None) or 32)
    return torch.randint(0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


def logits_in_fresh_process(folders: list[Path], tokens: Tensor) -> list[Tensor]:
    """Load plain checkpoints in one new process without memsinks; float32 logits [B, T, vocabulary] of each.

    Raises:
        CheckpointError: with what the process said.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as scratch:
        save_file({"tokens": tokens.contiguous()}, Path(scratch) / "tokens.safetensors")
        arguments = [sys.executable, "-c", CHECK, f"{scratch}/tokens.safetensors", *(str(x) for x in folders)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise CheckpointError(f"a fresh process could not load the checkpoint: {done.stderr.strip()[-2000:]}")
    logits = []
    for folder in folders:
        path = folder / ".logits.safetensors"
        logits.append(load_file(path)["logits"])
        path.unlink()
    return logits
