"""A head-to-head of training-time methods: arms x seeds -> one table, one JSON, one picture.

All arms of a seed see the same documents in the same order, one a row, the same tokens, steps, learning rate, optimizer
and divisor; an arm is a method of `rivals` with its settings. A run is finished when its ``run.json`` is there, and is not
made again; one that was cut off continues from its last checkpoint, if `training.save_every` asks for any.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from memsinks.auditing.pictures import require_matplotlib
from memsinks.errors import ConfigError, refuse
from memsinks.research.compare.arm import Arm, train, with_method
from memsinks.research.compare.comparison import Comparison
from memsinks.research.compare.edited import edit_arm, with_bases
from memsinks.research.compare.processes import run_processes
from memsinks.research.compare.results import REPORT, data_sources, reported, reported_run, write_results
from memsinks.research.compare.seed_audit import audit_seed
from memsinks.research.compare.step_times import step_seconds
from memsinks.research.rivals.method import TrainingMethod
from memsinks.runs.prepare import prepare
from memsinks.runs.sections import unknown_keys

logger = logging.getLogger(__name__)


def train_arm(comparison: Comparison, arm: Arm, seed: int, steps: int | None = None) -> dict[str, Any]:
    """Train one arm with one seed, see `arm.train`, or edit another's model; returns its facts.

    Raises:
        CheckpointError: a file has changed since another seed was made from it, or as for `arm.train`.
    """
    data_sources(comparison)
    if arm.editing is not None:
        return edit_arm(comparison, arm, arm.editing, seed)
    return train(comparison.recipe, arm, seed, comparison.folder(arm, seed), steps)


def prepare_data(comparison: Comparison, seed: int) -> Path:
    """Make the folder of tokens that all arms of a seed train on, if it is not there; see `prepare`.

    Raises:
        CheckpointError: a file has changed since another seed was made from it, or this one.
    """
    recipe = with_method(comparison.recipe, TrainingMethod(), seed, Path())
    folder = Path(comparison.recipe.output) / f"seed-{seed}" / "data"
    data_sources(comparison)
    prepare(recipe, one_document_per_row=True, folder=folder)
    return folder


def compare(
    comparison: Comparison,
    *,
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    jobs: int = 1,
    command: Sequence[str] | None = None,
    audits: bool = True,
    attacks: Literal["forward", "all"] = "forward",
) -> dict[str, Any] | None:
    """Train what is not there yet, audit each seed, and write table.md, compare.json and the picture.

    What compare.json in the output folder reports already counts as done, also where the models are gone.

    Args:
        arms, seeds: only these; default: all.
        jobs: runs at a time, each a process of its own, on a GPU of its own where there are any.
        command: the arguments of ``memsinks compare`` that say which comparison it is, for those processes.
        audits: audit the seeds of which every arm that has a role is there.
        attacks: of the audits, see `AuditSettings`.

    Returns:
        What compare.json holds; None if there is nothing in it.

    Raises:
        ConfigError: an arm or seed that is not in the comparison; matplotlib is missing, which audits draw with.
        CheckpointError: a run failed, or its data have changed since another was made.
    """
    if audits:
        require_matplotlib()
    chosen, wanted = _chosen(comparison, arms, seeds)
    runs = reported(comparison)["runs"]
    data_sources(comparison)
    _train(comparison, _todo(comparison, with_bases(chosen, comparison.arms), wanted, runs), jobs, command)
    if not audits:
        return None
    results = {}
    for seed in wanted:
        done = [arm for arm in comparison.arms if comparison.finished(arm, seed) is not None]
        if set(comparison.roles.values()) <= {arm.name for arm in done}:
            results[seed] = audit_seed(comparison, done, seed, attacks)
        elif done:
            logger.info(
                "seed %d is not audited: the models of %s are not all there", seed, ", ".join(comparison.roles.values())
            )
    return write_results(comparison, results) if results or runs else None


def _chosen(comparison: Comparison, arms: Sequence[str], seeds: Sequence[int]) -> tuple[list[Arm], list[int]]:
    names = [arm.name for arm in comparison.arms]
    problems = unknown_keys(arms, "arms", names)
    problems += [f"seed {seed} is not among {list(comparison.seeds)}" for seed in seeds if seed not in comparison.seeds]
    refuse(problems, "nothing was run")
    return [x for x in comparison.arms if not arms or x.name in arms], [
        x for x in comparison.seeds if not seeds or x in seeds
    ]


def _todo(
    comparison: Comparison, arms: Sequence[Arm], seeds: Sequence[int], runs: Sequence[Mapping[str, Any]]
) -> list[tuple[Arm, int]]:
    """Runs that are neither finished nor reported; those of which only the report is left are said."""
    todo = []
    for seed in seeds:
        absent = [arm for arm in arms if comparison.finished(arm, seed) is None]
        todo += [(arm, seed) for arm in absent if reported_run(arm, seed, runs) is None]
        gone = [arm.name for arm in absent if reported_run(arm, seed, runs) is not None]
        if gone:
            logger.info(
                "seed %d: the models of %s are gone, what %s reports of them stays; remove it to train them again",
                seed,
                ", ".join(gone),
                Path(comparison.recipe.output) / REPORT,
            )
    return todo


def _train(comparison: Comparison, todo: Sequence[tuple[Arm, int]], jobs: int, command: Sequence[str] | None) -> None:
    for seed in dict.fromkeys(seed for _, seed in todo):
        prepare_data(comparison, seed)
    if jobs == 1 or command is None:
        for arm, seed in todo:
            train_arm(comparison, arm, seed)
        return
    for editing in (False, True):
        run_processes(comparison, [x for x in todo if (x[0].editing is not None) == editing], jobs, command)


def describe_plan(comparison: Comparison, arms: Sequence[str], seeds: Sequence[int], jobs: int) -> str:
    """What would run and for how long, from finished runs or, where there are none, three steps of each method."""
    chosen, wanted = _chosen(comparison, arms, seeds)
    runs = reported(comparison)["runs"]
    lines, total = [], 0.0
    for arm in chosen:
        facts = {seed: comparison.finished(arm, seed) or reported_run(arm, seed, runs) for seed in comparison.seeds}
        missing = [seed for seed in wanted if facts[seed] is None]
        done = [x["seconds"] for x in facts.values() if x is not None]
        if not missing:
            lines.append(f"{arm.name}: finished")
        elif not done and arm.editing is not None:
            lines.append(f"{arm.name}: seeds {missing}, edits the model of {arm.editing.after}; not timed beforehand")
        else:
            each = statistics.mean(done) if done else _expected_seconds(comparison, arm, wanted[0])
            total += each * len(missing)
            lines.append(f"{arm.name}: seeds {missing}, about {each:.0f} s each")
    return "\n".join([*lines, f"in all about {total / jobs / 60:.0f} minutes, {jobs} at a time, and the audits"])


def _expected_seconds(comparison: Comparison, arm: Arm, seed: int) -> float:
    facts = train_arm(comparison, arm, seed, steps=3)
    return facts["seconds_per_step"] * facts["steps"]


def time_steps(comparison: Comparison, turns: int = 15) -> dict[str, Any]:
    """How long a step of each arm takes beside ordinary training; compare.json keeps it, the table shows it.

    All arms are in memory at once and take turns, so that what else the machine does hits them alike: the figure is the
    median over the turns of the ratio to the arm with the role `against`.

    Returns:
        What compare.json holds then.

    Raises:
        ConfigError: nothing is reported yet.
    """
    if not reported(comparison)["runs"]:
        raise ConfigError(
            f"{comparison.recipe.output} holds no {REPORT} to add step times to; run the comparison first"
        )
    base = comparison.roles["against"]
    trained = [arm for arm in comparison.arms if arm.editing is None]
    seconds = step_seconds(comparison.recipe, trained, comparison.seeds[0], turns)
    ratios = {
        name: round(statistics.median(x / y for x, y in zip(own, seconds[base], strict=True)), 3)
        for name, own in seconds.items()
    }
    times = {
        "ratios": ratios,
        "seconds": round(min(seconds[base]), 4),
        "turns": turns,
        "threads": torch.get_num_threads(),
    }
    return write_results(comparison, {}, times)
