"""Stored results: used under the settings they were made with, whatever version wrote them, and under no others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from memsinks.errors import CheckpointError, ConfigError
from memsinks.provenance import completed, refuse_other_settings


@dataclass(frozen=True)
class Inner:
    size: int
    new: float = 0.5

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        return {{"width": "size"}.get(name, name): value for name, value in values.items()}


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner | None = None
    always: Inner = field(default_factory=lambda: Inner(3))
    sizes: tuple[int, ...] = (1, 2)


def test_what_is_missing_has_its_default_and_old_names_are_known() -> None:
    assert completed({"name": "x", "inner": {"width": 4}}, Outer) == {
        "name": "x", "inner": {"size": 4, "new": 0.5}, "always": {"size": 3, "new": 0.5}, "sizes": [1, 2],
    }  # fmt: skip
    assert completed({"name": "x", "inner": None, "unknown": 1}, Outer)["unknown"] == 1


def test_files_of_older_versions_are_taken() -> None:
    now = {"recipe": completed({"name": "x", "inner": {"size": 4}}, Outer), "seed": 1}
    refuse_other_settings(
        {"recipe": {"name": "x", "inner": {"width": 4}}, "seed": 1}, now, "run", kinds={"recipe": Outer}
    )
    refuse_other_settings({"seed": 1}, {"seed": 1}, "run", kinds={"recipe": Outer})


def test_what_differs_is_named_with_both_values() -> None:
    stored = {"recipe": {"name": "x", "inner": {"width": 4}}, "seed": 1, "old": True}
    now = {"recipe": {"name": "x", "inner": {"size": 5, "new": 0.25}}, "seed": 2}
    with pytest.raises(CheckpointError) as caught:
        refuse_other_settings(stored, now, "runs/x", kinds={"recipe": Outer}, remedy="remove it")
    assert str(caught.value) == (
        "runs/x was made with other settings: old True (now None), recipe.inner.new 0.5 (now 0.25), recipe.inner.size 4 (now 5), "
        "seed 1 (now 2); remove it"
    )


def test_what_does_not_matter_may_differ() -> None:
    stored, now = (
        {"training": {"threads": 1, "lr": 1}, "output": "a"},
        {"training": {"threads": 2, "lr": 1}, "output": "b"},
    )
    refuse_other_settings(stored, now, "run", ignored=("training.threads", "output"))
    refuse_other_settings(stored, now, "run", ignored=("training", "output"))
    with pytest.raises(ConfigError, match="output 'a'"):
        refuse_other_settings(stored, now, "run", ignored=("training", "out"), error=ConfigError)


def test_numbers_and_lists_are_compared_as_they_are_written() -> None:
    refuse_other_settings({"betas": [0.9, 0.95], "n": 1}, {"betas": (0.9, 0.95), "n": 1.0}, "run")


def test_a_function_upgrades_where_there_is_no_dataclass() -> None:
    def upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name.removeprefix("old_"): value for name, value in values.items()}

    refuse_other_settings({"a": {"old_b": 1}}, {"a": {"b": 1}}, "run", kinds={"a": upgrade})
