"""The settings of the sinks, validated, and readable in every version that they were ever written in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from memsinks.checks import at_least, int_at_least, is_int, one_of, positive
from memsinks.errors import ConfigError, refuse

FORMAT_VERSION = 2
"""Version of the settings as they are written. Version 1 had other names, see `OLD_NAMES` and `OLD_ROUTING`."""
OLD_NAMES = {"host_width": "intermediate_size"}
OLD_ROUTING = {"exact": "neurons"}

SHARED_DECAY = 0.25
"""Exponent of w(c) where decay is asked for and no other is given."""

START_SCALE = 3.0
"""`SinkConfig.start_scale` of exact mode, measured in experiments/regimes/last.py."""

Routing = Literal["blocks", "neurons", "bernoulli"]

LAYOUT = ("neurons", "active", "block_size", "routing", "per_layer", "reserved_blocks", "seed")
"""Settings on which depends which sinks a layer has and which of them an id opens: a checkpoint fits no others."""
TRAINING = ("open_from", "shared", "shared_decay")
"""Settings of training: a checkpoint may be loaded under others."""


@dataclass(frozen=True, kw_only=True)
class SinkConfig:
    """How the sinks of a model are laid out, opened and trained.

    Args:
        neurons: sink neurons per layer (the pool). May exceed the width of the host MLP.
        active: sink neurons open per document and layer; an expectation under ``routing="bernoulli"``.
        block_size: neurons that open together. None: 32 for ``routing="blocks"``, otherwise 1 (single neurons).
        routing: ``"blocks"`` opens ``active / block_size`` blocks of a document; ``"neurons"`` opens exactly ``active``
            single neurons; ``"bernoulli"`` opens each neuron with probability ``active / neurons`` (the paper).
        per_layer: each layer has its own hash; otherwise one set of blocks serves all layers (the paper).
        reserved_blocks: the last so many blocks are never hashed to; only an assignment table opens them. If that is all of them,
            an id without blocks of its own has none.
        open_from: the exposure from which a text's sinks are open. 1 = always (the paper), 2 = gated.
        shared: ``"none"`` (exact mode) lets a text train nothing but its sinks from ``open_from`` on, so that closed sinks are
            training without the copies; ``"decay"`` scales the gradient that it sends into the shared weights by w(c), see
            `gradient`. None = ``"decay"`` if `shared_decay` is given, otherwise ``"none"``.
        shared_decay: exponent a of w(c) = (c - open_from + 2)^-a; 0 = no decay; None = 0.25. Ignored under ``shared="none"``.
        layers: indices of the layers that get sinks; None = all.
        start_scale: spread of the start values of ``up`` and ``gate``, over that of the host's weights. None = 3 under
            ``shared="none"`` with ``open_from`` over 1 (sinks then recite after fewer updates), otherwise 1.
        seed: changes the hash and the start values.
        intermediate_size: if given, `add_sinks` refuses a host MLP of another width.

    Raises:
        ConfigError: listing every problem at once.
    """

    neurons: int
    active: int
    block_size: int = None  # type: ignore[assignment]  # set in __post_init__
    routing: Routing = "blocks"
    per_layer: bool = True
    reserved_blocks: int = 0
    open_from: int = 2
    shared: Literal["decay", "none"] = None  # type: ignore[assignment]  # set in __post_init__
    shared_decay: float = None  # type: ignore[assignment]  # set in __post_init__
    layers: tuple[int, ...] | None = None
    start_scale: float = None  # type: ignore[assignment]  # set in __post_init__
    seed: int = 0
    intermediate_size: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.routing, str):
            object.__setattr__(self, "routing", OLD_ROUTING.get(self.routing, self.routing))
        if self.shared is None:
            object.__setattr__(self, "shared", "none" if self.shared_decay is None else "decay")
        if self.shared_decay is None:
            object.__setattr__(self, "shared_decay", SHARED_DECAY)
        if self.start_scale is None:
            gated = self.shared == "none" and is_int(self.open_from) and self.open_from > 1
            object.__setattr__(self, "start_scale", START_SCALE if gated else 1.0)
        if self.block_size is None:
            object.__setattr__(self, "block_size", 32 if self.routing == "blocks" else 1)
        if isinstance(self.layers, Iterable):
            object.__setattr__(self, "layers", tuple(self.layers))
        refuse(self._each() or self._together(), "invalid SinkConfig")

    def _each(self) -> list[str]:
        """What is wrong with single settings."""
        problems = []
        for name, least in (("neurons", 1), ("active", 1), ("block_size", 1), ("reserved_blocks", 0), ("open_from", 1)):
            problems += int_at_least(name, getattr(self, name), least)
        if not is_int(self.seed) or not 0 <= self.seed < 2**63:
            problems.append(f"seed must be an int in [0, 2**63), got {self.seed!r}")
        problems += one_of("routing", self.routing, ("blocks", "neurons", "bernoulli"))
        problems += one_of("shared", self.shared, ("decay", "none"))
        if not isinstance(self.per_layer, bool):
            problems.append(f"per_layer must be True or False, got {self.per_layer!r}")
        problems += at_least("shared_decay", self.shared_decay, 0) + positive("start_scale", self.start_scale)
        if self.layers == ():
            problems.append("layers is empty; give None for all layers")
        elif self.layers is not None:
            if not isinstance(self.layers, tuple) or not all(is_int(x) and x >= 0 for x in self.layers):
                problems.append(f"layers must be non-negative ints, got {self.layers!r}")
            elif len(set(self.layers)) != len(self.layers):
                problems.append(f"layers names a layer twice: {self.layers}")
        if self.intermediate_size is not None:
            problems += int_at_least("intermediate_size", self.intermediate_size, 1)
        return problems

    def _together(self) -> list[str]:
        """What is wrong with settings that are right by themselves."""
        problems = []
        if self.active > self.neurons:
            problems.append(f"active ({self.active}) exceeds neurons ({self.neurons}); open at most the whole pool")
        if self.routing != "blocks" and self.block_size != 1:
            problems.append(
                f'routing="{self.routing}" opens single neurons, so block_size must be 1, got {self.block_size}'
            )
        problems += [
            f"block_size ({self.block_size}) does not divide {name} ({getattr(self, name)}); "
            "choose a block_size that divides both neurons and active"
            for name in ("neurons", "active")
            if getattr(self, name) % self.block_size
        ]
        if self.routing == "bernoulli" and self.reserved_blocks:
            problems.append(
                f'routing="bernoulli" has no assigned blocks, so reserved_blocks must be 0, got {self.reserved_blocks}'
            )
        elif not problems and self.hashed_blocks != 0 and self.hashed_blocks < self.open_blocks:
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
        return self.open_from > 1 or (self.shared == "decay" and self.shared_decay > 0)

    def rescale_factors(self, intermediate_size: int) -> dict[str, float]:
        """Factors for the general neurons when sinks are closed, by name (the paper's text, released code, true mean).

        With g the general share of all neurons and p the open share of the pool: ``none`` = 1,
        ``expected`` = (g + (1-g)p)/g, ``released`` = (g+p)/g.
        """
        g = intermediate_size / (intermediate_size + self.neurons)
        p = self.active / self.neurons
        return {"none": 1.0, "expected": (g + (1 - g) * p) / g, "released": (g + p) / g}

    @classmethod
    def published(
        cls, total: int = 4096, general_share: float = 0.7, active_share: float = 0.3, **changes: Any
    ) -> SinkConfig:
        """The setting of the paper: ``total`` neurons per MLP of which the first ``general_share`` is general.

        A document opens each of the others with probability `active_share`. The host MLP must be ``total - neurons`` wide
        (2,867 for the default); `add_sinks` checks it.

        Raises:
            ConfigError: if a share is outside (0, 1), or as for the class.
        """
        shares = (("general_share", general_share), ("active_share", active_share))
        problems = [f"{name} must lie in (0, 1), got {value}" for name, value in shares if not 0 < value < 1]
        refuse(problems, "invalid published setting")
        general = round(total * general_share)
        settings: dict[str, Any] = {
            "neurons": total - general,
            "active": max(1, round((total - general) * active_share)),
            "routing": "bernoulli",
            "per_layer": False,
            "open_from": 1,
            "shared_decay": 0.0,
            "intermediate_size": general,
        }
        return cls(**(settings | changes))

    @classmethod
    def for_finetuning(cls, model: Any, blocks: int, *, neurons: int = 32, **changes: Any) -> SinkConfig:
        """The setting for owners in a finished model whose other weights are frozen.

        Own blocks alone, in the upper half of the layers, open from the first exposure on. Exposures do not matter in it, so rows
        may be shuffled and met several times.

        Args:
            model: a Hugging Face decoder. blocks: of all owners together, in each layer. neurons: of a block.
            changes: other settings, for instance ``layers``.

        Raises:
            ConfigError: as for the class.
        """
        refuse(
            int_at_least("blocks", blocks, 1) + int_at_least("neurons", neurons, 1), "invalid setting for fine-tuning"
        )
        depth = model.config.get_text_config().num_hidden_layers
        settings: dict[str, Any] = {
            "neurons": blocks * neurons,
            "active": neurons,
            "block_size": neurons,
            "reserved_blocks": blocks,
            "open_from": 1,
            "shared": "none",
            "layers": tuple(range(depth // 2, depth)),
        }
        return cls(**(settings | changes))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict with the format version."""
        values = dataclasses.asdict(self)
        values["layers"] = None if self.layers is None else list(self.layers)
        return {"format_version": FORMAT_VERSION, **values}

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """Settings as some version wrote them, under today's names and without their version.

        Raises:
            ConfigError: they are of a version that is not known here.
        """
        values = dict(values)
        version = values.pop("format_version", FORMAT_VERSION)
        if not is_int(version) or not 1 <= version <= FORMAT_VERSION:
            raise ConfigError(
                f"sink settings have format_version {version!r}, this memsinks reads 1 to {FORMAT_VERSION}; "
                "load them with the version of memsinks that wrote them"
            )
        return {OLD_NAMES.get(name, name): value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SinkConfig:
        """Read what `to_dict` of this version or an older one wrote; what a version did not know yet has its default.

        Raises:
            ConfigError: an unknown format version, an unknown or missing key, or an invalid value.
        """
        values = cls.upgraded(values)
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
