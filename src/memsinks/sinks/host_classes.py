"""What the classes of a model with sinks do that their stock classes do not.

The model, its layers, their MLPs and the output embedding get a subclass of their own class under the same name:

- the model's `forward` takes `document_ids` and `exposures`, makes the routing plan once and drops it at the end;
- each layer's `__call__` reads the plan *outside* of activation checkpointing and hands it on as an argument, so that
  recomputation in the backward pass sees the plan of its own forward;
- the MLP adds what the sinks give; the output embedding scales the gradient at the logits.
"""

from __future__ import annotations

import functools
import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from memsinks.batch import IGNORED, NO_SINKS, check_ids, take_rows
from memsinks.errors import ArchitectureError, CheckpointError, ConfigError, DataError
from memsinks.sinks.families import ISOLATES_PACKED
from memsinks.sinks.gradient import ScaleGradient, ZeroGradient, frozen, shared_weight
from memsinks.sinks.kernels import choose_path
from memsinks.sinks.layer import Sinks
from memsinks.sinks.plan import LayerPlan, plan
from memsinks.sinks.state import ModelWithSinks, SinkState, is_sink, shared_parameters
from memsinks.sinks.storage import save_with_sinks


class Derived:
    """A subclass made at run time; pickles and copies as its stock class plus the kind of the subclass."""

    stock_class: Any
    kind: Any

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _restore, (self.stock_class, self.kind), self.__dict__.copy()


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
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ("document_ids", "exposures")
    ]
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


def _without_checkpointing(forward: Any) -> Any:
    while getattr(forward, "__code__", None) and forward.__code__.co_name == "forward_with_checkpointing":
        forward = forward.__wrapped__
    return forward


