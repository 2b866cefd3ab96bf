"""What the classes of a model with sinks do that their stock classes do not.

The model, its layers, their MLPs and the output embedding get a subclass of their own class under the same name:

- the model's `forward` takes `document_ids` and `exposures`, makes the routing plan once and drops it at the end (`forward`);
- each layer's `__call__` reads the plan *outside* of activation checkpointing and hands it on as an argument, so that
  recomputation in the backward pass sees the plan of its own forward;
- the MLP adds what the sinks give; the output embedding scales the gradient at the logits.
"""

from __future__ import annotations

import functools
import inspect
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from memsinks.errors import ArchitectureError, CheckpointError, ConfigError
from memsinks.sinks.forward import check_prompts, forward
from memsinks.sinks.gradient import ScaleGradient, frozen
from memsinks.sinks.layer import Sinks
from memsinks.sinks.plan import Closed, LayerPlan
from memsinks.sinks.state import ModelWithSinks, SinkState, is_sink, shared_parameters
from memsinks.sinks.storage import save_with_sinks

MARKS = ("document_ids", "exposures", "places", "isolation")
"""What the forward of a model with sinks takes beyond the stock one."""
BYPASSED = (
    "a part of a model with sinks was run in training without the forward of the whole model, so its sinks would stay closed and "
    "learn nothing (the trainers of TRL, Liger kernels and calls of the inner model do this); in place of TRL's SFTTrainer take "
    "memsinks.SinkTrainer, which takes its SFTConfig and rows of memsinks.make_rows, call model(input_ids=..., document_ids=..., "
    "exposures=...), or model.eval() for evaluation"
)


class Derived:
    """A subclass made at run time; pickles and copies as its stock class plus the kind of the subclass."""

    stock_class: Any
    kind: Any

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = (
            self.__dict__ | {"_compiled_call_impl": None} if "_compiled_call_impl" in self.__dict__ else self.__dict__
        )
        return _restore, (self.stock_class, self.kind), dict(state)  # what is compiled calls this model, not the copy


@functools.cache
def derive(stock: type, kind: type) -> type:
    body: dict[str, Any] = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    body |= {"__doc__": stock.__doc__, "stock_class": stock, "kind": kind}
    if kind is SinkModel:
        body["forward"] = _model_forward(stock)
    return type(stock.__name__, (kind, stock), body)  # type: ignore[no-matching-overload]


def _restore(stock: type, kind: type) -> Any:
    return object.__new__(derive(stock, kind))


def _model_forward(stock: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.forward_with_sinks(*args, **kwargs)

    signature = inspect.signature(stock.forward)
    parameters = list(signature.parameters.values())
    last = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in MARKS]
    at = len(parameters) - int(last)
    forward.__signature__ = signature.replace(parameters=parameters[:at] + extra + parameters[at:])  # type: ignore
    forward.__doc__ = stock.forward.__doc__
    return forward


class _View:
    """A layer as its own forward sees it: everything is the layer's, except the MLP, which knows the plan."""

    def __init__(self, layer: nn.Module, name: str, mlp: Any) -> None:
        self.__dict__.update({"_layer": layer, name: mlp})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)


def _without_checkpointing(stock: Any) -> Any:
    while getattr(stock, "__code__", None) and stock.__code__.co_name == "forward_with_checkpointing":
        stock = stock.__wrapped__
    return stock


