"""A recipe made smaller in every direction, so that a run for days can be tried out, every line of it, in minutes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from memsinks.errors import ConfigError, refuse
from memsinks.removal.expected import LEAST

HEAD = 32
"""Least width of an attention head."""


def parse_scale(text: str) -> Fraction:
    """A scale such as ``1/64`` or ``0.25``; ConfigError unless it lies in (0, 1]."""
    try:
        scale = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"a scale is a fraction such as 1/64, got {text!r}") from error
    if not 0 < scale <= 1:
        raise ConfigError(f"a scale must lie in (0, 1], got {text}")
    return scale


def shrink(values: Mapping[str, Any], scale: Fraction) -> dict[str, Any]:
    """The values of a recipe or comparison, made smaller by `scale` = f; pure.

    - times f: documents seen once, tokens of the background;
    - times the root of f: model and MLP width, layers, heads, sinks (pool, open, block), extra neurons of arms, vocabulary,
      repeated documents, their copies, held-out and unseen documents (so the share of repeated text stays);
    - times the fourth root of f: tokens per row; rows per step times its cube, so that the number of steps stays where rows
      are full;
    - learning rates, those of settling too, are divided by what the model's width was multiplied by (the rule of muP for
      AdamW, arXiv 2203.03466).

    Widths are rounded to multiples of 32, the model is at least 64 wide and 2 layers deep, sinks are rounded to blocks, copies
    are at least 2. A tokenizer is trained instead of loaded (smaller vocabulary), and ``output`` gets a suffix. The rest stays
    as it is. FLOPs fall about as f^2.5.

    Args:
        values: what `read_sections` gives; defaults may be left out.

    Raises:
        ConfigError: the recipe names no sizes (a pretrained model, no `data.limit`), or nothing would be left of something.
    """
    new = copy.deepcopy(dict(values))
    root, problems = float(scale) ** 0.5, []
    model, data, training = (new.setdefault(name, {}) for name in ("model", "data", "training"))
    if model.get("pretrained") or not model.get("config"):
        raise ConfigError("only a model that is given by model.config can be made smaller, not a pretrained one")
    arms = [arm for arm in (new.get("arms") or {}).values() if isinstance(arm, dict)]
    before = _hidden_size(model["config"])
    model["config"] = _smaller_model(model["config"], root)
    _smaller_batches(training, root)
    _raise_rates(training, new.get("settle"), arms, before / _hidden_size(model["config"]))
    _smaller_data(data, float(scale), root, problems)
    vocabulary = model["config"].pop("vocab_size", None) or new.get("tokenizer", {}).get("vocab_size") or 50_304
    new["tokenizer"] = {"vocab_size": max(512, _rounded(vocabulary * root, 64))}
    for settings in [new.get("sinks"), *arms]:
        if isinstance(settings, dict):
            _smaller_sinks(settings, root)
    new["output"] = f"{new.get('output', 'runs')}-scale-{scale.numerator}-{scale.denominator}"
    refuse(problems, f"a scale of {scale} leaves too little")
    return new


def _smaller_batches(training: dict[str, Any], root: float) -> None:
    """Rows and their length; at most two micro-batches a step."""
    training["length"] = max(64, _rounded(training.get("length", 256) * root**0.5, 32))
    accumulate = min(training.get("accumulate", 1), 2)
    rows = max(1, round(training.get("batch_rows", 16) * root**1.5))
    training["accumulate"] = accumulate
    training["batch_rows"] = max(1, round(rows / accumulate)) * accumulate


def _raise_rates(
    training: dict[str, Any], settle: dict[str, Any] | None, arms: Sequence[dict[str, Any]], factor: float
) -> None:
    """All learning rates times `factor`, those of settling where they are given."""
    training.setdefault("lr", 1e-3)
    places = [(training, "lr"), (settle, "lr"), (settle, "sink_lr"), *((arm, "settle_lr") for arm in arms)]
    for settings, name in places:
        if settings and settings.get(name):
            settings[name] = float(f"{float(settings[name]) * factor:.3g}")


def _rounded(value: float, multiple: int) -> int:
    return max(multiple, multiple * round(value / multiple))


def _name(config: Mapping[str, Any], name: str) -> str:
    """What an architecture calls a setting of its config."""
    known = getattr(CONFIG_MAPPING[config["model_type"]], "attribute_map", {}).get(name, name)
    return name if name in config else known


def _hidden_size(config: Mapping[str, Any]) -> int:
    name = _name(config, "hidden_size")
    if name not in config:
        raise ConfigError(f"model.config.{name} is missing, so the model cannot be made smaller")
    size = int(config[name])
    if not 0 < size < 2**24:
        raise ConfigError(f"model.config.{name} must be above 0 and below {2**24:,}, got {size}")
    return size


def _smaller_model(config: Mapping[str, Any], root: float) -> dict[str, Any]:
    new = dict(config)
    names = {
        x: _name(config, x) for x in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    }
    layers, heads, groups = (names[x] for x in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"))
    shared = new.get(heads, 1) // new.get(groups, new.get(heads, 1))  # heads a key-value head serves
    hidden_size = new[names["hidden_size"]] = max(64, _rounded(_hidden_size(config) * root, HEAD * shared))
    if layers in new:
        new[layers] = max(2, round(new[layers] * root))
    if heads in new:
        fitting = [x for x in range(1, hidden_size // HEAD // shared + 1) if hidden_size % (x * shared) == 0]
        wanted = new[heads] // shared * root
        few = min(fitting, key=lambda x: abs(x - wanted))
        new[heads] = few * shared
        if groups in new:
            new[groups] = few
        new.pop("head_dim", None)
    for name in ("intermediate_size", "n_inner"):
        if new.get(name):
            new[name] = _rounded(new[name] * root, HEAD)
    for name in ("max_position_embeddings", "n_positions"):
        new.pop(name, None)
    return new


def _smaller_data(data: dict[str, Any], scale: float, root: float, problems: list[str]) -> None:
    repeat, held_out = data.get("repeat"), data.get("held_out", 0)
    repeated = repeat["documents"] if repeat else 0
    limit = data.get("limit")
    if limit is None and data.get("path"):
        raise ConfigError("data.limit is missing, so the number of documents cannot be made smaller")
    fewer = round(held_out * root)
    for name in ("unseen", "fresh"):
        if data.get(name):
            data[name] = max(LEAST, round(data[name] * root))
    if held_out and not fewer:
        problems.append(f"data.held_out {held_out} becomes 0")
    if repeat:
        copies = repeat["copies"] if isinstance(repeat["copies"], list) else [repeat["copies"]]
        smaller = [x if x < 2 else max(2, round(x * root)) for x in copies]
        data["repeat"] = {"documents": round(repeated * root), "copies": smaller}
        if data["repeat"]["documents"] < len(copies):
            problems.append(f"data.repeat.documents {repeated} becomes {data['repeat']['documents']}")
    if limit is not None:
        once = limit - held_out - repeated
        left = round(once * scale)
        if once > 0 and not left:
            problems.append(f"the {once} documents seen once become 0")
        data["limit"] = fewer + round(repeated * root) + left
    data["held_out"] = fewer
    for name in ("stories", "held_out_stories", "people_once"):
        if name in data.get("synthetic", {}):
            data["synthetic"][name] = max(1, round(data["synthetic"][name] * (root if "held" in name else scale)))
    if data.get("background"):
        data["background"]["tokens"] = round(data["background"]["tokens"] * scale)
        if data["background"]["tokens"] < 1000:
            problems.append(f"data.background.tokens becomes {data['background']['tokens']}")


def _smaller_sinks(settings: dict[str, Any], root: float) -> None:
    """Pool, open neurons and blocks of a `SinkConfig` or an arm, and the extra neurons of an arm."""
    for name in ("intermediate_size", "host_width"):
        settings.pop(name, None)
    blocks = settings.get("rival") not in ("published", "untied") and settings.get("routing", "blocks") == "blocks"
    size = _rounded(settings.get("block_size", 32) * root, 8) if blocks else 1
    if "neurons" in settings:
        settings["active"] = _rounded(settings["active"] * root, size)
        settings["neurons"] = max(settings["active"], _rounded(settings["neurons"] * root, size))
        if blocks:
            settings["block_size"] = size
    if "reserved_blocks" in settings:
        settings["reserved_blocks"] = round(settings["reserved_blocks"] * root)
    if settings.get("extra_neurons"):
        settings["extra_neurons"] = round(abs(settings["extra_neurons"]) * root) * (
            1 if settings["extra_neurons"] > 0 else -1
        )
    if settings.get("heads"):
        settings["heads"] = max(1, round(settings["heads"] * root))
