"""The models of the study by name; figures share them."""

from __future__ import annotations

from typing import Any

from memsinks.research.reproduce.corpus import Kind
from memsinks.research.reproduce.setting import Setting
from memsinks.research.reproduce.study import Run


def standard(setting: Setting, seed: int, *, corpus: Kind = "repetition", keep: bool = False, **changes: Any) -> Run:
    """Ordinary training on the stories with their copies."""
    name = "standard" if corpus == "repetition" else f"standard-{corpus}"
    return _run(setting, seed, name, "standard", {}, setting.intermediate_size, corpus=corpus, keep=keep, **changes)


def without_repeats(setting: Setting, seed: int) -> Run:
    """Ordinary training in which the rows of repeated stories have no loss: same steps, same schedule."""
    return _run(setting, seed, "no-repeats", "twin", {}, setting.intermediate_size)


def published(
    setting: Setting, seed: int, *, active_share: float | None = None, noise: float = 0.0, **changes: Any
) -> Run:
    """MemSinks as published: the MLP's last neurons are the sinks, open from the first exposure, Bernoulli, one mask."""
    share = setting.active_share if active_share is None else active_share
    total = changes.pop("neurons", setting.intermediate_size)
    general = round(total * setting.general_share)
    settings: dict[str, Any] = {"neurons": total - general, "active": max(1, round((total - general) * share))}
    name = "memsinks" if share == setting.active_share else f"memsinks-p{share:g}"
    if noise:
        settings["id_noise"], name = noise, f"{name}-d{noise:g}"
    return _run(setting, seed, name, "published", settings, general, **changes)


def ours(setting: Setting, seed: int, **changes: Any) -> Run:
    """Ours (gated, decay 1, nothing afterwards): general part and open sinks together as wide as the standard MLP."""
    block = 32 if setting.intermediate_size % 128 == 0 else setting.intermediate_size // 4
    settings = {
        "neurons": setting.intermediate_size,
        "active": setting.intermediate_size // 4,
        "block_size": block,
        "shared_decay": 1.0,
    }
    return _run(
        setting, seed, "ours", "gated", settings, setting.intermediate_size - setting.intermediate_size // 4, **changes
    )


def gradient_masking(setting: Setting, seed: int) -> Run:
    """The MLP's first `general_share` learns from the stories seen once, the rest from the repeated ones."""
    general = round(setting.intermediate_size * setting.general_share)
    return _run(
        setting,
        seed,
        "gradient-masking",
        "gradient-masking",
        {"extra_neurons": setting.intermediate_size - general},
        general,
    )


def _run(
    setting: Setting,
    seed: int,
    name: str,
    rival: str,
    settings: dict[str, Any],
    neurons: int,
    *,
    corpus: Kind = "repetition",
    keep: bool = False,
    size: tuple[int, int, int] | None = None,
) -> Run:
    if corpus != "repetition" and not name.endswith(corpus):
        name = f"{name}-{corpus}"
    if size is not None and size != setting.size:
        name, neurons = f"{name}-{size[0]}x{size[1]}", neurons if rival == "published" else 4 * size[0]
    return Run(name, rival, settings, neurons, seed, size or setting.size, corpus, keep)
