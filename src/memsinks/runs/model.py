"""The model of a recipe."""

from __future__ import annotations

import logging

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from memsinks.errors import ConfigError
from memsinks.runs.recipe import Recipe
from memsinks.sinks.attach import add_sinks
from memsinks.sinks.checkpoint import load_stock
from memsinks.sinks.families import context_of
from memsinks.sinks.own import freeze_shared

logger = logging.getLogger(__name__)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model of a recipe, with its sinks if it has any.

    Raises:
        ConfigError: settings that give no model, or one that does not fit the tokenizer or the rows.
        CheckpointError: a pretrained model that cannot be loaded.
    """
    model = _new_model(recipe, tokenizer) if recipe.model.pretrained is None else load_stock(recipe.model.pretrained)
    embeddings = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if len(tokenizer) > embeddings:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, the model has embeddings for {embeddings}; use the model's own "
            "tokenizer, or leave vocab_size out of model.config"
        )
    if (context := context_of(model.config)) < recipe.training.length:
        raise ConfigError(
            f"training.length is {recipe.training.length}, but the model's context ends at {context} tokens; shorten rows"
        )
    if recipe.sinks is not None:
        logger.info("%s", add_sinks(model, recipe.sinks))
        if recipe.model.frozen:
            freeze_shared(model)
    if recipe.training.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # renamed in transformers 5.23
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


def _new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """From the settings, its start values from the seed."""
    settings = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **recipe.model_settings,
    }
    kind = settings.pop("model_type")
    torch.manual_seed(recipe.training.seed)
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    except Exception as error:  # transformers and huggingface_hub raise some ten unrelated types here
        raise ConfigError(f"model.config gives no model: {error}") from error
