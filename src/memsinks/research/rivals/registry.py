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
from memsinks.research.rivals.method import Method
from memsinks.research.rivals.sgtm import sgtm
from memsinks.research.rivals.sinks import gated, published, untied
from memsinks.research.rivals.standard import standard
from memsinks.runs.sections import unknown_keys, unknown_names

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


def method(name: str, settings: Mapping[str, Any]) -> Method:
    """The method of a name with its settings.

    Raises:
        ConfigError: an unknown name or setting (with the nearest known one), a missing or impossible one.
    """
    problems = unknown_names([name], "rival ", RIVALS)
    if problems:
        raise ConfigError(problems[0])
    function = RIVALS[name]
    known = inspect.signature(function).parameters
    open_ended = any(x.kind is inspect.Parameter.VAR_KEYWORD for x in known.values())
    problems = [] if open_ended else unknown_keys(settings, name, known)
    problems += [f"{name}.{x} is missing" for x, y in known.items()
                 if y.default is y.empty and y.kind is y.KEYWORD_ONLY and x not in settings]  # fmt: skip
    if problems:
        raise ConfigError("; ".join(problems))
    try:
        return function(**settings)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}") from error
