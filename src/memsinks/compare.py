"""Arms x seeds -> one table, one JSON, the pictures: a head-to-head of ways of training on one corpus.

All arms of a seed see the same documents in the same order, one a row, the same tokens, steps, learning rate, optimizer
and divisor; an arm is a method of `rivals` with its settings. A run is finished when its ``run.json`` is there, and is not
made again; a run that was cut off starts anew.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ._version import __version__
from .attach import add_sinks, has_sinks, require_sinks
from .audit import Audit, AuditSettings, Subject, audit
from .checkpoint import written_beside
from .config import CheckpointError, ConfigError, refuse
from .documents import Document, read_documents, write_documents
from .export import export
from .hosts import shared_parameters, sink_parameters
from .identity import identify
from .objective import target_count
from .optim import clip_grad_norm_
from .packing import collate
from .recipe import Recipe, parse_recipe, read_sections, unknown_keys
from .rivals import Method, method
from .rivals.method import Batch
from .run import AUDITED, Prepared, build_model, differing, optimizer_and_schedule, prepare
from .tokens import load_tokenizer, token_offsets

ROLES = ("audited", "against", "twin", "seen_once")
RUN, SETTINGS, REPORT = "run.json", "settings.json", "compare.json"


@dataclass(frozen=True)
class Arm:
    """A method of `rivals` with settings, by the name it has in the table."""

    name: str
    rival: str
    settings: dict[str, Any]

    @property
    def method(self) -> Method:
        return method(self.rival, self.settings)

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return "-".join("".join(x if x.isalnum() or x == "." else " " for x in self.name).split())


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
        recipe = {name: value for name, value in self.recipe.to_dict().items() if name != "output"}
        return json.loads(json.dumps({"recipe": recipe, "rival": arm.rival, "settings": arm.settings}))

    def finished(self, arm: Arm, seed: int) -> dict[str, Any] | None:
        """The facts of a finished run; None if it is not finished.

        Raises:
            CheckpointError: the run was made with other settings.
        """
        folder = self.folder(arm, seed)
        if not (folder / RUN).is_file():
            return None
        before, now = json.loads((folder / SETTINGS).read_text()), self.settings(arm)
        if before != now:
            raise CheckpointError(
                f"{folder} is a run with another {', '.join(differing(before, now))}; choose another output, or delete it"
            )
        return json.loads((folder / RUN).read_text())


def read_comparison(path: Path) -> Comparison:
    """Read a YAML file: the sections of a recipe, `arms`, `seeds` and `roles`.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    values = read_sections(path)
    if not isinstance(values.get("arms"), dict):
        raise ConfigError(f"{path} needs a section arms: NAME: {{rival: ..., settings ...}}; is it a plain recipe?")
    given, seeds, roles = (values.pop(name, None) for name in ("arms", "seeds", "roles"))
    recipe = parse_recipe(values, str(path))
    problems = unknown_keys(roles or {}, "roles", ROLES)
    if not isinstance(seeds, list) or not seeds or not all(isinstance(x, int) and x >= 0 for x in seeds):
        problems.append(f"seeds must be a list of ints, got {seeds!r}")
    problems += [f"roles.{role} names no arm: {arm!r}" for role, arm in (roles or {}).items() if arm not in given]
    problems += [f"roles.{role} is missing" for role in ("audited", "against") if role not in (roles or {})]
    if recipe.sinks is not None:
        problems.append("sinks belong to an arm, not to the recipe")
    if recipe.data.repeat is None:
        problems.append("data.repeat is missing: without repeated documents there is nothing to forget")
    arms = []
    for name, settings in given.items():
        if not isinstance(settings, Mapping) or "rival" not in settings:
            problems.append(f"arms.{name} needs rival: the name of a method")
            continue
        arm = Arm(name, str(settings["rival"]), {x: y for x, y in settings.items() if x != "rival"})
        try:
            method(arm.rival, arm.settings)
        except ConfigError as error:
            problems.append(f"arms.{name}: {error}")
        arms.append(arm)
    if len({arm.slug for arm in arms}) < len(arms):
        problems.append("two arms have the same name but for signs; rename one")
    refuse(problems, f"cannot use {path}")
    return Comparison(recipe, tuple(arms), tuple(seeds), roles)  # type: ignore[arg-type]


