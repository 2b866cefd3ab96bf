"""What is wrong with the model of a recipe, said before the corpus is read, which may take hours; `build_model` sees the rest."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from memsinks.data.tokens import load_tokenizer
from memsinks.errors import ConfigError, refuse
from memsinks.runs.corpus import expanded
from memsinks.runs.recipe import Recipe
from memsinks.sinks.checkpoint import load_config
from memsinks.sinks.families import context_of


def check_model(recipe: Recipe) -> None:
    """Check the configuration of a model against the rows and the tokenizer, as far as a recipe names them.

    Raises:
        ConfigError: settings that give no configuration; rows longer than the context; a tokenizer that cannot be loaded, or has
            more tokens than the model has embeddings for. CheckpointError: a pretrained model that is not there.
    """
    config, length, problems = _config(recipe), recipe.training.length, []
    if (context := context_of(config)) < length:
        problems.append(f"training.length is {length}, but the model's context ends at {context} tokens; shorten rows")
    given = recipe.model.pretrained is not None or "vocab_size" in recipe.model.config
    if recipe.tokenizer.path is not None:
        tokens = len(load_tokenizer(expanded(recipe.tokenizer.path, "tokenizer.path")))
        embeddings: Any = getattr(config.get_text_config(), "vocab_size", None)
        if given and isinstance(embeddings, int) and tokens > embeddings:
            problems.append(
                f"the tokenizer has {tokens} tokens, the model has embeddings for {embeddings}; use the model's own tokenizer, "
                "or leave vocab_size out of model.config"
            )
    refuse(problems, "cannot use the model")


def _config(recipe: Recipe) -> PretrainedConfig:
    if recipe.model.pretrained is not None:
        return load_config(recipe.model.pretrained)
    settings = dict(recipe.model_settings)
    try:
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except Exception as error:  # see `build_model`
        raise ConfigError(f"model.config gives no model: {error}") from error
