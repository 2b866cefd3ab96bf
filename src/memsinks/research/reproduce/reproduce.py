"""The paper's controlled study, rerun: `memsinks reproduce FIGURE`.

setting    how large: "small" for a CPU core, "paper" as published for a GPU, "tiny" to try the commands
corpus     stories seen once and often, canaries, stories met at a fixed distance
study      one run: a model trained with evaluations on the way, resumable
arms       the models by name; figures share them
fig2 ...   a figure each: its runs, its numbers, its picture
theory     the three theorems as small experiments
pictures   how pictures look

Source: Ghosal, Maini, Raghunathan, ICML 2025, arXiv 2507.09937. What we find: docs/paper.md.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from memsinks.auditing.pictures import require_matplotlib
from memsinks.errors import ConfigError, DataError
from memsinks.research.reproduce import arms, fig2, fig3, fig4, fig5, fig7, theory
from memsinks.research.reproduce.setting import WHICH, Setting, setting_of
from memsinks.research.reproduce.study import NothingToDraw, Run, Study, device
from memsinks.runs.sections import unknown_names

logger = logging.getLogger(__name__)

FIGURES: dict[str, ModuleType] = {
    "fig2": fig2,
    "fig3": fig3,
    "fig4": fig4,
    "fig5": fig5,
    "fig7": fig7,
    "theory": theory,
}


def chosen_figures(names: Sequence[str]) -> list[str]:
    """The names of the figures, "all" written out; ConfigError for an unknown one or none."""
    problems = unknown_names([name for name in names if name != "all"], "figure ", FIGURES)
    if problems or not names:
        text = problems[0] if problems else "no figure was named"
        raise ConfigError(f"{text}; figures are {', '.join(FIGURES)}, all")
    return list(FIGURES) if "all" in names else list(dict.fromkeys(names))


def needed_runs(names: Sequence[str], setting: Setting) -> list[Run]:
    """The training runs behind some figures, each once."""
    runs = [run for name in names for run in FIGURES[name].runs(setting)]
    if "fig4" in names:
        runs += fig2.runs_of(setting, "stories")
    wanted: dict[str, Run] = {}
    for run in runs:
        if run.file not in wanted or run.keep:
            wanted[run.file] = run
    return list(wanted.values())


def reproduce(names: Sequence[str], study: Study) -> dict[str, Any]:
    """Make figures: train what is not there yet, write NAME.json and NAME.png into the folder of the study.

    Returns:
        By figure what its JSON holds.

    Raises:
        ConfigError: an unknown figure, or a folder with runs of another setting or other data.
        DataError: too few stories.
    """
    require_matplotlib()
    results = {}
    for name in chosen_figures(names):
        module = FIGURES[name]
        todo = study.missing(module.runs(study.setting))
        if todo:
            text = "runs to go" if study.training else "runs are missing and left out"
            logger.info("%s: %d %s: %s", name, len(todo), text, ", ".join(run.file for run in todo))
        try:
            results[name] = module.make(study)
        except NothingToDraw as error:
            raise ConfigError(f"{name}: {error}; leave --finished out to train them") from error
        study.write(name, results[name], study.out)
        module.draw(results[name], study.out / f"{name}.png")
        logger.info("%s: drawn, %s.png", name, study.out / name)
    return results


def describe_study(names: Sequence[str], study: Study) -> str:
    """What would run, and a rough guess of how long it takes on this device."""
    names = chosen_figures(names)
    runs = needed_runs(names, study.setting)
    todo = study.missing(runs)
    speed = _speed()
    lines = [f"{name}: {len(FIGURES[name].runs(study.setting)) or 'no'} training runs" for name in names]
    seconds = sum(_work(run, study.setting) for run in todo) / speed
    lines += [f"to do: {run.file}, about {_work(run, study.setting) / speed / 60:.1f} minutes" for run in todo]
    texts = fig2.TEXTS if "fig2" in names else ("stories",) if "fig4" in names else ()
    sweeps = [
        fig2.file_of(run, name) for text in texts for run in fig2.runs_of(study.setting, text) for name in fig2.METHODS
    ]
    left = [name for name in sweeps if study.found(name, WHICH) is None]
    if left:
        lines.append(
            f"post-hoc sweeps to do: {len(left)}, together about as long as {-(-len(left) // 5)} training runs"
        )
        seconds += len(left) / 5 * _work(arms.standard(study.setting, 0), study.setting) / speed
    finished = len(runs) - len(todo)
    return "\n".join(
        [*lines, f"{finished} of {len(runs)} runs are there; the rest takes about {seconds / 60:.0f} minutes"]
    )


def _work(run: Run, setting: Setting) -> float:
    """Floating-point operations of a run, evaluations left out: 6 x weights x tokens, twice under gradient masking."""
    hidden_size, layers, _ = run.size
    matrices = 3 if setting.architecture == "llama" else 2
    neurons = run.neurons + run.settings.get("neurons", run.settings.get("extra_neurons", 0))
    weights = hidden_size * (setting.vocabulary if setting.tokenizer is None else 50_257)
    weights += layers * (4 * hidden_size**2 + matrices * hidden_size * neurons)
    tokens = setting.steps * setting.batch * setting.length
    return 6.0 * weights * tokens * (2 if run.rival == "gradient-masking" else 1)


def _speed() -> float:
    """Operations per second of this device in training: a fifth of what a large matrix product reaches."""
    x = torch.randn(1024, 1024, device=device(), dtype=torch.bfloat16 if device() == "cuda" else torch.float32)
    float((x @ x)[0, 0])
    started = time.perf_counter()
    for _ in range(4):
        x = x @ x / 1024
    float(x[0, 0])
    return 0.2 * 4 * 2 * 1024**3 / (time.perf_counter() - started)


def open_study(out: Path, size: str = "small", data: Path | None = None, **arguments: Any) -> Study:
    """A study in a folder.

    Raises:
        ConfigError: an unknown size.
        DataError: `data` does not exist.
    """
    if data is not None and not data.exists():
        raise DataError(f"{data} does not exist; give a file of stories, or leave --data out for the built-in ones")
    return Study(setting_of(size), out, data, **arguments)
