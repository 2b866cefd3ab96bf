"""What a recipe needs, before it runs: parameters, FLOPs, memory by part, time, checkpoints, and what would not fit.

The model is built on the meta device and its forward is run on fake tensors, so it is neither allocated nor computed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from memsinks.errors import ConfigError
from memsinks.runs.data_recipe import DataRecipe
from memsinks.runs.model import settings_said
from memsinks.runs.prepare import prepare
from memsinks.runs.recipe import Recipe
from memsinks.runs.tokenizer import load_tokenizer_of
from memsinks.sinks.attach import add_sinks
from memsinks.sinks.checkpoint import load_config
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.experts import is_mixture
from memsinks.sinks.gradient import shared_weight
from memsinks.sinks.kernels import choose_path
from memsinks.sinks.plan import RoutingPlan, plan
from memsinks.sinks.run import planned
from memsinks.sinks.state import has_sinks, require_sinks, shared_parameters, sink_parameters

GPU = torch.device("cuda")
"""Where the run is expected to be: it decides the compute path of the sinks."""


@dataclass(frozen=True)
class Size:
    """The rows of a run. `exact` is False where the rows are only filled about as they will be."""

    tokens: int
    rows: int
    steps: int
    exact: bool


FILL = {"fill": 0.98, "split": 0.81}
"""Share of a row of 2,048 tokens that web documents fill, measured on 4,222 of them, for a corpus that is not read."""


@dataclass(frozen=True)
class RunEstimate:
    """Figures of one model under one recipe; bytes, and FLOPs (a multiply-add is two).

    Attributes:
        shared, sinks: parameters.
        open: parameters that work for one token: `shared` and the sinks that its document opens.
        step_flops: of one optimizer step, forward and backward, recomputation included.
        weights, gradients, moments: of all parameters in float32, with the step counts of the optimizer.
        activations: saved for the backward of one micro-batch, as autograd saves them.
        activations_checkpointed: the same under gradient checkpointing.
        recomputed: under gradient checkpointing, what one layer saves while the backward recomputes it: a layer's share of
            the difference.
        temporaries: the gradient at the logits, in float32 and in the type of the forward.
        peak: of all this under the settings of the recipe.
        checkpoint, model, exported: files: what resuming needs, the final model, the model without its sinks.
    """

    shared: int
    sinks: int
    open: int
    step_flops: float
    weights: int
    gradients: int
    moments: int
    activations: int
    activations_checkpointed: int
    recomputed: int
    temporaries: int
    peak: int
    checkpoint: int
    model: int
    exported: int
    warnings: tuple[str, ...]


def estimate(recipe: Recipe) -> RunEstimate:
    """The figures of a recipe.

    Counted as if every token opened its sinks and taught all weights; in exact mode rows that open sinks take less of both.
    Memory is that of one process: all parameters, gradients and moments, and one micro-batch. It does not count what the CUDA
    context, the allocator's fragments and the kernels' work space take, so leave about a tenth free.

    Raises:
        ConfigError: settings that give no model, or one with mixtures of experts.
    """
    model, training = meta_model(recipe), recipe.training
    if any(is_mixture(part) for part in model.modules()):
        raise ConfigError(
            f"a {model.config.model_type} has mixtures of experts, of which no estimate is made yet: what a token runs through "
            "and what the backward pass needs depend on the router; measure a few steps instead"
        )
    shared = sum(x.numel() for x in shared_parameters(model))
    sinks = sum(x.numel() for x in sink_parameters(model))
    config = require_sinks(model).config if has_sinks(model) else None
    rows = training.micro_rows
    bf16 = training.precision == "bf16"
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    moments = moment_bytes(model)
    vocabulary = int(model.get_output_embeddings().weight.shape[0])  # type: ignore[union-attr, index]
    with_all, with_inputs = (saved_bytes(model, rows, training.length, bf16, again) for again in (False, True))
    layers = int(model.config.get_text_config().num_hidden_layers)
    recomputed = (with_all - with_inputs) // layers
    temporaries = rows * training.length * vocabulary * (6 if bf16 else 8)
    kept = with_inputs + recomputed if training.gradient_checkpointing else with_all
    # The optimizer's temporaries (as large as the weights, on a GPU) come when the activations are gone.
    peak = 2 * weights + moments + max(kept + temporaries, weights)
    return RunEstimate(
        shared=shared,
        sinks=sinks,
        open=shared + (sinks * config.active // config.neurons if config else 0),
        step_flops=training.accumulate * flops(model, rows, training.length, training.gradient_checkpointing),
        weights=weights,
        gradients=weights,
        moments=moments,
        activations=with_all,
        activations_checkpointed=with_inputs,
        recomputed=recomputed,
        temporaries=temporaries,
        peak=peak,
        checkpoint=weights + moments,
        model=weights,
        exported=4 * shared,
        warnings=(*_not_counted(recipe), *_dislikes(model, config)),
    )


def size_of(recipe: Recipe, one_document_per_row: bool = False) -> Size:
    """Rows and steps: from the recipe alone if it says enough, otherwise by reading the corpus.

    Raises:
        ConfigError: fewer rows than one step takes.
    """
    data, training = recipe.data, recipe.training
    alone = data.alone(one_document_per_row)
    read_by_number = data.path is not None and data.limit is not None and data.copies_field is None
    exact = True
    if data.background is not None and not alone:
        tokens, exact = data.background.tokens * training.epochs, False
        rows = round(data.background.tokens / (FILL.get(data.long, 1.0) * training.length)) * training.epochs
    elif alone and read_by_number and data.long == "truncate":
        rows = _documents_met(data) * training.epochs
        tokens = rows * training.length
    else:
        packed = prepare(recipe, one_document_per_row).rows
        rows, tokens = len(packed), packed.tokens
    if rows < training.batch_rows:
        raise ConfigError(f"{rows} rows are less than one step of {training.batch_rows}; lower training.batch_rows")
    return Size(tokens, rows, rows // training.batch_rows, exact)


def _documents_met(data: DataRecipe) -> int:
    """Documents that an epoch meets, copies counted, where `limit` says how many there are."""
    assert data.limit is not None
    if data.repeat is None:
        return data.limit - data.held_out
    return data.limit - data.held_out + sum(data.repeat.dealt) - data.repeat.documents


def meta_model(recipe: Recipe) -> PreTrainedModel:
    """The model of a recipe on the meta device, with its sinks: shapes without memory."""
    if recipe.model.pretrained is not None:
        config = load_config(recipe.model.pretrained)
    else:
        settings = dict(recipe.model_settings)
        vocabulary = settings.get("vocab_size") or recipe.tokenizer.vocab_size or len(load_tokenizer_of(recipe, []))
        settings |= {"vocab_size": vocabulary} | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        kind = settings.pop("model_type")
        config = None
    with settings_said(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config or AutoConfig.for_model(kind, **settings))  # type: ignore
    if recipe.sinks is not None:
        add_sinks(model, recipe.sinks)
    return model


def moment_bytes(model: PreTrainedModel) -> int:
    """Two moments for each number, and step counts in float32: one a parameter, one a block in the sinks' lazy AdamW."""
    sinks = sink_parameters(model)
    moments = 2 * sum(x.numel() * x.element_size() for x in model.parameters())
    return moments + 4 * len(shared_parameters(model)) + 4 * sum(len(x) for x in sinks)


