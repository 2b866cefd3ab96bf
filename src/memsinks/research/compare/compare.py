"""Arms x seeds -> one table, one JSON, the pictures: a head-to-head of ways of training on one corpus.

All arms of a seed see the same documents in the same order, one a row, the same tokens, steps, learning rate, optimizer
and divisor; an arm is a method of `rivals` with its settings. A run is finished when its ``run.json`` is there, and is not
made again; one that was cut off continues from its last checkpoint, if `training.save_every` asks for any.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from memsinks.auditing.audit import audit
from memsinks.auditing.measure import AuditSettings
from memsinks.auditing.result import Audit
from memsinks.auditing.subjects import Subject
from memsinks.data.documents import Document
from memsinks.data.identity import identify
from memsinks.data.readers import read_documents
from memsinks.data.tokens import load_tokenizer, token_offsets
from memsinks.errors import CheckpointError, ConfigError, refuse
from memsinks.research.compare.arm import Arm, step_seconds, train, with_method
from memsinks.research.compare.comparison import Comparison
from memsinks.research.compare.edited import edit_arm, with_bases
from memsinks.research.compare.picture import draw
from memsinks.research.compare.table import rows, table
from memsinks.research.rivals.registry import method
from memsinks.runs.prepare import prepare, refuse_changed_files
from memsinks.runs.recipe import Recipe, parse_recipe
from memsinks.runs.sections import differing, unknown_keys

REPORT = "compare.json"


def train_arm(comparison: Comparison, arm: Arm, seed: int, steps: int | None = None) -> dict[str, Any]:
    """Train one arm with one seed, see `arm.train`; returns its facts. Files that changed since another seed are refused."""
    refuse_changed_files(comparison.recipe, sorted(Path(comparison.recipe.output).glob("seed-*/data")))
    if arm.method.after is not None:
        return edit_arm(comparison, arm, seed, steps)
    return train(comparison.recipe, arm, seed, comparison.folder(arm, seed), steps)


def prepare_data(comparison: Comparison, seed: int) -> Path:
    """Make the folder of tokens that all arms of a seed train on, if it is not there; see `prepared`."""
    recipe = with_method(comparison.recipe, method("standard", {}), seed, Path())
    folder = Path(comparison.recipe.output) / f"seed-{seed}" / "data"
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
) -> dict[str, Any] | None:
    """Train what is not there yet, audit each seed, and write table.md, compare.json and the picture.

    What compare.json in the output folder reports already counts as done, also where the models are gone.

    Args:
        arms, seeds: only these; default: all.
        jobs: runs at a time, each a process of its own, on a GPU of its own where there are any.
        command: the arguments of ``memsinks compare`` that say which comparison it is, for those processes.
        audits: audit the seeds of which every arm that has a role is there.

    Returns:
        What compare.json holds; None if there is nothing in it.

    Raises:
        ConfigError: an arm or seed that is not in the comparison.
        CheckpointError: a run failed.
    """
    chosen, wanted = _chosen(comparison, arms, seeds)
    runnable = with_bases(chosen, comparison.arms)
    reported = _reported(comparison)["runs"]
    todo = [(arm, seed) for seed in wanted for arm in runnable if _facts(comparison, arm, seed, reported) is None]
    if jobs == 1 or command is None:
        for arm, seed in todo:
            train_arm(comparison, arm, seed)
    else:
        for editing in (False, True):
            _run_processes(comparison, [x for x in todo if (x[0].method.after is not None) == editing], jobs, command)
    if not audits:
        return None
    results = {}
    for seed in comparison.seeds:
        done = [arm for arm in comparison.arms if comparison.finished(arm, seed) is not None]
        if set(comparison.roles.values()) <= {arm.name for arm in done}:
            results[seed] = audit_seed(comparison, done, seed)
        elif done:
            print(f"seed {seed} is not audited: the models of {', '.join(comparison.roles.values())} are not all there")
    return report(comparison, results) if results or reported else None


def _chosen(comparison: Comparison, arms: Sequence[str], seeds: Sequence[int]) -> tuple[list[Arm], list[int]]:
    names = [arm.name for arm in comparison.arms]
    problems = unknown_keys(arms, "arms", names)
    problems += [f"seed {seed} is not among {list(comparison.seeds)}" for seed in seeds if seed not in comparison.seeds]
    refuse(problems, "nothing was run")
    return [x for x in comparison.arms if not arms or x.name in arms], [
        x for x in comparison.seeds if not seeds or x in seeds
    ]


def _visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name in a process of ours; [] without a GPU."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        return []
    return given.split(",") if given else [str(place) for place in range(torch.cuda.device_count())]


def _run_processes(comparison: Comparison, todo: list[tuple[Arm, int]], jobs: int, command: Sequence[str]) -> None:
    gpus = _visible_gpus()
    if gpus and jobs > len(gpus):
        raise ConfigError(f"{jobs} jobs need as many GPUs, {len(gpus)} are visible ({', '.join(gpus)}); lower --jobs")
    free = list(gpus) or [""] * jobs
    running: dict[tuple[str, int], tuple[subprocess.Popen[bytes], str]] = {}
    failed: list[tuple[str, int]] = []
    started = time.time()

    def wait(until: int) -> None:
        while len(running) > until:
            for key in [key for key, (process, _) in running.items() if process.poll() is not None]:
                process, gpu = running.pop(key)
                free.append(gpu)
                if process.returncode:
                    failed.append(key)
            time.sleep(0.2)

    try:
        for seed in sorted({seed for _, seed in todo}):
            prepare_data(comparison, seed)
        for place, (arm, seed) in enumerate(todo):
            wait(jobs - 1)
            gpu = free.pop(0)
            log = comparison.folder(arm, seed).with_name(f"{arm.slug}.log")
            print(
                f"run {place + 1} of {len(todo)}, {time.time() - started:.0f} s: {arm.name}, seed {seed}: {log}",
                flush=True,
            )
            more = ["--train-only", "--arms", arm.name, "--seeds", str(seed)]
            with log.open("w") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "memsinks.cli", "compare", *command, *more], stdout=file,
                    env=os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}),
                )  # fmt: skip
            running[arm.name, seed] = process, gpu
        wait(0)
    finally:
        for process, _ in running.values():
            process.terminate()
    if failed:
        raise CheckpointError(
            f"failed: {failed}; run one alone to see why: --arms {failed[0][0]!r} --seeds {failed[0][1]}"
        )


def plan(comparison: Comparison, arms: Sequence[str], seeds: Sequence[int], jobs: int) -> str:
    """What would run and for how long, from finished runs or, where there are none, three steps of each method."""
    chosen, wanted = _chosen(comparison, arms, seeds)
    reported = _reported(comparison)["runs"]
    lines, total = [], 0.0
    for arm in chosen:
        done = [x for seed in comparison.seeds if (x := _facts(comparison, arm, seed, reported))]
        missing = [seed for seed in wanted if _facts(comparison, arm, seed, reported) is None]
        if not missing:
            lines.append(f"{arm.name}: finished")
            continue
        if done:
            each = statistics.mean(x["seconds"] for x in done)
        else:
            facts = train_arm(comparison, arm, wanted[0], steps=3)
            each = facts["seconds_per_step"] * facts["steps"]
        if not done and arm.method.after is not None:
            lines.append(f"{arm.name}: seeds {missing}, edits the model of {arm.method.after}; not timed beforehand")
            continue
        total += each * len(missing)
        lines.append(f"{arm.name}: seeds {missing}, about {each:.0f} s each")
    return "\n".join([*lines, f"in all about {total / jobs / 60:.0f} minutes, {jobs} at a time, and the audits"])


def audit_seed(comparison: Comparison, arms: Sequence[Arm], seed: int) -> Audit:
    """All arms of a seed in one audit, so that every comparison is paired over documents."""
    by_name = {arm.name: arm for arm in arms}
    subjects: dict[str, Subject] = {}
    for name, arm in by_name.items():
        folder = comparison.folder(arm, seed)
        sinks = arm.method.sinks is not None
        if arm.method.after is None:
            subjects[name] = Subject(folder / "model", "closed" if sinks else None, name)
        subjects |= {title: Subject(folder / x, None, title) for x, title in arm.models.items()}
    first = comparison.folder(by_name[comparison.roles["audited"]], seed)
    documents, controls, ids = audited_corpus(comparison.recipe, first)
    roles = {role: subjects.pop(name) for role, name in comparison.roles.items()}
    print(f"audit of seed {seed}: {len(roles) + len(subjects)} models", flush=True)
    return audit(
        roles["audited"], documents, controls, against=roles["against"], twin=roles.get("twin"),
        seen_once=roles.get("seen_once"), others=list(subjects.values()),
        settings=AuditSettings(generate=0, collateral=0, end=False, seed=seed), document_ids=ids,
        out=Path(comparison.recipe.output) / f"seed-{seed}" / "report",
    )  # fmt: skip


def audited_corpus(recipe: Recipe, folder: Path) -> tuple[list[Document], list[Document], np.ndarray]:
    """Documents and controls of a finished run, cut as they were trained on, and the ids of both, int64."""
    documents = list(read_documents(folder / "documents.jsonl", copies_field="copies"))
    controls = [Document(x.text) for x in read_documents(folder / "controls.jsonl")]
    ids = identify([*documents, *controls], recipe.data.identity)[0]
    if recipe.data.long == "truncate":
        tokenizer = load_tokenizer(folder / "model")
        documents, controls = (_trained_part(x, tokenizer, recipe.training.length) for x in (documents, controls))
    return documents, controls, ids


def _trained_part(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int) -> list[Document]:
    """Documents cut to the tokens that a row held."""
    cut = []
    for document in documents:
        offsets = token_offsets(tokenizer, document.text)
        text = document.text[: offsets[length - 1][1]] if len(offsets) > length else document.text
        cut.append(dataclasses.replace(document, text=text))
    return cut


def time_steps(comparison: Comparison, turns: int = 15) -> dict[str, Any]:
    """How long a step of each arm takes beside ordinary training; compare.json keeps it, the table shows it.

    All arms are in memory at once and take turns, so that what else the machine does hits them alike: the figure is the
    median over the turns of the ratio to the arm with the role `against`.

    Returns:
        What compare.json holds then.

    Raises:
        ConfigError: nothing is reported yet.
    """
    if not _reported(comparison)["runs"]:
        raise ConfigError(
            f"{comparison.recipe.output} holds no {REPORT} to add step times to; run the comparison first"
        )
    base = comparison.roles["against"]
    trained = [arm for arm in comparison.arms if arm.method.after is None]
    seconds = step_seconds(comparison.recipe, trained, comparison.seeds[0], turns)
    ratios = {
        name: round(statistics.median(x / y for x, y in zip(own, seconds[base], strict=True)), 3)
        for name, own in seconds.items()
    }  # fmt: skip
    times = {
        "ratios": ratios,
        "seconds": round(min(seconds[base]), 4),
        "turns": turns,
        "threads": torch.get_num_threads(),
    }
    return report(comparison, {}, times)


def report(
    comparison: Comparison, audits: Mapping[int, Audit], step_times: dict[str, Any] | None = None
) -> dict[str, Any]:  # fmt: skip
    """compare.json, table.md and the picture, in the output folder; what was reported there before is kept.

    Raises:
        CheckpointError: compare.json there is of another recipe.
    """
    output = Path(comparison.recipe.output)
    kept = _reported(comparison)
    by_run = {(run["arm"], run["seed"]): run for run in kept["runs"]}
    for seed in audits:
        by_run |= {(arm.name, seed): facts for arm in comparison.arms if (facts := comparison.finished(arm, seed))}
    names = [arm.name for arm in comparison.arms]
    runs = sorted(
        (run for run in by_run.values() if run["arm"] in names), key=lambda run: (run["seed"], names.index(run["arm"]))
    )
    result = {
        "recipe": comparison.recipe.to_dict(), "seeds": sorted({*kept["seeds"], *audits}), "roles": comparison.roles,
        "rows": rows(comparison.arms, audits, runs, kept["rows"]), "runs": runs,
        "compute_seconds": round(sum(x["seconds"] for x in runs)), "step_times": step_times or kept.get("step_times"),
        "audits": kept["audits"] | {str(seed): found.to_dict() for seed, found in audits.items()},
    }  # fmt: skip
    (output / REPORT).write_text(json.dumps(result, indent=1) + "\n")
    (output / "table.md").write_text(table(result) + "\n")
    draw(result, output / "pareto.png")
    print(table(result))
    return result


def _facts(comparison: Comparison, arm: Arm, seed: int, reported: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The facts of a run that is finished, or whose model is gone but compare.json `reported` it; otherwise None."""
    same = (
        run for run in reported
        if (run["arm"], run["seed"]) == (arm.name, seed) and (run["rival"], run["settings"]) == (arm.rival, arm.settings)
    )  # fmt: skip
    return comparison.finished(arm, seed) or next(same, None)


def _reported(comparison: Comparison) -> dict[str, Any]:
    """What compare.json says already, or an empty one."""
    path = Path(comparison.recipe.output) / REPORT
    if not path.is_file():
        return {"seeds": [], "runs": [], "rows": [], "audits": {}}
    result = json.loads(path.read_text())
    before = parse_recipe(result["recipe"]).to_dict() | {"output": None}
    now = comparison.recipe.to_dict() | {"output": None}
    if before != now:
        raise CheckpointError(
            f"{path} reports a comparison with another {', '.join(differing(before, now))}; choose another output"
        )
    return result
