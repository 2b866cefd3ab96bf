"""What the parts of one model with sinks share, which of its parameters are sinks, and seeing through wrappers."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memsinks.errors import ArchitectureError, CheckpointError, DataError
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.gradient import weight_of
from memsinks.sinks.layer import Sinks
from memsinks.sinks.plan import ComputePath, RoutingPlan
from memsinks.sinks.quantized import is_packed, packed_tensors
from memsinks.sinks.sharding import whole
from memsinks.sinks.table import EMPTY_TABLE, AssignmentTable

WeightRule = Callable[[SinkConfig, Tensor, Tensor], Tensor | None]
"""See `gradient.weight_of`, the default."""


class Running(threading.local):
    """What holds while a forward runs: each thread has its own, so none sees another's sinks.

    plan: of the forward. weight: of each token's gradient in the shared weights, float64 [B, T]; weight_used: whether the
    output embedding has taken it. shared_frozen: the shared parameters are constants.
    """

    plan: RoutingPlan | None = None
    weight: Tensor | None = None
    weight_used: bool = False
    shared_frozen: bool = False


_OPENED: ContextVar[dict[Opened, Tensor | None]] = ContextVar("opened by sinks_open", default={})  # noqa: B039


class Opened(threading.local):
    """What `sinks_open` opens in a model, int64 [rows or 1, columns, union]: each thread and each task of asyncio has its own.

    last: what was opened last in this thread and is open still, which is all that a forward under torch.compile can look at.
    """

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self._still: list[list[Tensor | None]] = []

    def get(self) -> Tensor | None:
        """What is open here; None = nothing."""
        return _OPENED.get().get(self)

    @contextmanager
    def within(self, ids: Tensor | None) -> Iterator[None]:
        """Within the block these are open here, and nowhere else."""
        before, mine = self.get(), [ids]
        self._set(ids)
        self._still.append(mine)
        self.last = ids
        try:
            yield
        finally:
            self._set(before)
            self._still = [x for x in self._still if x is not mine]
            self.last = self._still[-1][0] if self._still else None

    def _set(self, ids: Tensor | None) -> None:
        others = {model: x for model, x in _OPENED.get().items() if model is not self}
        _OPENED.set(others if ids is None else {**others, self: ids})


@dataclass
class SinkState:
    """What the parts of one model share.

    Args:
        config: the settings.
        layers: indices of the layers that have sinks.
        intermediate_size: of the host MLPs.
        arguments: names of the arguments of the stock forward, in order.
        table: which ids open listed blocks; set it with `assign_blocks`.
        sinks_missing: a state dict without sinks was loaded, so the sinks do not belong to the other weights.
        weight_rule: what a token may teach the shared weights.
        path: the compute path; None = `kernels.choose_path` decides.
        taken: {id: name of the record} of owners that were taken out; their sinks can be opened no more.
        place: the training order that was met last and the place in it, of the batch before.
    """

    config: SinkConfig
    layers: tuple[int, ...]
    intermediate_size: int
    arguments: tuple[str, ...]
    table: AssignmentTable = EMPTY_TABLE
    sinks_missing: bool = False
    weight_rule: WeightRule = weight_of
    path: ComputePath | None = None
    taken: dict[int, str] = field(default_factory=dict)
    place: tuple[int, int] | None = None
    running: Running = field(default_factory=Running)
    opened: Opened = field(default_factory=Opened)

    def free_blocks(self) -> list[int]:
        """The blocks that are nobody's and never hashed to, in ascending order."""
        used = set(self.table.blocks.tolist())
        return [block for block in range(self.config.hashed_blocks, self.config.blocks) if block not in used]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("running", "opened")}

    def __setstate__(self, values: dict[str, Any]) -> None:
        vars(self).update(values, running=Running(), opened=Opened())


class ModelWithSinks:
    """Base of the classes of all models with sinks, see `host_classes`."""

    sink_state: SinkState


def unwrap(model: Any) -> Any:
    """The model inside torch.compile, DDP, PEFT and other wrappers that keep it as `module` or `_orig_mod`."""
    while not isinstance(model, ModelWithSinks):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None and callable(getattr(model, "get_base_model", None)):  # PeftModel
            inner = model.get_base_model()
        if not isinstance(inner, nn.Module) or inner is model:
            break
        model = inner
    return model


def has_sinks(model: nn.Module) -> bool:
    """Whether `add_sinks` was applied to the model, or to the one inside a wrapper."""
    return isinstance(unwrap(model), ModelWithSinks)


