"""How large the study is: one value of `Setting` for every size, the paper's own among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from memsinks.errors import ConfigError
from memsinks.runs.sections import unknown_names, with_new_names

OLD_NAMES = {
    "width": "hidden_size",
    "neurons": "intermediate_size",
    "general": "general_share",
    "active": "active_share",
    "actives": "active_shares",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that a figure's runs have in common.

    Args:
        name: by which it is asked for.
        repeated, copies: so many stories are trained on so many times each.
        once: stories trained on once.
        held_out: stories for validation.
        canary: random tokens that stand at the end of each repeated story where canaries are asked for.
        length, batch: tokens a row, rows a step. A story is a row, cut to `length`, padded.
        vocabulary: of a byte-level BPE that is trained on the stories; unused with a `tokenizer`.
        tokenizer: folder, file or name instead.
        architecture: "llama" (learns faster at a small size) or "gpt2", with tied embeddings and no dropout.
        hidden_size, layers, heads, intermediate_size: of the model; `intermediate_size` is the width of each MLP.
        lr, min_lr_ratio, warmup, weight_decay: AdamW (0.9, 0.95), cosine to ``lr * min_lr_ratio``, clipped to norm 1.
        precision: "bf16" runs the model under autocast; weights stay float32.
        points: evaluations, spread evenly over the steps.
        general_share, active_share: g, the general share of the neurons, and p, the share of the sinks that a story opens.
        active_shares: values of p for Fig. 5a.
        sizes: (hidden_size, layers, heads) of the four models of Fig. 5b; MLPs are four times as wide.
        noises: values of d for Fig. 5c.
        swept_size: (hidden_size, layers, heads) of the models of Figs. 5a and 5c.
        every: a tracked story is met every so many steps in Fig. 7.
        fractions: of the neurons of each layer that post-hoc methods zero.
        unlearning: step counts after which gradient ascent and NPO are looked at.
        unlearning_lr: of gradient ascent and NPO.
        gate_steps, gate_lr, gate_penalty, gate_start: of hard concrete.
        zero_out_stories: stories whose loss is measured with each neuron zeroed.
        seeds: of Figs. 2 and 4. Figs. 3, 5 and 7 run the first.
    """

    name: str = "small"
    repeated: int = 48
    copies: int = 50
    once: int = 2720
    held_out: int = 96
    canary: int = 24
    length: int = 96
    batch: int = 16
    vocabulary: int = 1024
    tokenizer: str | None = None
    architecture: Literal["llama", "gpt2"] = "llama"
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 512
    lr: float = 2e-3
    min_lr_ratio: float = 0.1
    warmup: float = 0.05
    weight_decay: float = 0.1
    precision: Literal["fp32", "bf16"] = "fp32"
    points: int = 25
    general_share: float = 0.7
    active_share: float = 0.3
    active_shares: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7)
    sizes: tuple[tuple[int, int, int], ...] = ((32, 2, 2), (48, 2, 2), (64, 2, 2), (128, 4, 4))
    noises: tuple[float, ...] = (0.01, 0.05, 0.1, 0.5)
    swept_size: tuple[int, int, int] = (64, 2, 2)
    every: int = 20
    fractions: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
    unlearning: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    unlearning_lr: float = 2e-4
    gate_steps: int = 100
    gate_lr: float = 0.1
    gate_penalty: float = 8.0
    gate_start: float = 0.9
    zero_out_stories: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def steps(self) -> int:
        """Optimizer steps of a run; rows that do not fill the last one are left out."""
        return (self.repeated * self.copies + self.once) // self.batch

    @property
    def size(self) -> tuple[int, int, int]:
        return self.hidden_size, self.layers, self.heads

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """A setting as some version wrote it, under today's names."""
        return with_new_names(values, OLD_NAMES)

    def to_dict(self) -> dict[str, Any]:
        """As JSON reads it back: tuples are lists."""
        return {
            name: [list(x) if isinstance(x, tuple) else x for x in value] if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }


WHICH = ("active_shares", "sizes", "noises", "swept_size", "seeds")
"""Fields that say which runs there are, and change none of them."""

AFTERWARDS = (
    *WHICH,
    "fractions",
    "unlearning",
    "unlearning_lr",
    "gate_steps",
    "gate_lr",
    "gate_penalty",
    "gate_start",
    "zero_out_stories",
)
"""Fields that change no training run: the others say what is done to trained models."""

SETTINGS = {
    "small": Setting(),
    # As published (section 3.1, appendix B); batch, row length and steps are inferred from its figures, learning rate and weight
    # decay are the likeliest of its grid, the shapes of the smaller models are guessed from their sizes.
    "paper": Setting(
        name="paper",
        repeated=100,
        copies=128,
        once=20_000,
        held_out=1000,
        canary=64,
        length=512,
        batch=32,
        tokenizer="gpt2",
        architecture="gpt2",
        hidden_size=1024,
        layers=24,
        heads=16,
        intermediate_size=4096,
        lr=6e-4,
        precision="bf16",
        every=40,
        sizes=((384, 6, 6), (512, 8, 8), (768, 18, 12), (1024, 24, 16)),
        swept_size=(1024, 24, 16),
        unlearning_lr=1e-5,
        gate_steps=1000,
        zero_out_stories=1,
    ),
    # A few steps of a very small model, to try the commands.
    "tiny": Setting(
        name="tiny",
        repeated=4,
        copies=8,
        once=40,
        held_out=6,
        canary=8,
        length=32,
        batch=8,
        vocabulary=300,
        hidden_size=16,
        layers=2,
        heads=2,
        intermediate_size=32,
        lr=5e-3,
        points=3,
        active_shares=(0.1, 0.3),
        sizes=((16, 2, 2), (24, 2, 2)),
        noises=(0.1, 0.5),
        swept_size=(16, 2, 2),
        every=4,
        fractions=(0.1, 0.5),
        unlearning=(1, 2),
        gate_steps=3,
        zero_out_stories=2,
        seeds=(0, 1),
    ),
}
"""The study by size: for a CPU core, as published, to try the commands."""


def setting_of(size: str) -> Setting:
    """The setting of a size; ConfigError for an unknown one."""
    problems = unknown_names([size], "size ", SETTINGS)
    if problems:
        raise ConfigError(problems[0])
    return SETTINGS[size]
