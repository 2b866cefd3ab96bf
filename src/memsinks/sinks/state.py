"""What the parts of one model with sinks share, and which of its parameters are sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from memsinks.errors import ArchitectureError
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.plan import RoutingPlan
from memsinks.sinks.table import EMPTY_TABLE, AssignmentTable


@dataclass
class SinkState:
    """What the parts of one model share: its settings, and the plan while a forward runs."""

    config: SinkConfig
    layers: tuple[int, ...]
    host_width: int
    arguments: tuple[str, ...]
    table: AssignmentTable = EMPTY_TABLE
    plan: RoutingPlan | None = None
    frozen: bool = False
    logit_weight: Tensor | None = None
    logit_weight_used: bool = False
    opened: Any = None
    sinks_missing: bool = False


class ModelWithSinks:
    """Base of the classes of all models with sinks, see `host_classes`."""

    sink_state: SinkState


def shared_parameters(module: nn.Module) -> list[nn.Parameter]:
    """All parameters that are not sinks."""
    return [parameter for name, parameter in module.named_parameters() if not is_sink(name)]


def sink_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of all sinks."""
    return [parameter for name, parameter in module.named_parameters() if is_sink(name)]


def is_sink(name: str) -> bool:
    """Whether a parameter's name is that of a sink."""
    return ".sinks." in f".{name}"


def unwrap(model: Any) -> Any:
    """The model inside torch.compile, DDP and other wrappers that keep it as `module` or `_orig_mod`."""
    while not isinstance(model, ModelWithSinks):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def has_sinks(model: nn.Module) -> bool:
    """Whether `add_sinks` was applied to the model."""
    return isinstance(unwrap(model), ModelWithSinks)


def require_sinks(model: nn.Module) -> SinkState:
    """The model's sink state; ArchitectureError if it has none."""
    inner = unwrap(model)
    if not isinstance(inner, ModelWithSinks):
        raise ArchitectureError(f"{type(model).__name__} has no sinks; add them with memsinks.add_sinks(model, config)")
    return inner.sink_state