class SinkLayer(Derived):
    """A decoder layer that hands the plan of its forward to its MLP."""

    sink_state: SinkState
    sink_place: int
    sink_mlp: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = self.sink_state
        if state.plan is not None:
            kwargs["sink_plan"] = (state.plan.layers[self.sink_place], state.plan.weight_scale, state.frozen)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, sink_plan: tuple[LayerPlan, Tensor | None, bool] | None = None, **kwargs: Any) -> Any:
        forward = _without_checkpointing(self.stock_class.forward)
        if sink_plan is None:
            return forward(self, *args, **kwargs)
        layer_plan, scale, detached = sink_plan
        calls = []

        def mlp(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(None)
            return getattr(self, self.sink_mlp)(*args, sink_plan=(layer_plan, scale), **kwargs)

        view = _View(self, self.sink_mlp, mlp)  # type: ignore[arg-type]
        with frozen(shared_parameters(self)) if detached else nullcontext():  # type: ignore[arg-type]
            out = forward(view, *args, **kwargs)
        if not calls:
            raise ArchitectureError(
                f"{type(self).__name__} does not call its MLP from its own forward, so its sinks would never be used; "
                "this architecture is not supported"
            )
        return out


class SinkMlp(Derived):
    """An MLP whose sinks add to its output where the plan opens them."""

    sinks: Sinks

    def forward(self, x: Tensor, *args: Any, sink_plan: tuple[LayerPlan, Tensor | None] | None = None) -> Tensor:
        out = super().forward(x, *args)  # type: ignore[misc]
        if sink_plan is None:
            return out
        return out + self.sinks(x, *sink_plan).to(out.dtype)


class SinkHead(Derived):
    """The output embedding; scales the gradient that reaches the shared weights."""

    sink_state: SinkState

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logits = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        state = self.sink_state
        if state.logit_weight is None:
            return logits
        if logits.shape[:2] != state.logit_weight.shape:
            raise ConfigError(
                f"shared_decay needs the logits of every position in training; got {tuple(logits.shape[:2])} for "
                f"{tuple(state.logit_weight.shape)} tokens (logits_to_keep?)"
            )
        state.logit_weight_used = True
        return ScaleGradient.apply(logits, state.logit_weight)


class SinkModel(Derived, ModelWithSinks):
    """A causal language model with sinks."""

    def forward_with_sinks(
        self, *args: Any, document_ids: Tensor | None = None, exposures: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if getattr(self, "_is_replica", False):
            raise ArchitectureError("DataParallel is not supported: its replicas share one routing plan; use DDP")
        state = self.sink_state
        kwargs.update(zip(state.arguments, args, strict=False))
        tokens = kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise DataError("give the model input_ids or inputs_embeds")
        rows, length = tokens.shape[:2]
        stock = super().forward  # type: ignore[misc]
        if self.training:  # type: ignore[attr-defined]
            return self._train_forward(stock, (rows, length), document_ids, exposures, kwargs)
        # A cache switches off the isolation of packed documents.
        packed = kwargs.get("labels") is not None or kwargs.get("position_ids") is not None
        if packed and "use_cache" in state.arguments and kwargs.get("use_cache") is None:
            kwargs["use_cache"] = False
        if state.opened is None:
            return stock(**kwargs)
        ids = _opened_ids(state.opened, rows, length, tokens.device, kwargs.get("past_key_values"))
        return self._run(stock, kwargs, ids, None)

    def _train_forward(
        self, stock: Any, shape: tuple[int, int], document_ids: Tensor | None, exposures: Tensor | None, kwargs: Any
    ) -> Any:
        state, config = self.sink_state, self.sink_state.config
        if state.sinks_missing:
            raise CheckpointError(
                "a state dict without sinks was loaded into this model, so its sinks are not those of the checkpoint; "
                "load them with memsinks.load_sinks(model, folder), or use memsinks.SinkCallback when resuming a Trainer"
            )
        ids = _aligned(document_ids, "document_ids", shape, NO_SINKS)
        if config.needs_exposures:
            counts = _aligned(exposures, "exposures", shape, 1)
        else:
            counts = torch.ones_like(ids)
        self._check_isolation(document_ids, exposures, kwargs)
        if "use_cache" in state.arguments:
            kwargs["use_cache"] = False
        opened = torch.where(counts < config.open_from, NO_SINKS, ids)
        if config.shared == "none":
            return self._exact_forward(stock, opened, kwargs)
        if not config.shared_decay:
            return self._run(stock, kwargs, opened, None)
        weight = shared_weight(counts, config.open_from, config.shared_decay)
        weight = torch.where(opened == NO_SINKS, 1.0, weight)
        out = self._run(stock, kwargs, opened, weight)
        if not state.logit_weight_used:
            raise ConfigError(
                "shared_decay scales the gradient at the logits, but this forward computed none (a fused loss?); "
                "turn the fused loss off, or use SinkConfig(shared_decay=0)"
            )
        if getattr(out, "aux_loss", None) is not None:
            raise ConfigError(
                "shared_decay cannot be combined with a loss that couples the batch (aux_loss); turn it off"
            )
        return out

    def _run(self, stock: Any, kwargs: dict[str, Any], ids: Tensor, weight: Tensor | None) -> Any:
        state, config = self.sink_state, self.sink_state.config
        scale = None if weight is None else 1.0 / weight.reshape(-1)
        path = choose_path(config, self.dtype, ids.device)  # type: ignore[attr-defined]
        flat = ids.reshape(-1) if ids.dim() == 2 else ids.reshape(-1, ids.shape[-1])
        state.plan = plan(flat, state.layers, config, state.table, path=path, weight_scale=scale)
        state.logit_weight, state.logit_weight_used = weight, False
        try:
            return stock(**kwargs)
        finally:
            state.plan, state.logit_weight = None, None

    def _exact_forward(self, stock: Any, ids: Tensor, kwargs: dict[str, Any]) -> Any:
        """Rows that open sinks run apart, with the shared parameters as constants; the loss is the stock one."""
        if torch.compiler.is_compiling():
            raise ConfigError('shared="none" (exact mode) cannot be compiled: it splits each batch by its data')
        own = (ids != NO_SINKS).any(1)
        mixed = own & (ids == NO_SINKS).any(1)
        if bool(mixed.any()) and kwargs.get("labels") is not None:
            mixed = mixed & ((ids == NO_SINKS) & (kwargs["labels"] != IGNORED)).any(1)
        if bool(mixed.any()):
            raise DataError(
                f'shared="none" needs rows that open sinks apart from the others; row {int(mixed.nonzero()[0])} mixes '
                "both: pack with apart_from=config.open_from"
            )
        if not bool(own.any()):
            return self._run(stock, kwargs, ids, None)
        more = [name for name in ("output_hidden_states", "output_attentions") if kwargs.get(name)]
        if more or kwargs.get("return_dict") is False:
            raise ConfigError(
                f'shared="none" gives logits and loss as a dict only; leave out {more or "return_dict=False"}'
            )
        labels = kwargs.pop("labels", None)
        loss_arguments = {name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        kwargs["return_dict"] = True
        parts, order = [], []
        for part in (~own, own):
            index = part.nonzero()[:, 0]
            if not len(index):
                continue
            chosen = take_rows(kwargs, index, len(own))
            self.sink_state.frozen = part is own
            try:
                with frozen(shared_parameters(self) if part is own else ()):  # type: ignore[arg-type]
                    out = self._run(stock, chosen, ids[index], None)
            finally:
                self.sink_state.frozen = False
            parts.append(out.logits)
            order.append(index)
        logits = torch.cat(parts)[torch.cat(order).argsort()]
        if len(parts) == 1:
            logits = ZeroGradient.apply(logits, *(x for x in shared_parameters(self) if x.requires_grad))  # type: ignore
        out.logits = logits
        if labels is not None:
            vocabulary = self.config.get_text_config().vocab_size  # type: ignore[attr-defined]
            out.loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **loss_arguments)  # type: ignore
        return out

    def _check_isolation(self, document_ids: Tensor | None, exposures: Tensor | None, kwargs: dict[str, Any]) -> None:
        """Refuse rows in which ids or exposures change, so that they hold several documents, without isolation.

        A compiled forward cannot look into the rows: there all ids [B, T] count as several documents a row.
        """
        marks = [mark for mark in (document_ids, exposures) if mark is not None and mark.dim() == 2]
        if not marks:
            return
        if not torch.compiler.is_compiling():
            borders = [mark[:, 1:] != mark[:, :-1] for mark in marks]
            # What follows a row's last target (or, without labels, its last id) is padding, not a document.
            labels = kwargs.get("labels")
            ids = marks[0]
            text = ids != NO_SINKS if labels is None else labels != IGNORED
            before_the_end = text[:, 1:].flip(1).cumsum(1).flip(1).bool()
            if not any(bool((border & before_the_end).any()) for border in borders):
                return
        kind = self.config.model_type  # type: ignore[attr-defined]
        if kind not in ISOLATES_PACKED:
            raise ArchitectureError(
                f"packed rows (several documents in one) leak between documents in {kind}, or were not shown not to; "
                "pack with one_document_per_row=True"
            )
        if kwargs.get("position_ids") is None:
            raise DataError(
                "rows hold several documents but position_ids is missing, so documents would attend to each other; "
                "pass the position_ids of memsinks.pack (they restart with each document)"
            )
        if kwargs.get("attention_mask") is not None:
            raise DataError(
                "rows hold several documents and attention_mask is set, which switches off their isolation in attention; "
                "leave attention_mask out (padding is a segment of its own)"
            )

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

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write a stock checkpoint and, in its subfolder ``sinks/``, the sinks; see `storage`."""
        save_with_sinks(self, super().save_pretrained, save_directory, *args, **kwargs)  # type: ignore[misc, arg-type]


def _aligned(ids: Tensor | None, name: str, shape: tuple[int, int], least: int) -> Tensor:
    """`ids` [B] or [B, T] as [B, T]."""
    if ids is None:
        raise DataError(
            f"a model with sinks is trained with {name}, but none were given; pass an int64 tensor [B] or [B, T] "
            "(the collator of memsinks does), or model.eval() for evaluation"
        )
    check_ids(ids, name, least)
    if ids.shape != shape and ids.shape != shape[:1]:
        raise DataError(f"{name} must have shape [{shape[0]}] or [{shape[0]}, {shape[1]}], got {list(ids.shape)}")
    return ids if ids.dim() == 2 else ids[:, None].expand(shape)


def _opened_ids(opened: Tensor, rows: int, length: int, device: torch.device, cache: Any) -> Tensor:
    """The ids of `sinks_open` as [rows, length, union]; tokens past the last column have the ids of the last column."""
    generating = cache is not None
    if rows != opened.shape[0] and not (opened.shape[0] == 1 or (generating and rows % opened.shape[0] == 0)):
        raise DataError(f"sinks_open was given ids for {opened.shape[0]} rows, the input has {rows}")
    opened = opened.repeat_interleave(
        rows // opened.shape[0], 0
    )  # beams and returned sequences of a row stand together
    first = 0 if cache is None else cache.get_seq_length()
    column = (torch.arange(length, device=device) + first).clamp(max=opened.shape[1] - 1)
    return opened.to(device)[:, column]
