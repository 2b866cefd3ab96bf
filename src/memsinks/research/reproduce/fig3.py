"""Fig. 3: gradient masking. Validation over training with the memorization neurons kept and dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memsinks.research.reproduce import arms
from memsinks.research.reproduce.pictures import COLORS, canvas, label_ends, save
from memsinks.research.reproduce.setting import Setting
from memsinks.research.reproduce.study import Run, Study


def runs(setting: Setting) -> list[Run]:
    seed = setting.seeds[0]
    return [arms.standard(setting, seed, keep=True), arms.gradient_masking(setting, seed)]


def make(study: Study) -> dict[str, Any]:
    """steps, and the curves: standard, kept, dropped."""
    standard, masking = (study.run(run) for run in runs(study.setting))
    curves = masking["curves"]
    return {
        "steps": curves["steps"],
        "standard": standard["curves"]["validation"],
        "kept": curves["validation"],
        "dropped": curves["validation_dropped"],
        "repeated dropped": curves["repeated_dropped"],
    }


def draw(result: dict[str, Any], path: Path) -> None:
    figure, axes = canvas(1, 1, 6.6, 3.8)
    panel = axes[0, 0]
    lines = {
        "standard": ("standard", COLORS["standard"], "-"),
        "kept": ("all neurons kept", "#332288", "-"),
        "dropped": ("memorization\nneurons dropped", "#332288", "--"),
    }
    for name, (_, color, dash) in lines.items():
        panel.plot(result["steps"], result[name], color=color, ls=dash, lw=1.8)
    panel.set(xlabel="step", ylabel="validation loss (nats)", title="Gradient masking", xlim=(0, result["steps"][-1]))
    label_ends(panel, [(result[name][-1], text, color) for name, (text, color, _) in lines.items()], apart=0.1)
    save(figure, path)
