"""The YAML of a comparison: a recipe with arms, seeds and roles, validated; where its runs lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from memsinks.checks import is_int
from memsinks.errors import ConfigError, refuse
from memsinks.files import read_json
from memsinks.provenance import refuse_other_settings
from memsinks.research.compare.arm import RUN, SETTINGS, Arm, settings_of
from memsinks.research.rivals.registry import SETTINGS_OF_A_RUN
from memsinks.runs.recipe import OF_A_COMPARISON, Recipe, parse_recipe, read_sections
from memsinks.runs.sections import unknown_keys

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
        refuse_other_settings(read_json(folder / SETTINGS), self.settings(arm), folder, kinds=SETTINGS_OF_A_RUN)
        return read_json(folder / RUN)


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
    roles = roles or {}
    recipe = parse_recipe(values, str(path))
    arms, problems = _arms(given, recipe)
    problems = [
        *_recipe_problems(recipe, values.get("training") or {}),
        *_seed_problems(seeds),
        *_role_problems(roles, given),
        *problems,
    ]
    if not problems:
        problems = _editing_problems(arms, roles)
    refuse(problems, f"cannot use {path}")
    return Comparison(recipe, tuple(arms), tuple(seeds or ()), roles)


def _recipe_problems(recipe: Recipe, training: Mapping[str, Any]) -> list[str]:
    """What of a recipe is an arm's business in a comparison."""
    problems = [
        f"training.{name} belongs to an arm, not to the recipe"
        for name in ("sinks_first", "sinks_first_until", "sinks_last", "sink_lr_factor")
        if name in training
    ]
    if recipe.sinks is not None:
        problems.append("sinks belong to an arm, not to the recipe")
    if recipe.settle is not None:
        problems.append("settle belongs to an arm (settle_lr), not to the recipe")
    if recipe.data.repeat is None:
        problems.append("data.repeat is missing: without repeated documents there is nothing to forget")
    return problems


def _seed_problems(seeds: Any) -> list[str]:
    good = isinstance(seeds, list) and seeds and all(is_int(x) and x >= 0 for x in seeds)
    return [] if good else [f"seeds must be a list of ints, got {seeds!r}"]


def _role_problems(roles: Mapping[str, Any], arms: Mapping[str, Any]) -> list[str]:
    problems = unknown_keys(roles, "roles", ROLES)
    problems += [f"roles.{role} names no arm: {arm!r}" for role, arm in roles.items() if arm not in list(arms)]
    return problems + [f"roles.{role} is missing" for role in ("audited", "against") if role not in roles]


def _arms(given: Mapping[str, Any], recipe: Recipe) -> tuple[list[Arm], list[str]]:
    """The arms of a file, and what is wrong with each."""
    arms: list[Arm] = []
    problems: list[str] = []
    for name, settings in given.items():
        if not isinstance(settings, Mapping) or "rival" not in settings:
            problems.append(f"arms.{name} needs rival: the name of a method")
            continue
        arm = Arm(name, str(settings["rival"]), {x: y for x, y in settings.items() if x != "rival"})
        try:
            problems += [f"arms.{name}: {problem}" for problem in _arm_problems(arm, recipe)]
        except ConfigError as error:
            problems.append(f"arms.{name}: {error}")
        arms.append(arm)
    if len({arm.slug for arm in arms}) < len(arms):
        problems.append("two arms have the same name but for signs; rename one")
    return arms, problems


def _arm_problems(arm: Arm, recipe: Recipe) -> list[str]:
    """What does not fit the recipe; ConfigError for what is wrong with the method itself."""
    problems = []
    training = arm.training
    if training.settle is not None and recipe.data.background is not None and not recipe.data.unseen:
        problems.append("settling beside data.background needs data.unseen, see Recipe")
    if training.fresh and not recipe.data.fresh:
        problems.append("fresh text is asked for, but data.fresh sets none aside")
    if training.sinks and training.sinks.shared == "none":
        if training.settle is not None or training.sinks_first_until:
            problems.append('settling and sinks_first_until are for shared="decay"')
        if recipe.data.one_document_per_row is False:
            problems.append('shared="none" needs data.one_document_per_row')
        if recipe.training.compile:
            problems.append('shared="none" cannot be compiled; leave out training.compile')
    sizes = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "n_inner")
    wrong = {x: recipe.model.config[x] for x in sizes if not is_int(recipe.model.config.get(x) or 0)}
    if wrong and (training.heads or training.extra_neurons):
        return [*problems, f"model.config gives no model to which parts could be added: {wrong} must be whole numbers"]
    heads = recipe.model.config.get("num_attention_heads")
    groups = recipe.model.config.get("num_key_value_heads") or heads
    if training.heads and groups != heads:
        problems.append(
            f"reserved heads need as many key-value heads as query heads, got {groups} and {heads}: in groups, heads that stay "
            "would read reserved ones in training, and others once these are cut out"
        )
    return problems


def _editing_problems(arms: Sequence[Arm], roles: Mapping[str, str]) -> list[str]:
    """An arm that edits needs another that trains a model without sinks, and has no role itself."""
    by_name = {arm.name: arm for arm in arms}
    problems = []
    for arm in arms:
        if arm.editing is None:
            continue
        base = by_name.get(arm.editing.after)
        if base is None:
            problems.append(
                f"arms.{arm.name}.after names no arm: {arm.editing.after!r}; known are {', '.join(by_name)}"
            )
        elif base.editing is not None or base.training.sinks is not None:
            problems.append(f"arms.{arm.name}.after: {base.name!r} must be an arm that trains a model without sinks")
    return problems + [
        f"roles.{role} is {name!r}, which edits another arm's model; a role needs an arm that trains one"
        for role, name in roles.items()
        if by_name[name].editing is not None
    ]
