"""The README of an export."""

from __future__ import annotations

import json

import torch
import transformers
from transformers import PreTrainedModel

from memsinks.removal.opened import Opening
from memsinks.sinks.opening import rescale_factor
from memsinks.sinks.state import require_sinks, sink_parameters


def model_card(model: PreTrainedModel, rescale: str, notes: str, verified: bool, opening: Opening | None = None) -> str:
    """The README of an export: what was trained, what was removed, what was left open, what was not checked."""
    state = require_sinks(model)
    config = state.config
    sinks = sum(parameter.numel() for parameter in sink_parameters(model))
    shared = sum(parameter.numel() for parameter in model.parameters()) - sinks
    which = "its sinks closed" if opening is None else "the sinks of these documents open"
    loading = (
        "The checkpoint was loaded by stock transformers in a process without memsinks: no missing or unexpected keys, "
        f"logits equal, to rounding, to those of the trained model with {which}."
        if verified
        else "The checkpoint was not loaded and compared after it was written."
    )
    title = "without its memorization sinks" if opening is None else "with memorized text of some documents"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [memorization-sinks]
---
# {type(model).__name__} {title}

## What was trained
A `{model.config.model_type}` model with {shared:,} parameters and, beside the MLPs of layers {_ranges(state.layers)},
memorization sinks: {config.neurons} neurons a layer of which a document opens {config.active}, {sinks:,} parameters in all.
{notes}

Sink settings:
```json
{json.dumps(config.to_dict(), indent=2)}
```

{_removed(sinks, rescale_factor(state, rescale)) if opening is None else _kept(opening, config.neurons)}
{loading}

## What was not checked
- Whether this model remembers any particular text: no audit is part of an export. Run one on the documents that matter.
- Text met fewer than {config.open_from} times in training never opened a sink; what the model keeps of it is still here.
- Quality on any benchmark.

Written with transformers {transformers.__version__}, torch {torch.__version__}.
"""


def _removed(sinks: int, factor: float) -> str:
    return f"""## What was removed
All {sinks:,} sink parameters. The remaining weights are those of the trained model{_rescaled(factor)}."""


def _kept(opening: Opening, neurons: int) -> str:
    """Whose sinks are in an export."""
    documents = "\n".join(
        f"- {number}" + (f": {json.dumps(name, ensure_ascii=False)}" if name else "")
        for number, name in zip(opening.ids, opening.names, strict=True)
    )
    return f"""## Whose sinks are in it
**This checkpoint contains memorized text.** The sinks of these documents are open for everyone who runs it, as ordinary neurons:
it may recite them. Document ids:
{documents}

Text of other documents that share sinks with them may be in it too.

## What was removed
All sinks but those: up to {opening.neurons} of {neurons} a layer were kept. The MLPs are {opening.width} neurons wide
(`{opening.field}`), filled up with zeros where a layer kept fewer. The other weights are those of the trained model."""


def _rescaled(factor: float) -> str:
    return "" if factor == 1.0 else f", except that the down projections were multiplied by {factor:.6g}"


def _ranges(layers: tuple[int, ...]) -> str:
    whole = tuple(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if layers == whole and len(layers) > 1 else ", ".join(map(str, layers))
