"""The settings of the sinks, validated and versioned."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from memsinks.errors import ConfigError, refuse

FORMAT_VERSION = 1
"""Version of everything that is written to disk: settings, hash, assignment table, sink tensors."""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class SinkConfig:
    """How the sinks of a model are laid out, opened and trained.

    Args:
        neurons: sink neurons per layer (the pool). May exceed the width of the host MLP.
        active: sink neurons open per document and layer; an expectation under ``routing="bernoulli"``.
        block_size: neurons that open together. Default: 32 for ``routing="blocks"``, otherwise 1 (single neurons).
        routing: ``"blocks"`` opens ``active / block_size`` blocks of a document; ``"exact"`` opens exactly ``active``
            single neurons; ``"bernoulli"`` opens each neuron with probability ``active / neurons`` (the paper).
        per_layer: each layer has its own hash; otherwise one set of blocks serves all layers (the paper).
        reserved_blocks: the last so many blocks are never hashed to; only an assignment table opens them.
        open_from: the exposure from which a text's sinks are open. 1 = always (the paper), 2 = gated.
        shared: ``"decay"`` scales the gradient that a text sends into the shared weights by w(c), see `objective`;
            ``"none"`` (exact mode) lets a text train nothing but its sinks from ``open_from`` on.
        shared_decay: exponent a of w(c) = (c - open_from + 2)^-a; 0 = no decay. Ignored under ``shared="none"``.
        layers: indices of the layers that get sinks; None = all.
        seed: changes the hash and the start values.
        host_width: if given, `add_sinks` refuses a host MLP of another width.

    Raises:
        ConfigError: listing every problem at once.
    """

    neurons: int
    active: int
    block_size: int = None  # type: ignore[assignment]  # set in __post_init__
    routing: Literal["blocks", "exact", "bernoulli"] = "blocks"
    per_layer: bool = True
    reserved_blocks: int = 0
    open_from: int = 2
    shared: Literal["decay", "none"] = "decay"
    shared_decay: float = 0.25
    layers: tuple[int, ...] | None = None
    seed: int = 0
    host_width: int | None = None

    def __post_init__(self) -> None:
        if self.block_size is None:
            object.__setattr__(self, "block_size", 32 if self.routing == "blocks" else 1)
        if isinstance(self.layers, Iterable):
            object.__setattr__(self, "layers", tuple(self.layers))
        refuse(self._problems(), "invalid SinkConfig")

    def _problems(self) -> list[str]:
        problems = []
        for name, least in (("neurons", 1), ("active", 1), ("block_size", 1), ("reserved_blocks", 0), ("open_from", 1)):
            value = getattr(self, name)
            if not _is_int(value):
                problems.append(f"{name} must be an int, got {value!r}")
            elif value < least:
                problems.append(f"{name} must be at least {least}, got {value}")
        if not _is_int(self.seed) or not 0 <= self.seed < 2**63:
            problems.append(f"seed must be an int in [0, 2**63), got {self.seed!r}")
        if self.routing not in ("blocks", "exact", "bernoulli"):
            problems.append(f'routing must be "blocks", "exact" or "bernoulli", got {self.routing!r}')
        if self.shared not in ("decay", "none"):
            problems.append(f'shared must be "decay" or "none", got {self.shared!r}')
        if not isinstance(self.per_layer, bool):
            problems.append(f"per_layer must be True or False, got {self.per_layer!r}")
        if isinstance(self.shared_decay, bool) or not isinstance(self.shared_decay, int | float):
            problems.append(f"shared_decay must be a number, got {self.shared_decay!r}")
        elif not 0 <= self.shared_decay < float("inf"):
            problems.append(f"shared_decay must be 0 or a finite positive number, got {self.shared_decay}")
        if self.layers == ():
            problems.append("layers is empty; give None for all layers")
        elif self.layers is not None:
            if not isinstance(self.layers, tuple) or not all(_is_int(x) and x >= 0 for x in self.layers):
                problems.append(f"layers must be non-negative ints, got {self.layers!r}")
            elif len(set(self.layers)) != len(self.layers):
                problems.append(f"layers names a layer twice: {self.layers}")
        if self.host_width is not None and (not _is_int(self.host_width) or self.host_width < 1):
            problems.append(f"host_width must be a positive int or None, got {self.host_width!r}")
        if problems:
            return problems
        if self.active > self.neurons:
            problems.append(f"active ({self.active}) exceeds neurons ({self.neurons}); open at most the whole pool")
        if self.routing != "blocks" and self.block_size != 1:
            problems.append(
                f'routing="{self.routing}" opens single neurons, so block_size must be 1, got {self.block_size}'
            )
        for name in ("neurons", "active"):
            if getattr(self, name) % self.block_size:
                problems.append(
                    f"block_size ({self.block_size}) does not divide {name} ({getattr(self, name)}); "
                    f"choose a block_size that divides both neurons and active"
                )
        if self.routing == "bernoulli" and self.reserved_blocks:
            problems.append(
                f'routing="bernoulli" has no assigned blocks, so reserved_blocks must be 0, got {self.reserved_blocks}'
            )
        elif not problems and self.hashed_blocks < self.open_blocks:
            problems.append(
                f"{self.blocks} blocks less {self.reserved_blocks} reserved leave {self.hashed_blocks}, "
                f"but a document opens {self.open_blocks}; reserve fewer or enlarge neurons"
            )
        return problems

    @property
    def blocks(self) -> int:
        """Sink blocks per layer, reserved ones included."""
        return self.neurons // self.block_size

    @property
    def hashed_blocks(self) -> int:
        """Blocks per layer that the hash may choose: [0, hashed_blocks)."""
        return self.blocks - self.reserved_blocks

    @property
    def open_blocks(self) -> int:
        """Blocks open per document and layer (an expectation under Bernoulli)."""
        return self.active // self.block_size

    @property
    def needs_exposures(self) -> bool:
        """Whether training needs the exposure numbers."""
        return self.open_from > 1 or self.shared == "none" or self.shared_decay > 0

    def rescale_factors(self, host_width: int) -> dict[str, float]:
        """Factors for the general neurons when sinks are closed, by name (the paper's text, released code, true mean).

        With g the general share of all neurons and p the open share of the pool: ``none`` = 1,
        ``expected`` = (g + (1-g)p)/g, ``released`` = (g+p)/g.
        """
        g = host_width / (host_width + self.neurons)
        p = self.active / self.neurons
        return {"none": 1.0, "expected": (g + (1 - g) * p) / g, "released": (g + p) / g}

    @classmethod
    def published(cls, total: int = 4096, general: float = 0.7, active: float = 0.3, **changes: Any) -> SinkConfig:
        """The setting of the paper: ``total`` neurons per MLP of which the first ``general`` share is general.

        The host MLP must be ``host_width = total - neurons`` wide (2,867 for the default); `add_sinks` checks it.

        Raises:
            ConfigError: if a share is outside (0, 1), or as for the class.
        """
        refuse(
            [f"{name} must lie in (0, 1), got {value}" for name, value in (("general", general), ("active", active))
             if not 0 < value < 1],
            "invalid published setting",
        )  # fmt: skip
        host_width = round(total * general)
        neurons = total - host_width
        settings: dict[str, Any] = {
            "neurons": neurons, "active": max(1, round(neurons * active)), "routing": "bernoulli", "per_layer": False,
            "open_from": 1, "shared_decay": 0.0, "host_width": host_width,
        }  # fmt: skip
        return cls(**(settings | changes))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict with the format version."""
        values = dataclasses.asdict(self)
        values["layers"] = None if self.layers is None else list(self.layers)
        return {"format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SinkConfig:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: another format version, an unknown or missing key, or an invalid value.
        """
        values = dict(values)
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"sink settings have format_version {version!r}, this memsinks reads {FORMAT_VERSION}; "
                "load them with the version of memsinks that wrote them"
            )
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        problems = [f"unknown setting {name!r}" for name in unknown]
        problems += [f"setting {name!r} is missing" for name in ("neurons", "active") if name not in values]
        refuse(problems, "cannot read sink settings")
        return cls(**values)

    def to_json(self) -> str:
        """The settings as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> SinkConfig:
        """Read what `to_json` wrote; ConfigError as for `from_dict`, or if `text` is no JSON object."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"sink settings are not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"sink settings must be a JSON object, got {text[:80]!r}")
        return cls.from_dict(values)