def flops(model: PreTrainedModel, rows: int, length: int, recompute: bool = False) -> float:
    """FLOPs of forward and backward over `rows` x `length` tokens, padding included.

    With N the entries of all weight matrices that are multiplied with (embeddings not, the output matrix always), S those of
    the sinks that a token runs through (its open blocks; the whole pool on the masked path) and A = layers x heads x head
    width, the forward takes, a token,  2 (N + S) + 4 length A,  as if every token opened its sinks and attention ran over
    whole rows. The backward takes twice that; recomputation once more what the layers take. Source: Kaplan et al.,
    arXiv 2001.08361, section 2.1.
    """
    looked_up = {id(x.weight) for x in model.modules() if isinstance(x, nn.Embedding)}
    matrices = sum(x.numel() for x in shared_parameters(model) if x.dim() > 1 and id(x) not in looked_up)
    head: Any = model.get_output_embeddings()
    in_layers = matrices - (0 if id(head.weight) in looked_up else head.weight.numel())
    text: Any = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    forward = 2.0 * in_layers + 4.0 * length * text.num_hidden_layers * text.num_attention_heads * width
    if has_sinks(model):
        config = require_sinks(model).config
        share = 1 if choose_path(config, model.dtype, GPU) == "masked" else config.active / config.neurons
        forward += 2 * share * sum(x.numel() for x in sink_parameters(model))
    return rows * length * ((4 if recompute else 3) * forward + 6.0 * head.weight.numel())