class SinkLayer(Derived):
    """A decoder layer that hands the plan of its forward to its MLP."""

    sink_state: SinkState
    sink_place: int
    sink_mlp: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = self.sink_state.running
        if running.plan is not None:
            plan = running.plan
            kwargs["sink_plan"] = (plan.layers[self.sink_place], plan.weight_scale, running.shared_frozen)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, sink_plan: tuple[LayerPlan, Tensor | None, bool] | None = None, **kwargs: Any) -> Any:
        stock = _without_checkpointing(self.stock_class.forward)
        if sink_plan is None:
            if self.training:  # type: ignore[attr-defined]
                raise ArchitectureError(BYPASSED)
            return stock(self, *args, **kwargs)
        layer_plan, scale, detached = sink_plan
        calls = []

        def mlp(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(None)
            return getattr(self, self.sink_mlp)(*args, sink_plan=(layer_plan, scale), **kwargs)

        view = _View(self, self.sink_mlp, mlp)  # type: ignore[arg-type]
        # Within the whole forward they are frozen already; not when this layer's is repeated in the backward pass.
        again = detached and not self.sink_state.running.shared_frozen
        with frozen(shared_parameters(self)) if again else nullcontext():  # type: ignore[arg-type]
            out = stock(view, *args, **kwargs)
        if not calls:
            raise ArchitectureError(
                f"{type(self).__name__} does not call its MLP from its own forward, so its sinks would never be used; "
                "this architecture is not supported"
            )
        return out


class SinkMlp(Derived):
    """An MLP, or a mixture of experts, whose sinks add to its output where the plan opens them."""

    sinks: Sinks

    def forward(self, x: Tensor, *args: Any, sink_plan: tuple[LayerPlan, Tensor | None] | None = None) -> Any:
        if sink_plan is None and self.training:  # type: ignore[attr-defined]
            raise ArchitectureError(BYPASSED)
        out = super().forward(x, *args)  # type: ignore[misc]
        if sink_plan is None:
            return out
        if isinstance(out, tuple):
            return self._added(out[0], x, *sink_plan), *out[1:]
        return self._added(out, x, *sink_plan)

    def _added(self, out: Tensor, x: Tensor, plan: LayerPlan, scale: Tensor | None) -> Tensor:
        if isinstance(plan, Closed):  # sinks that FSDP2 shards by themselves are gathered on all ranks or on none
            return self.sinks(out, plan, scale) if plan.zero_gradient else out
        return out + self.sinks(x, plan, scale).to(out.dtype).view_as(out)


class SinkHead(Derived):
    """The output embedding; scales the gradient that reaches the shared weights."""

    sink_state: SinkState

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logits = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        running = self.sink_state.running
        if running.weight is None:
            return logits
        if logits.shape[:2] != running.weight.shape:
            raise ConfigError(
                f"shared_decay needs the logits of every position in training; got {tuple(logits.shape[:2])} for "
                f"{tuple(running.weight.shape)} tokens (logits_to_keep?)"
            )
        running.weight_used = True
        return ScaleGradient.apply(logits, running.weight)


class SinkModel(Derived, ModelWithSinks):
    """A causal language model with sinks."""

    def forward_with_sinks(
        self,
        *args: Any,
        document_ids: Tensor | None = None,
        exposures: Tensor | None = None,
        places: Tensor | None = None,
        isolation: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        kwargs.update(zip(self.sink_state.arguments, args, strict=False))
        return forward(self, super().forward, kwargs, document_ids, exposures, places, isolation)  # type: ignore[misc]

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the stock class does it; with ids for several rows in `sinks_open` there are as many prompts, else DataError."""
        prompts = [x for x in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None]
        check_prompts(self.sink_state, len(prompts[0]) if prompts else 1)
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock class does it, with closed sinks."""
        if self.sink_state.opened.get() is not None:
            raise ArchitectureError(
                "continuous batching (generate_batch) runs in a thread of its own and mixes requests in a row, so sinks would "
                "stay closed; generate with model.generate in sinks_open"
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        names = [name for name, _ in self.named_parameters() if is_sink(name)]  # type: ignore[attr-defined]
        missing = [name for name in names if name not in state_dict]
        if missing and len(missing) < len(names):
            raise CheckpointError(f"the state dict has some sinks but lacks {missing[:3]} ({len(missing)} in all)")
        result = super().load_state_dict(state_dict, strict, assign)  # type: ignore[misc]
        self.sink_state.sinks_missing = bool(missing)
        if missing and not strict:  # the next training forward refuses, so this is no news to warn of
            result.missing_keys[:] = [name for name in result.missing_keys if not is_sink(name)]
        return result

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.sink_state.taken:  # here and not above, where wrappers of the model pass by
            _refuse_what_was_taken_out(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write a stock checkpoint and, in its subfolder ``sinks/``, the sinks; see `storage`."""
        save_with_sinks(self, super().save_pretrained, save_directory, *args, **kwargs)  # type: ignore[misc, arg-type]


def _refuse_what_was_taken_out(model: SinkModel, state_dict: Any, prefix: str) -> None:
    """CheckpointError for sinks that would fill empty blocks which are nobody's, after somebody was taken out of the model.

    A state dict does not say whose blocks are whose. Of blocks to which ids are hashed, of those that others have got since, and
    of parts of tensors (sharded models), nothing can be said.
    """
    state, free = model.sink_state, model.sink_state.free_blocks()
    for name, parameter in model.named_parameters():  # type: ignore[attr-defined]
        value = state_dict.get(prefix + name)
        if value is None or not is_sink(name) or not name.endswith(".down") or value.shape != parameter.shape:
            continue
        if any(type(x.data) is not Tensor or x.is_meta for x in (value, parameter)):
            continue
        if any(value[block].any() and not parameter[block].any() for block in free):
            records = ", ".join(sorted(set(state.taken.values()))[:3])
            raise CheckpointError(
                f"the state dict fills blocks of {prefix + name} that are nobody's in this model: it is of before somebody was "
                f"taken out ({records}) and would bring him back, or others have these blocks in it; load one of after the "
                "take-down, and assign the blocks before"
            )