def train_arm(comparison: Comparison, arm: Arm, seed: int, steps: int | None = None) -> dict[str, Any]:
    """Train one arm with one seed and write its folder, model last; returns its facts.

    Args:
        steps: stop after so many and write nothing, to see how long a step takes.
    """
    made = arm.method
    recipe = _with_method(comparison.recipe, made, seed, comparison.folder(arm, seed))
    training = recipe.training
    if training.threads:
        torch.set_num_threads(training.threads)
    prepared = prepare(recipe, one_document_per_row=True)
    random.seed(seed)
    model = _build(recipe, made, seed, prepared.tokenizer)
    total = len(prepared.rows) // training.batch_rows
    optimizer, scheduler = optimizer_and_schedule(model, training, total)
    asked = _asked_ids(prepared, recipe)
    in_training = sum(x.numel() for x in model.parameters())
    model.train()
    seconds, curve = [], []
    for step in range(total if steps is None else min(steps, total)):
        start = time.perf_counter()
        batch = _batch(prepared, step, training.batch_rows, asked)
        divisor = torch.tensor(target_count(batch["labels"]))
        loss = made.step(model, made.change(batch), divisor)
        if has_sinks(model):
            clip_grad_norm_(model, training.max_grad_norm)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step(), scheduler.step(), optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        if step % training.log_every == 0:
            curve.append(round(loss, 4))
            print(f"{arm.name}, seed {seed}: step {step}/{total}  loss {loss:.3f}  {sum(seconds):.0f} s", flush=True)
    facts = {
        "arm": arm.name, "rival": arm.rival, "settings": arm.settings, "seed": seed, "steps": total,
        "seconds": round(sum(seconds), 1), "seconds_per_step": round(statistics.median(seconds), 4), "curve": curve,
        "parameters": {"training": in_training, "open": in_training - _closed_parameters(model)},
        "threads": torch.get_num_threads(),
        "versions": {"memsinks": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "numpy")},
    }  # fmt: skip
    if steps is None:
        _save(comparison, arm, seed, model.eval(), made, prepared, facts)
    return facts