def saved_bytes(model: PreTrainedModel, rows: int, length: int, bf16: bool, recompute: bool) -> int:
    """What autograd saves for the backward of one micro-batch in which every document opens its sinks: bytes.

    Counted are the distinct storages that the forward saves, parameters not; types are those that autocast chooses on the
    CPU. The model, on the meta device, is run with fake tensors.
    """
    position_ids = torch.arange(length).repeat(rows, 1)
    routed = _routing(model, rows, length) if has_sinks(model) else None
    fake: Any = copy.deepcopy(model).train()
    enable = getattr(fake, "activation_checkpointing_enable", None) or fake.gradient_checkpointing_enable
    if recompute:
        enable({"use_reentrant": False})
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake.to_empty(device="cpu").tie_weights()
        own = {x.untyped_storage()._cdata for x in fake.parameters()}
        seen: dict[int, Any] = {}

        def note(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                seen[storage._cdata] = storage
            return x

        tokens = torch.zeros(rows, length, dtype=torch.int64)
        arguments = {"input_ids": tokens, "labels": tokens, "position_ids": position_ids, "use_cache": False}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), _planned(fake, routed):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                type(fake).stock_class.forward(fake, **arguments) if routed else fake(**arguments)
    return sum(storage.nbytes() for storage in seen.values())


def _routing(model: PreTrainedModel, rows: int, length: int) -> tuple[RoutingPlan, torch.Tensor | None]:
    """The plan and the weights of a batch in which each row is the second exposure of another document, or a later one."""
    state = require_sinks(model)
    config = state.config
    ids = torch.arange(1, rows + 1)[:, None].expand(rows, length)
    weight = None
    if config.shared == "decay" and config.shared_decay:
        exposures = torch.full_like(ids, config.open_from)
        weight = shared_weight(exposures, config.open_from, config.shared_decay)
    path = choose_path(config, model.dtype, GPU)
    scale = None if weight is None else 1.0 / weight.reshape(-1)
    return plan(ids.reshape(-1), state.layers, config, state.table, path=path, weight_scale=scale), weight


@contextmanager
def _planned(model: Any, routed: tuple[RoutingPlan, torch.Tensor | None] | None) -> Iterator[None]:
    """The model as it is within a training forward; the plan cannot be made from fake ids."""
    if routed is None:
        yield
        return
    with planned(model.sink_state, *routed):
        yield


def _not_counted(recipe: Recipe) -> Iterator[str]:
    if recipe.sinks is not None and recipe.sinks.shared == "decay" and recipe.training.sinks_first:
        yield "sinks_first is not counted: rows that hold repeated text take two thirds of a step more"
    if recipe.sinks is not None and (recipe.sinks.shared == "none" or recipe.training.sinks_last):
        yield "sinks_last is not counted: two thirds of a step for each different repeated text, as often as it has passes"
    if recipe.settle is not None:
        yield "settling after training is not counted, nor its memory (float32, micro-batches): see docs/removal.md"


def _dislikes(model: PreTrainedModel, config: SinkConfig | None) -> Iterator[str]:
    """Widths that kernels and serving tools dislike."""
    text: Any = model.config.get_text_config()
    wide = require_sinks(model).intermediate_size if has_sinks(model) else None
    wide = wide or getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    if wide % 128:
        yield f"the general width {wide} is not a multiple of 128: quantized and tensor-parallel serving dislike it"
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[union-attr, index]
    if vocabulary % 64:
        yield f"the vocabulary {vocabulary} is not a multiple of 64: the output matrix runs slower"
    if text.hidden_size % 64:
        yield f"the model width {text.hidden_size} is not a multiple of 64"
    if config is None:
        return
    if config.routing == "blocks" and config.block_size % 16:
        yield f"the sink block_size {config.block_size} is not a multiple of 16: grouped products dislike it"
    if choose_path(config, model.dtype, GPU) == "masked" and config.neurons > 2 * config.active:
        yield f"single neurons (routing {config.routing!r}): all {config.neurons} sinks are computed, then masked"
