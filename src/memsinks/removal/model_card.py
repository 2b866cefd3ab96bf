"""The README of an export."""

from __future__ import annotations

import json

import torch
import transformers
from transformers import PreTrainedModel

from memsinks.sinks.opening import rescale_factor
from memsinks.sinks.state import require_sinks, sink_parameters


def model_card(model: PreTrainedModel, rescale: str, notes: str, verified: bool) -> str:
    """The README of an export: what was trained, what was removed, what was not checked."""
    state = require_sinks(model)
    config = state.config
    sinks = sum(parameter.numel() for parameter in sink_parameters(model))
    shared = sum(parameter.numel() for parameter in model.parameters()) - sinks
    factor = rescale_factor(state, rescale)
    loading = (
        "The checkpoint was loaded by stock transformers in a process without memsinks: no missing or unexpected keys, "
        "logits equal, to rounding, to those of the trained model with its sinks closed."
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