def _with_method(recipe: Recipe, made: Method, seed: int, output: Path) -> Recipe:
    """The recipe with the method's extra width and heads, its learning rate of the sinks, and the seed."""
    config = dict(recipe.model.config)
    if made.width:
        config["intermediate_size"] += made.width
    if made.heads:
        config["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        config["num_attention_heads"] += made.heads
        config["num_key_value_heads"] = config.get("num_key_value_heads", config["num_attention_heads"]) + made.heads
    return dataclasses.replace(
        recipe, output=str(output), model=dataclasses.replace(recipe.model, config=config),
        training=dataclasses.replace(recipe.training, seed=seed, sink_lr_factor=made.sink_lr_factor),
    )  # fmt: skip


def _build(recipe: Recipe, made: Method, seed: int, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    model = build_model(recipe, tokenizer)
    if made.sinks is not None:
        add_sinks(model, dataclasses.replace(made.sinks, seed=seed))
    return model


def _asked_ids(prepared: Prepared, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Ids of the audited documents and of those of them with 2 copies or more, int64."""
    audited = [x for x in prepared.members if x.kind == AUDITED]
    sides = {"audited": audited, "repeated": [x for x in audited if x.copies > 1]}
    return {name: torch.from_numpy(identify(side, recipe.data.identity)[0]) for name, side in sides.items()}


def _batch(prepared: Prepared, step: int, size: int, asked: Mapping[str, torch.Tensor]) -> Batch:
    batch = collate([prepared.rows[index] for index in range(step * size, (step + 1) * size)])
    return batch | {name: torch.isin(batch["document_ids"], ids) for name, ids in asked.items()}


def _closed_parameters(model: PreTrainedModel) -> int:
    """Sink parameters that no document of one token opens."""
    if not has_sinks(model):
        return 0
    config = require_sinks(model).config
    total = sum(x.numel() for x in sink_parameters(model))
    return total - round(total * config.active / config.neurons)


def _save(
    comparison: Comparison, arm: Arm, seed: int, model: PreTrainedModel, made: Method, prepared: Prepared, facts: dict[str, Any]
) -> None:  # fmt: skip
    folder = comparison.folder(arm, seed)
    with written_beside(folder) as part:
        if has_sinks(model):
            model.save_pretrained(part / "model")
            prepared.tokenizer.save_pretrained(part / "model")
            for rescale in made.rescales:
                export(model, part / rescale, tokenizer=prepared.tokenizer, rescale=rescale, verify=False)
            exported = sum(x.numel() for x in shared_parameters(model))
        else:
            made.remove(model)
            model.save_pretrained(part / "model")
            prepared.tokenizer.save_pretrained(part / "model")
            exported = sum(x.numel() for x in model.parameters())
        facts["parameters"]["exported"] = exported
        write_documents(part / "documents.jsonl", [x for x in prepared.members if x.kind == AUDITED])
        write_documents(part / "controls.jsonl", prepared.controls)
        (part / SETTINGS).write_text(json.dumps(comparison.settings(arm), indent=2) + "\n")
        (part / RUN).write_text(json.dumps(facts, indent=2) + "\n")


def compare(
    comparison: Comparison,
    *,
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    jobs: int = 1,
    origin: Path | None = None,
    audits: bool = True,
) -> dict[str, Any] | None:
    """Train what is not there yet, audit each seed, and write table.md, compare.json and the picture.

    What compare.json in the output folder reports already counts as done, also where the models are gone.

    Args:
        arms, seeds: only these; default: all.
        jobs: runs at a time, each a process of its own.
        origin: the file of the comparison, which those processes read; needed for more than one job.
        audits: audit the seeds of which every arm that has a role is there.

    Returns:
        What compare.json holds; None if there is nothing in it.

    Raises:
        ConfigError: an arm or seed that is not in the comparison.
        CheckpointError: a run failed.
    """
    chosen, wanted = _chosen(comparison, arms, seeds)
    todo = [(arm, seed) for seed in wanted for arm in chosen if _facts(comparison, arm, seed) is None]
    if jobs == 1 or origin is None:
        for arm, seed in todo:
            train_arm(comparison, arm, seed)
    else:
        _run_processes(todo, jobs, origin)
    if not audits:
        return None
    results = {}
    for seed in comparison.seeds:
        done = [arm for arm in comparison.arms if comparison.finished(arm, seed) is not None]
        if set(comparison.roles.values()) <= {arm.name for arm in done}:
            results[seed] = audit_seed(comparison, done, seed)
        elif done:
            print(f"seed {seed} is not audited: the models of {', '.join(comparison.roles.values())} are not all there")
    return report(comparison, results) if results or _reported(comparison)["runs"] else None


def _chosen(comparison: Comparison, arms: Sequence[str], seeds: Sequence[int]) -> tuple[list[Arm], list[int]]:
    names = [arm.name for arm in comparison.arms]
    problems = unknown_keys(arms, "arms", names)
    problems += [f"seed {seed} is not among {list(comparison.seeds)}" for seed in seeds if seed not in comparison.seeds]
    refuse(problems, "nothing was run")
    return [x for x in comparison.arms if not arms or x.name in arms], [
        x for x in comparison.seeds if not seeds or x in seeds
    ]


def _run_processes(todo: list[tuple[Arm, int]], jobs: int, origin: Path) -> None:
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    failed: list[tuple[str, int]] = []
    started = time.time()

    def wait(until: int) -> None:
        while len(running) > until:
            for key in [key for key, process in running.items() if process.poll() is not None]:
                if running.pop(key).returncode:
                    failed.append(key)
            time.sleep(0.2)

    try:
        for place, (arm, seed) in enumerate(todo):
            wait(jobs - 1)
            print(f"run {place + 1} of {len(todo)}, {time.time() - started:.0f} s: {arm.name}, seed {seed}", flush=True)
            command = [sys.executable, "-m", "memsinks.cli", "compare", str(origin), "--train-only", "--arms", arm.name]
            running[arm.name, seed] = subprocess.Popen([*command, "--seeds", str(seed)], stdout=subprocess.DEVNULL)
        wait(0)
    finally:
        for process in running.values():
            process.terminate()
    if failed:
        raise CheckpointError(
            f"failed: {failed}; run one alone to see why: --arms {failed[0][0]!r} --seeds {failed[0][1]}"
        )


def plan(comparison: Comparison, arms: Sequence[str], seeds: Sequence[int], jobs: int) -> str:
    """What would run and for how long, from finished runs or, where there are none, three steps of each method."""
    chosen, wanted = _chosen(comparison, arms, seeds)
    lines, total = [], 0.0
    for arm in chosen:
        done = [x for seed in comparison.seeds if (x := _facts(comparison, arm, seed))]
        missing = [seed for seed in wanted if _facts(comparison, arm, seed) is None]
        if not missing:
            lines.append(f"{arm.name}: finished")
            continue
        if done:
            each = statistics.mean(x["seconds"] for x in done)
        else:
            facts = train_arm(comparison, arm, wanted[0], steps=3)
            each = facts["seconds_per_step"] * facts["steps"]
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
        subjects[name] = Subject(folder / "model", "closed" if sinks else None, name)
        subjects |= {
            f"{name}, rescale {x}": Subject(folder / x, None, f"{name}, rescale {x}") for x in arm.method.rescales
        }
    first = comparison.folder(by_name[comparison.roles["audited"]], seed)
    documents = list(read_documents(first / "documents.jsonl", copies_field="copies"))
    controls = [Document(x.text) for x in read_documents(first / "controls.jsonl")]
    ids = identify([*documents, *controls], comparison.recipe.data.identity)[0]
    if comparison.recipe.data.long == "truncate":
        tokenizer = load_tokenizer(first / "model")
        documents, controls = (
            _trained_part(x, tokenizer, comparison.recipe.training.length) for x in (documents, controls)
        )
    roles = {role: subjects.pop(name) for role, name in comparison.roles.items()}
    print(f"audit of seed {seed}: {len(roles) + len(subjects)} models", flush=True)
    return audit(
        roles["audited"], documents, controls, against=roles["against"], twin=roles.get("twin"),
        seen_once=roles.get("seen_once"), others=list(subjects.values()), progress=True,
        settings=AuditSettings(generate=0, collateral=0, end=False, seed=seed), document_ids=ids,
        out=Path(comparison.recipe.output) / f"seed-{seed}" / "report",
    )  # fmt: skip


def _trained_part(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int) -> list[Document]:
    """Documents cut to the tokens that a row held."""
    cut = []
    for document in documents:
        offsets = token_offsets(tokenizer, document.text)
        text = document.text[: offsets[length - 1][1]] if len(offsets) > length else document.text
        cut.append(dataclasses.replace(document, text=text))
    return cut


def report(comparison: Comparison, audits: Mapping[int, Audit]) -> dict[str, Any]:
    """compare.json, table.md and the picture, in the output folder; seeds reported there before are kept.

    Raises:
        CheckpointError: compare.json there is of another recipe.
    """
    from .comparison_picture import draw
    from .comparison_table import rows, table

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
        "compute_seconds": round(sum(x["seconds"] for x in runs)), "step_times": kept.get("step_times"),
        "audits": kept["audits"] | {str(seed): found.to_dict() for seed, found in audits.items()},
    }  # fmt: skip
    (output / REPORT).write_text(json.dumps(result, indent=1) + "\n")
    (output / "table.md").write_text(table(result) + "\n")
    draw(result, output / "pareto.png")
    print(table(result))
    return result


def _facts(comparison: Comparison, arm: Arm, seed: int) -> dict[str, Any] | None:
    """The facts of a run that is finished, or whose model is gone but compare.json reports it; otherwise None."""
    reported = (
        run for run in _reported(comparison)["runs"]
        if (run["arm"], run["seed"]) == (arm.name, seed) and (run["rival"], run["settings"]) == (arm.rival, arm.settings)
    )  # fmt: skip
    return comparison.finished(arm, seed) or next(reported, None)


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
