"""The YAML of a run: every section a frozen dataclass, validated before anything starts."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from memsinks.checks import int_at_least
from memsinks.data.tokens import LEAST_VOCABULARY
from memsinks.errors import ConfigError, refuse
from memsinks.removal.settle import SettleConfig
from memsinks.runs.data_recipe import DataRecipe
from memsinks.runs.sections import RENAMED, change, load_yaml, section, unknown_keys, with_new_names
from memsinks.runs.shrink import shrink
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.families import CONTEXT
from memsinks.training.config import TrainingConfig

logger = logging.getLogger(__name__)

OF_A_COMPARISON = ("arms", "seeds", "roles")
"""Sections that a comparison has besides those of a recipe."""


@dataclass(frozen=True, kw_only=True)
class OwnRecipe:
    """Which ids get sink blocks of their own: those of exact and private documents, and of documents that are repeated often.

    Args:
        blocks: each gets so many; there must be enough ``sinks.reserved_blocks``.
        from_copies: documents with so many copies get some too; None = no others.
    """

    blocks: int = 1
    from_copies: int | None = None

    def __post_init__(self) -> None:
        problems = int_at_least("blocks", self.blocks, 1)
        problems += [] if self.from_copies is None else int_at_least("from_copies", self.from_copies, 1)
        refuse(problems, "own")


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe:
    """The tokenizer: load one from `path` (folder, JSON file or name), or train one of `vocab_size` on the corpus."""

    path: str | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        problems = [] if self.vocab_size is None else int_at_least("vocab_size", self.vocab_size, LEAST_VOCABULARY)
        if (self.path is None) == (self.vocab_size is None):
            problems.append("give either path or vocab_size")
        refuse(problems, "tokenizer")


PLAIN_TOKENIZER = TokenizerRecipe(vocab_size=1024)
"""What is trained where a recipe says nothing."""


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """The model: `pretrained` (folder or name), or a new one from `config`, which needs ``model_type``.

    ``vocab_size`` and the special tokens of a new model are set from the tokenizer. `frozen`: its own weights stay as they are,
    the sinks alone learn. `keep_prefix`: what lies below the sinks of a frozen model is computed once, see `prefix_kept`; a
    resumed run then equals the one without interruption up to rounding.
    """

    pretrained: str | None = None
    frozen: bool = False
    keep_prefix: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        if (self.pretrained is None) == (not self.config):
            problems.append("give either pretrained or config")
        if self.frozen and self.pretrained is None:
            problems.append("frozen is for a pretrained model")
        if self.keep_prefix and not self.frozen:
            problems.append("keep_prefix is for a frozen model")
        refuse(problems + (_config_problems(self.config) if self.config else []), "model")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything one run needs. `sinks` None trains an ordinary model, `settle` None leaves behind what sinks leave, `own` None
    gives nobody sink blocks of his own."""

    output: str
    model: ModelRecipe
    data: DataRecipe = field(default_factory=DataRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=lambda: PLAIN_TOKENIZER)
    sinks: SinkConfig | None = None
    own: OwnRecipe | None = None
    settle: SettleConfig | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        problems = []
        if self.model.keep_prefix and self.sinks is not None and self.sinks.layers is None:
            problems.append(
                "model.keep_prefix needs layers without sinks below the first that has some; set sinks.layers"
            )
        if self.model.keep_prefix and self.training.shard:
            problems.append("model.keep_prefix does not know sharded models; leave out training.shard")
        if self.settle is not None and self.data.background is not None and not self.data.unseen:
            problems.append(
                "settle needs data.unseen beside data.background: texts met once are then of another kind than the documents"
            )
        if self.data.shadow and self.sinks is None:
            problems.append("data.shadow is for models with sinks; leave it out, or give sinks")
        if self.model.frozen and self.sinks is None:
            problems.append("model.frozen leaves nothing to learn without sinks")
        if self.own is not None and (self.sinks is None or not self.sinks.reserved_blocks):
            problems.append("own gives away blocks that are not hashed to; set sinks.reserved_blocks")
        if self.sinks is not None and self.sinks.shared == "none":
            if self.settle is not None:
                problems.append(
                    'settle moves the shared weights, which the exact mode keeps; set sinks.shared: "decay", or leave it out'
                )
            if self.training.sinks_first > 1 or self.training.sinks_first_until:
                problems.append('sinks_first is for sinks.shared: "decay"; in exact mode use sinks_last')
            if self.sinks.open_from == 1 and self.training.sinks_last:
                problems.append(
                    "sinks.open_from: 1 in exact mode lets every text train its sinks alone, and training.sinks_last leaves such "
                    "rows out of the steps, in which nothing would learn then; set sinks_last: 0"
                )
            if self.training.compile:
                problems.append(
                    "the exact mode cannot be compiled; set sinks.shared_decay, or leave out training.compile"
                )
        refuse(problems, "invalid recipe")

    @property
    def model_settings(self) -> dict[str, Any]:
        """Those of a new model: what the recipe says, and a context as long as the rows where it says none."""
        said = any(name in self.model.config for name in CONTEXT)
        return self.model.config if said else {"max_position_embeddings": self.training.length, **self.model.config}

    def to_dict(self) -> dict[str, Any]:
        """A YAML-ready dict, all defaults written out."""
        values = dataclasses.asdict(self)
        values["sinks"] = None if self.sinks is None else self.sinks.to_dict()
        values["training"]["betas"] = list(self.training.betas)
        return values


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    """A transformers config takes any key in silence, so a misspelt size would leave the default of a large model."""
    if "model_type" not in config:
        return ['config needs model_type, e.g. "llama"']
    kind = config["model_type"]
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return [f"config.model_type {kind!r} is not known to transformers {transformers.__version__}{hint}"]
    names = {*inspect.signature(CONFIG_MAPPING[kind].__init__).parameters, *CONFIG_MAPPING[kind].attribute_map}
    return unknown_keys(config, "model.config", sorted({*names, "model_type"} - {"self", "kwargs"}))


