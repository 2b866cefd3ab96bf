"""The plain checkpoint: the stock part alone, checked by loading it in a fresh process without memsinks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .attach import down_modules, require_sinks, rescale_factor, sinks_closed, unwrap
from .checkpoint import written_beside
from .config import CheckpointError
from .hosts import is_sink, sink_parameters

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


def export(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rescale: str = "none",
    notes: str = "",
    verify: bool = True,
) -> Path:
    """Write the model without its sinks as a plain checkpoint that needs nothing of ours.

    The folder is written beside and renamed only after a fresh process, in which memsinks cannot be imported, has
    loaded it with stock transformers and computed the same logits as this model with sinks closed.

    Args:
        model: a model with sinks; not changed.
        directory: must not exist or be empty.
        tokenizer: written along if given.
        rescale: factor of the general neurons, see `SinkConfig.rescale_factors`; their down projection is multiplied.
        notes: text for the model card: what it was trained on, what for.
        verify: run the check (about 5 s and the memory of a second copy of the model).

    Returns:
        The directory.

    Raises:
        CheckpointError: the directory is not empty, writing failed, or the check did not pass; nothing is left behind.
    """
    state = require_sinks(model)
    model = unwrap(model)
    target = Path(directory)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(
            f"{target} is not an empty folder; export into a new one, so that no other file gets into it"
        )
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise CheckpointError(
            "the model is sharded; save it, load it in one process with memsinks.load, and export that"
        )
    factor = rescale_factor(state, rescale)
    scaled = {id(host.weight) for host in down_modules(model)} if factor != 1.0 else set()
    tensors = {
        name: tensor * factor if id(tensor) in scaled else tensor.detach()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not is_sink(name)
    }
    with written_beside(target) as part:
        model.stock_class.save_pretrained(model, part, state_dict=tensors)  # type: ignore[attr-defined]
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        if verify:
            _verify(model, part, rescale)
        (part / "README.md").write_text(model_card(model, rescale, notes, verify))
    return target


def _verify(model: Any, part: Path, rescale: str) -> None:
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


def model_card(model: PreTrainedModel, rescale: str, notes: str, verified: bool) -> str:
    """The README of an export: what was trained, what was removed, what was not checked."""
    state = require_sinks(model)
    config = state.config
    sinks = sum(parameter.numel() for parameter in sink_parameters(model))
    shared = sum(parameter.numel() for parameter in model.parameters()) - sinks
    factor = rescale_factor(state, rescale)
    loading = (
        "The checkpoint was loaded by stock transformers in a process without memsinks: no missing or unexpected keys, "
        "logits equal to those of the trained model with its sinks closed."
        if verified
        else "The checkpoint was not loaded and compared after it was written."
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [memorization-sinks]
---
# {type(model).__name__} without its memorization sinks

## What was trained
A `{model.config.model_type}` model with {shared:,} parameters and, beside the MLPs of layers {_ranges(state.layers)},
memorization sinks: {config.neurons} neurons a layer of which a document opens {config.active}, {sinks:,} parameters in all.
{notes}

Sink settings:
```json
{json.dumps(config.to_dict(), indent=2)}
```

## What was removed
All {sinks:,} sink parameters. The remaining weights are those of the trained model{_rescaled(factor)}.
{loading}

## What was not checked
- Whether this model remembers any particular text: no audit is part of an export. Run one on the documents that matter.
- Text met fewer than {config.open_from} times in training never opened a sink; what the model keeps of it is still here.
- Quality on any benchmark.

Written with transformers {transformers.__version__}, torch {torch.__version__}.
"""


def _rescaled(factor: float) -> str:
    return "" if factor == 1.0 else f", except that the down projections were multiplied by {factor:.6g}"


def _ranges(layers: tuple[int, ...]) -> str:
    whole = tuple(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if layers == whole and len(layers) > 1 else ", ".join(map(str, layers))
