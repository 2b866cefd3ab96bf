"""Ways of training and of editing a trained model, ours among them: functions of keyword settings that return a `Method`.

A new one is a file here with one function, and a line in `RIVALS`; `docs/rivals.md` shows how.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from memsinks.errors import ConfigError
from memsinks.research.rivals import after
from memsinks.research.rivals.caps import cap, twin
from memsinks.research.rivals.goldfish import goldfish
from memsinks.research.rivals.gradient_masking import gradient_masking
from memsinks.research.rivals.method import EditingMethod, Method, TrainingMethod
from memsinks.research.rivals.sgtm import sgtm
from memsinks.research.rivals.sinks import gated, published, untied
from memsinks.research.rivals.standard import standard
from memsinks.runs.recipe import Recipe
from memsinks.runs.sections import RENAMED, unknown_keys, unknown_names, with_new_names
from memsinks.sinks.config import SinkConfig

RIVALS: dict[str, Callable[..., Method]] = {
    "standard": standard,
    "cap": cap,
    "twin": twin,
    "published": published,
    "gated": gated,
    "untied": untied,
    "goldfish": goldfish,
    "gradient-masking": gradient_masking,
    "sgtm": sgtm,
    "activations": after.activations,
    "zero-out": after.zero_out,
    "integrated-gradients": after.integrated_gradients,
    "hard-concrete": after.hard_concrete_pruning,
    "random-neurons": after.random_neurons,
    "gradient-ascent": after.gradient_ascent,
    "graddiff": after.graddiff,
    "npo": after.npo,
    "simnpo": after.simnpo,
}


def settings_today(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an arm under the names they have today."""
    return with_new_names(settings, RENAMED["arms.*"])


SETTINGS_OF_A_RUN = {"recipe": Recipe, "settings": settings_today, "method.sinks": SinkConfig}
"""The sections of what a run of an arm was made with, for `refuse_other_settings`."""


def method(name: str, settings: Mapping[str, Any]) -> Method:
    """The method of a name with its settings; settings may have the names they had before.

    Raises:
        ConfigError: an unknown name or setting (with the nearest known one), a missing or impossible one.
    """
    settings = settings_today(settings)
    problems = unknown_names([name], "rival ", RIVALS)
    if problems:
        raise ConfigError(problems[0])
    function = RIVALS[name]
    known = inspect.signature(function).parameters
    open_ended = any(x.kind is inspect.Parameter.VAR_KEYWORD for x in known.values())
    problems = [] if open_ended else unknown_keys(settings, name, known)
    problems += [
        f"{name}.{x} is missing"
        for x, y in known.items()
        if y.default is y.empty and y.kind is y.KEYWORD_ONLY and x not in settings
    ]
    if problems:
        raise ConfigError("; ".join(problems))
    try:
        return function(**settings)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}") from error


def training_method(name: str, settings: Mapping[str, Any]) -> TrainingMethod:
    """`method` of a rival that trains a model; ConfigError for one that edits another's."""
    found = method(name, settings)
    if not isinstance(found, TrainingMethod):
        raise ConfigError(f"{name} edits a trained model and trains none")
    return found


def editing_method(name: str, settings: Mapping[str, Any]) -> EditingMethod:
    """`method` of a rival that edits a trained model; ConfigError for one that trains."""
    found = method(name, settings)
    if not isinstance(found, EditingMethod):
        raise ConfigError(f"{name} trains a model and edits none")
    return found
