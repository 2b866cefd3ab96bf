"""The model of a recipe: what is wrong with it, as far as its configuration says, and building it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from memsinks.data.tokens import load_tokenizer
from memsinks.errors import ConfigError, refuse
from memsinks.runs.corpus import expanded
from memsinks.runs.recipe import Recipe
from memsinks.sinks.attach import add_sinks
from memsinks.sinks.checkpoint import load_config, load_stock
from memsinks.sinks.families import context_of
from memsinks.sinks.own import freeze_shared

logger = logging.getLogger(__name__)


def check_model(recipe: Recipe) -> None:
    """Check the configuration of a model before the corpus is read, which may take hours; `build_model` sees the rest.

    Raises:
        ConfigError: settings that give no configuration; rows longer than the context; a tokenizer that cannot be loaded, or has
            more tokens than the model has embeddings for. CheckpointError: a pretrained model that is not there.
    """
    if recipe.model.pretrained is not None:
        config = load_config(recipe.model.pretrained)
    else:
        settings = dict(recipe.model_settings)
        with settings_said():
            config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    tokens = embeddings = None
    if recipe.tokenizer.path is not None:
        tokens = len(load_tokenizer(expanded(recipe.tokenizer.path, "tokenizer.path")))
    if recipe.model.pretrained is not None or "vocab_size" in recipe.model.config:
        embeddings = getattr(config.get_text_config(), "vocab_size", None)
    _refuse_misfit(recipe, context_of(config), tokens, embeddings)


def _refuse_misfit(recipe: Recipe, context: int, tokens: int | None, embeddings: int | None) -> None:
    """ConfigError for rows longer than the context, or more tokens than embeddings; None where that is not known."""
    length, problems = recipe.training.length, []
    if context < length:
        problems.append(f"training.length is {length}, but the model's context ends at {context} tokens; shorten rows")
    if tokens is not None and isinstance(embeddings, int) and tokens > embeddings:
        problems.append(
            f"the tokenizer has {tokens} tokens, the model has embeddings for {embeddings}; use the model's own tokenizer, or "
            "leave vocab_size out of model.config"
        )
    refuse(problems, "cannot use the model")


@contextmanager
def settings_said() -> Iterator[None]:
    """ConfigError for whatever a configuration or a model of these settings raises."""
    try:
        yield
    except Exception as error:  # transformers and huggingface_hub raise some ten unrelated types here
        raise ConfigError(f"model.config gives no model: {error}") from error


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model of a recipe, with its sinks if it has any.

    Raises:
        ConfigError: settings that give no model, or one that does not fit the tokenizer or the rows.
        CheckpointError: a pretrained model that cannot be loaded.
    """
    model = _new_model(recipe, tokenizer) if recipe.model.pretrained is None else load_stock(recipe.model.pretrained)
    embeddings = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    _refuse_misfit(recipe, context_of(model.config), len(tokenizer), embeddings)
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
    with settings_said():
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
