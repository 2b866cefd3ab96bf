"""The YAML of a comparison: a recipe with arms, seeds and roles, validated; where its runs lie."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from memsinks.errors import CheckpointError, ConfigError, refuse
from memsinks.research.compare.arm import RUN, SETTINGS, Arm, settings_of
from memsinks.research.rivals.registry import method
from memsinks.runs.recipe import OF_A_COMPARISON, Recipe, parse_recipe, read_sections
from memsinks.runs.sections import differing, unknown_keys

ROLES = ("audited", "against", "twin", "seen_once")


@dataclass(frozen=True)
class Comparison:
    """What a file for `compare` says.

    Args:
        recipe: the recipe all arms share; its `sinks` are None, its data repeats some documents.
        arms: in the order of the table.
        seeds: of start values, order and choice of documents.
        roles: which arm is audited first, which is the ordinary model (`against`), the `twin`, the `seen_once`.
    """

    recipe: Recipe
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    roles: dict[str, str]

    def folder(self, arm: Arm, seed: int) -> Path:
        return Path(self.recipe.output) / f"seed-{seed}" / arm.slug

    def settings(self, arm: Arm) -> dict[str, Any]:
        """What a run of an arm depends on beside its seed, JSON-ready."""
        return settings_of(self.recipe, arm)

    def finished(self, arm: Arm, seed: int) -> dict[str, Any] | None:
        """The facts of a finished run; None if it is not finished.

        Raises:
            CheckpointError: the run was made with other settings.
        """
        folder = self.folder(arm, seed)
        if not (folder / RUN).is_file():
            return None
        before, now = json.loads((folder / SETTINGS).read_text()), self.settings(arm)
        before["recipe"] = settings_of(parse_recipe(before["recipe"] | {"output": ""}), arm)["recipe"]  # newer defaults
        if before != now:
            raise CheckpointError(
                f"{folder} is a run with another {', '.join(differing(before, now))}; choose another output, or delete it"
            )
        return json.loads((folder / RUN).read_text())


def read_comparison(path: Path, changes: Mapping[str, str] | None = None, scale: Fraction | None = None) -> Comparison:
    """Read a YAML file: the sections of a recipe, `arms`, `seeds` and `roles`.

    Args:
        changes: {"training.lr": "1e-3", ...}, as for `read_recipe`.
        scale: make it smaller first, see `shrink`.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    values = read_sections(path, changes, scale)
    if not isinstance(values.get("arms"), dict):
        raise ConfigError(f"{path} needs a section arms: NAME: {{rival: ..., settings ...}}; is it a plain recipe?")
    given, seeds, roles = (values.pop(name, None) for name in OF_A_COMPARISON)
    recipe = parse_recipe(values, str(path))
    own = [x for x in ("sinks_first", "sink_lr_factor") if x in (values.get("training") or {})]
    problems = [f"training.{name} belongs to an arm, not to the recipe" for name in own]
    problems += unknown_keys(roles or {}, "roles", ROLES)
    if not isinstance(seeds, list) or not seeds or not all(isinstance(x, int) and x >= 0 for x in seeds):
        problems.append(f"seeds must be a list of ints, got {seeds!r}")
    problems += [f"roles.{role} names no arm: {arm!r}" for role, arm in (roles or {}).items() if arm not in given]
    problems += [f"roles.{role} is missing" for role in ("audited", "against") if role not in (roles or {})]
    if recipe.sinks is not None:
        problems.append("sinks belong to an arm, not to the recipe")
    if recipe.settle is not None:
        problems.append("settle belongs to an arm (settle_lr), not to the recipe")
    if recipe.data.repeat is None:
        problems.append("data.repeat is missing: without repeated documents there is nothing to forget")
    packed = recipe.data.one_document_per_row is False
    arms = []
    for name, settings in given.items():
        if not isinstance(settings, Mapping) or "rival" not in settings:
            problems.append(f"arms.{name} needs rival: the name of a method")
            continue
        arm = Arm(name, str(settings["rival"]), {x: y for x, y in settings.items() if x != "rival"})
        try:
            made = method(arm.rival, arm.settings)
            sinks = made.sinks
            if made.settle is not None and recipe.data.background is not None and not recipe.data.unseen:
                problems.append(f"arms.{name}: settling beside data.background needs data.unseen, see Recipe")
            if sinks and sinks.shared == "none" and packed:
                problems.append(f'arms.{name}: shared="none" needs data.one_document_per_row')
            if sinks and sinks.shared == "none" and recipe.training.compile:
                problems.append(f'arms.{name}: shared="none" cannot be compiled; leave out training.compile')
        except ConfigError as error:
            problems.append(f"arms.{name}: {error}")
        arms.append(arm)
    if len({arm.slug for arm in arms}) < len(arms):
        problems.append("two arms have the same name but for signs; rename one")
    if not problems:
        problems += _after_problems(arms)
        problems += [
            f"roles.{role} is {name!r}, which edits another arm's model; a role needs an arm that trains one"
            for role, name in (roles or {}).items() if any(x.name == name and x.method.after for x in arms)
        ]  # fmt: skip
    refuse(problems, f"cannot use {path}")
    return Comparison(recipe, tuple(arms), tuple(seeds), roles)  # type: ignore[arg-type]


def _after_problems(arms: Sequence[Arm]) -> list[str]:
    """What is wrong with the `after` of each arm: it must be an arm that trains a model, without sinks."""
    by_name = {arm.name: arm for arm in arms}
    problems = []
    for arm in arms:
        base = arm.method.after
        if base is None:
            continue
        if base not in by_name:
            problems.append(f"arms.{arm.name}.after names no arm: {base!r}; known are {', '.join(by_name)}")
        elif by_name[base].method.after is not None or by_name[base].method.sinks is not None:
            problems.append(f"arms.{arm.name}.after: {base!r} must be an arm that trains a model without sinks")
    return problems