def read_recipe(
    path: str | os.PathLike[str], changes: Mapping[str, str] | None = None, scale: Fraction | None = None
) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: a YAML file.
        changes: {"training.lr": "1e-3", ...}, YAML values that replace those of the file.
        scale: make it smaller first, see `shrink`.

    Raises:
        ConfigError: the file is missing or no YAML; unknown keys (with the nearest known one), wrong types, values out
            of range, all at once.
    """
    return parse_recipe(read_sections(path, changes, scale), str(path))


def read_sections(
    path: str | os.PathLike[str], changes: Mapping[str, str] | None = None, scale: Fraction | None = None
) -> dict[str, Any]:
    """The values of a YAML file, shrunk, then changed; ConfigError if it is missing, no YAML, or something else.

    Settings that are called by a name they had before get today's, and it is said.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from error
    values = load_yaml(content, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, got {type(values).__name__}")
    values = _renamed(values)
    if scale is not None:
        parse_recipe({x: y for x, y in values.items() if x not in OF_A_COMPARISON}, str(path))
        try:
            values = shrink(values, scale)
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} cannot be made smaller: a size in it is no number ({error})") from error
    for name, text in (changes or {}).items():
        change(values, name, text)
    return _renamed(values)


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file under today's names; says which have others in it."""
    new = dict(values)
    sections = [("data", RENAMED["data"], new)]
    if isinstance(new.get("arms"), Mapping):
        new["arms"] = dict(new["arms"])
        sections += [(arm, RENAMED["arms.*"], new["arms"]) for arm in new["arms"]]
    for name, names, parent in sections:
        if isinstance(before := parent.get(name), Mapping):
            parent[name] = with_new_names(before, names)
            for old in before.keys() - parent[name].keys():
                where = name if parent is new else f"arms.{name}"
                logger.info("%s.%s is called %s.%s today", where, old, where, names[old])
    return new


def parse_recipe(values: Mapping[str, Any], origin: str = "recipe") -> Recipe:
    """Validate the values of a recipe; see `read_recipe`."""
    problems: list[str] = []
    recipe = section(Recipe, values, "", problems)
    refuse(problems, f"cannot use {origin}")
    return recipe
