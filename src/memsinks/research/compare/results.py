"""What a comparison writes: compare.json, table.md, the picture; what was reported before is kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memsinks.auditing.result import Audit
from memsinks.errors import CheckpointError
from memsinks.files import read_json, write_json
from memsinks.provenance import refuse_other_settings
from memsinks.research.compare.arm import Arm
from memsinks.research.compare.comparison import Comparison
from memsinks.research.compare.picture import draw
from memsinks.research.compare.table import rows, table
from memsinks.research.rivals.registry import settings_today
from memsinks.runs.corpus import source_hashes
from memsinks.runs.prepare import FACTS
from memsinks.runs.recipe import Recipe

REPORT = "compare.json"


def reported(comparison: Comparison) -> dict[str, Any]:
    """What compare.json says already, or an empty one.

    Raises:
        CheckpointError: it is damaged, or reports a comparison with another recipe, arm or role.
    """
    path = Path(comparison.recipe.output) / REPORT
    if not path.is_file():
        return {"seeds": [], "runs": [], "rows": [], "audits": {}}
    result = read_json(path)
    empty = {"seeds": [], "runs": [], "rows": [], "audits": {}, "recipe": {}}
    good = isinstance(result, dict) and all(isinstance(result.get(name), type(x)) for name, x in empty.items())
    runs = result["runs"] if good else []
    if not good or any(not isinstance(x, dict) or not x.keys() >= {"arm", "seed", "rival", "settings"} for x in runs):
        raise CheckpointError(f"{path} is damaged: it reports no comparison; remove it, and it is made again")
    refuse_other_settings(
        result["recipe"],
        comparison.recipe.to_dict(),
        path,
        kinds={"": Recipe},
        ignored=("output",),
        remedy="choose another output",
    )
    arms = {arm.name: arm for arm in comparison.arms}
    for run in runs:
        arm = arms.get(run["arm"])
        if arm is not None and (run["rival"], settings_today(run["settings"])) != (arm.rival, arm.settings):
            raise CheckpointError(
                f"{path} reports arm {arm.name!r} with {run['settings']}, asked for is {arm.settings}; give it another name, "
                "or choose another output"
            )
    if result.get("roles", comparison.roles) != comparison.roles:
        raise CheckpointError(
            f"{path} reports models measured with the roles {result['roles']}, asked for are {comparison.roles}; choose another "
            "output"
        )
    return result


def reported_run(arm: Arm, seed: int, runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The facts of a run among those that compare.json reports."""
    for run in runs:
        same = (run["arm"], run["seed"], run["rival"]) == (arm.name, seed, arm.rival)
        if same and settings_today(run["settings"]) == arm.settings:
            return run
    return None


def _sources_in(path: Path) -> dict[str, str]:
    values = read_json(path)
    sources = (values.get("sources") or {}) if isinstance(values, dict) else None
    if not isinstance(sources, dict) or not all(isinstance(x, str) for x in sources.values()):
        raise CheckpointError(f"{path} is damaged: its sources are no hashes; remove it, and it is made again")
    return sources


def data_sources(comparison: Comparison) -> dict[str, str]:
    """SHA-256 of the files that the tokens of the seeds come from, by the name of their setting.

    Raises:
        CheckpointError: a file that is there now is not the one that a seed was made from, or one that compare.json reports;
            or two of those were made from different files.
    """
    output = Path(comparison.recipe.output)
    made = {output / f"seed-{seed}" / "data" / FACTS for seed in comparison.seeds} | {output / REPORT}
    found = {path: _sources_in(path) for path in sorted(made) if path.is_file()}
    sources: dict[str, str] = {}
    origin: dict[str, Path] = {}
    for path, hashes in found.items():
        for name, value in hashes.items():
            if sources.setdefault(name, value) != value:
                raise CheckpointError(
                    f"the file of {name} has changed: {origin[name]} was made from one with SHA-256 {sources[name][:12]}..., "
                    f"{path} from one with {value[:12]}...; remove what was made from the wrong one, or choose another output"
                )
            origin.setdefault(name, path)
    now = source_hashes(comparison.recipe)
    changed = [name for name, value in sources.items() if now.get(name, value) != value]
    if changed:
        said = ", ".join(f"{name} (SHA-256 {sources[name][:12]}..., now {now[name][:12]}...)" for name in changed)
        raise CheckpointError(
            f"files have changed since {origin[changed[0]]} was made from them: {said}; restore them, or choose another output"
        )
    return sources | now


def write_results(
    comparison: Comparison, audits: Mapping[int, Audit], step_times: dict[str, Any] | None = None
) -> dict[str, Any]:
    """compare.json, table.md and the picture, in the output folder; returns what compare.json holds.

    Args:
        audits: by seed, the new ones.
        step_times: new ones; None keeps those that are there.

    Raises:
        CheckpointError: compare.json there is of another recipe.
    """
    output, kept = Path(comparison.recipe.output), reported(comparison)
    by_run = {(run["arm"], run["seed"]): run for run in kept["runs"]}
    for seed in audits:
        by_run |= {(arm.name, seed): facts for arm in comparison.arms if (facts := comparison.finished(arm, seed))}
    names = [arm.name for arm in comparison.arms]
    runs = sorted(
        (run for run in by_run.values() if run["arm"] in names), key=lambda run: (run["seed"], names.index(run["arm"]))
    )
    result = {
        "recipe": comparison.recipe.to_dict(),
        "sources": data_sources(comparison),
        "seeds": sorted({*kept["seeds"], *audits}),
        "roles": comparison.roles,
        "rows": rows(comparison.arms, audits, runs, kept["rows"]),
        "runs": runs,
        "compute_seconds": round(sum(x["seconds"] for x in runs)),
        "step_times": step_times or kept.get("step_times"),
        "audits": kept["audits"] | {str(seed): found.to_dict() for seed, found in audits.items()},
    }
    write_json(output / REPORT, result, indent=1)
    (output / "table.md").write_text(table(result) + "\n")
    draw(result, output / "pareto.png")
    return json.loads(json.dumps(result))