def require_sinks(model: nn.Module, *, missing_ok: bool = False) -> SinkState:
    """The model's sink state.

    Raises:
        ArchitectureError: it has no sinks.
        CheckpointError: its sinks are not those of its other weights, and `missing_ok` is False.
    """
    inner = unwrap(model)
    if not isinstance(inner, ModelWithSinks):
        raise ArchitectureError(f"{type(model).__name__} has no sinks; add them with memsinks.add_sinks(model, config)")
    if inner.sink_state.sinks_missing and not missing_ok:
        raise CheckpointError(
            "a state dict without sinks was loaded into this model, so its sinks are not those of the checkpoint; "
            "load them with memsinks.load_sinks(model, folder), or use memsinks.SinkTrainer when resuming"
        )
    return inner.sink_state


def assign_blocks(model: nn.Module, assignments: Mapping[int, Iterable[int]] | AssignmentTable) -> None:
    """Say which blocks some ids open in every layer, in place of the assignments there were; all other ids are hashed.

    Args:
        model: with sinks.
        assignments: {document id: blocks}, or a table; empty = every id is hashed.

    Raises:
        ConfigError: an id or a block that cannot be; Bernoulli routing, which has no blocks to assign.
    """
    state = require_sinks(model, missing_ok=True)
    if isinstance(assignments, AssignmentTable):
        assignments.check(state.config)
        state.table = assignments
    else:
        state.table = AssignmentTable.from_dict(
            {key: list(blocks) for key, blocks in assignments.items()}, state.config
        )


def refuse_taken(state: SinkState, ids: Tensor) -> None:
    """DataError if any of `ids` (int64, any shape) was taken out, by the name of the record."""
    if not state.taken:
        return
    for document_id in set(ids.unique().tolist()) & state.taken.keys():
        raise DataError(
            f"the sinks of document id {document_id} were taken out ({state.taken[document_id]}) and can be opened no more"
        )


def is_sink(name: str) -> bool:
    """Whether a parameter's name is that of a sink."""
    return ".sinks." in f".{name}"


def shared_parameters(module: nn.Module) -> list[nn.Parameter]:
    """All parameters that are not sinks."""
    return [parameter for name, parameter in module.named_parameters() if not is_sink(name)]


def shared_hash(model: nn.Module) -> str:
    """SHA-256, hexadecimal, of all weights that are not sinks: names, dtypes, shapes and bytes.

    The same with and without sinks beside them; those of PEFT's adapters are among them. Of quantized weights all that they are
    computed from counts, scales included. Of a sharded model every rank must call this; each tensor is gathered in turn.
    """
    found, inner = hashlib.sha256(), unwrap(model)
    plain = {name: x for name, x in inner.named_parameters() if not is_sink(name) and not is_packed(x)}
    tensors = {canonical_name(name): x for name, x in (plain | packed_tensors(inner)).items()}
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(whole(tensor.detach()).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def sink_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of all sinks in use."""
    return [parameter for sinks in sink_modules(module).values() for parameter in sinks.parameters()]


def named_sinks(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all sinks in use, by the names they have in a model without wrappers."""
    modules = sink_modules(module)
    return {f"{name}.{part}": value for name, sinks in modules.items() for part, value in sinks.named_parameters()}


def sink_modules(module: nn.Module) -> dict[str, Sinks]:
    """The sinks in use, one a layer, by the names they have in a model without wrappers.

    PEFT's ``modules_to_save=["sinks"]`` keeps the sinks of before beside a trained copy for each adapter: in use are those of
    the active one.
    """
    found = {}
    for name, part in module.named_modules():
        if not isinstance(part, Sinks) or name.endswith(".original_module"):
            continue
        if ".modules_to_save." in name:
            wrapper: Any = module.get_submodule(name.rsplit(".", 2)[0])
            active = wrapper.active_adapter
            if name.rsplit(".", 1)[1] not in ([active] if isinstance(active, str) else active):
                continue
        found[canonical_name(name)] = part
    return found


def canonical_name(name: str) -> str:
    """The name of a parameter or module without what torch.compile and PEFT's ``modules_to_save`` put into it."""
    return re.sub(r"\.modules_to_save\.[^.]+", "", name.replace("_orig_mod.", "")).removeprefix("base_model.model.")


def has_adapters(model: nn.Module) -> bool:
    """Whether the model carries adapters of PEFT."""
    return any(type(part).__module__.startswith("peft.") for part in model.modules())


def refuse_adapters(model: nn.Module) -> None:
    """ArchitectureError for a model that carries adapters of PEFT: its weights are no stock checkpoint."""
    if has_adapters(model):
        raise ArchitectureError(
            "the model carries PEFT adapters, so its weights are no stock checkpoint; save the PeftModel and, beside it, the "
            "sinks (memsinks.save_sinks(model, folder)), or merge_and_unload() first"
        )
