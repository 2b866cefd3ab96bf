"""Rows that teach the shared weights nothing: they run apart, with the shared parameters as constants.

A token of weight 0 trains only its sinks. Its whole row must, so that the row can run without a gradient for the shared
weights; those are then, bit for bit, what they would be had the row no loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from memsinks.batch import IGNORED, ISOLATION, NO_SINKS, blank_batch, take_rows
from memsinks.errors import ConfigError, DataError
from memsinks.sinks.gradient import JoinRows, ZeroGradient, frozen, isolated_weight, opened_ids
from memsinks.sinks.run import run_weighted
from memsinks.sinks.sharding import is_sharded, most_of_ranks
from memsinks.sinks.state import SinkState, require_sinks, shared_parameters


def run_apart(
    model: Any, stock: Any, arguments: dict[str, Any], ids: Tensor, weight: Tensor | None, document_ids: Tensor
) -> Any:
    """The forward of a batch some of whose rows have weight 0; logits and loss are the stock ones.

    A router loss, which couples rows, is that of the rows that teach the shared weights. Of a sharded model all ranks run both
    parts if one of them has rows apart: where a part has no rows, a row without effect takes their place.

    Args:
        ids: int64 [B, T], as for `run`.
        weight: float64 [B, T] of each token's gradient in the shared weights; 0 in rows that run apart; None = 1.
        document_ids: int64 [B, T], of open and closed texts; -1 on padding. It tells padding from text without labels.

    Raises:
        DataError: a row of which one part has weight 0 and another has not.
        ConfigError: under compilation, or where more than logits and loss is asked for.
    """
    if torch.compiler.is_compiling():
        raise ConfigError(
            'shared="none" (exact mode) and isolation cannot be compiled: they split each batch by its data'
        )
    apart, sharded = _rows_apart(weight, document_ids, arguments.get("labels")), is_sharded(model)
    if not any(most_of_ranks(model, [int(apart.any())])):
        return run_weighted(model, stock, arguments, ids, _unless_one(weight))
    more = [name for name in ("output_hidden_states", "output_attentions") if arguments.get(name)]
    if more or arguments.get("return_dict") is False:
        raise ConfigError(
            f'shared="none" gives logits and loss as a dict only; leave out {more or "return_dict=False"}'
        )
    labels = arguments.pop("labels", None)
    loss_arguments = {name: arguments.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in arguments}
    arguments["return_dict"] = True
    running = model.sink_state.running
    out, router_loss, logits, order, without_effect = None, None, [], [], []
    for part in (~apart, apart):
        index = part.nonzero()[:, 0]
        filler = sharded and not len(index)
        if filler:
            index = index.new_zeros(1)
        elif not len(index):
            continue
        running.shared_frozen = part is apart
        try:
            with frozen(shared_parameters(model)) if part is apart else nullcontext():
                taken = take_rows(arguments, index, len(apart))
                if (filler or part is apart) and "output_router_logits" in model.sink_state.arguments:
                    taken["output_router_logits"] = False
                own = None if filler or part is apart or weight is None else _unless_one(weight[index])
                opened = torch.full_like(ids[index], NO_SINKS) if filler else ids[index]
                # Part by part the gradients add up, so only the part in which sinks open need give them one.
                result = run_weighted(model, stock, taken, opened, own, zero_gradient=sharded or part is apart)
        finally:
            running.shared_frozen = False
        if filler:
            without_effect.append(result.logits)
            continue
        out = result
        router_loss = router_loss if part is apart else getattr(out, "aux_loss", None)
        logits.append(out.logits)
        order.append(index)
    together = logits[0] if len(logits) == 1 else JoinRows.apply(order, *logits)
    if without_effect:
        together = ZeroGradient.apply(together, *without_effect)
    elif len(logits) == 1:
        together = ZeroGradient.apply(together, *(x for x in shared_parameters(model) if x.requires_grad))
    assert out is not None
    out.logits = together
    if labels is not None:
        vocabulary = model.config.get_text_config().vocab_size
        out.loss = model.loss_function(logits=together, labels=labels, vocab_size=vocabulary, **loss_arguments)
        if router_loss is not None:
            out.loss = out.loss + _router_loss_weight(model) * router_loss
    if router_loss is not None:
        out.aux_loss = router_loss
    return out


def without_rows_alone(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch without the rows that would train their sinks alone, for training whose sinks learn after it, see `sinks_last`.

    With the targets of the whole batch as divisor (``num_items_in_batch=target_count(batch["labels"])``, counted before) the
    shared weights get the gradient that they get with these rows, to the bit.

    Args:
        model: with sinks.
        batch: of `collate`, and whatever else has a row for each of its rows.

    Returns:
        The rows that are left; if that is none, one row from which nothing learns (`blank_batch`).
    """
    alone = _trains_alone(require_sinks(model), batch)
    if not bool(alone.all()):
        return {name: values[~alone] for name, values in batch.items()}
    first = {name: values[:1] for name, values in batch.items()}
    return first | blank_batch(first) | ({ISOLATION: torch.zeros_like(first[ISOLATION])} if ISOLATION in first else {})


def _trains_alone(state: SinkState, batch: Mapping[str, Tensor]) -> Tensor:
    """Which rows teach the shared weights nothing because their sinks are open, bool [rows]."""
    ids, exposures, flags = (
        None if batch.get(name) is None else batch[name].reshape(len(batch[name]), -1)
        for name in ("document_ids", "exposures", ISOLATION)
    )
    assert ids is not None and exposures is not None
    opened, weight = opened_and_weight(state, ids, exposures, flags)
    if weight is None:
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    return ((weight == 0) & (opened != NO_SINKS)).any(1)


def opened_and_weight(
    state: SinkState, ids: Tensor, exposures: Tensor, flags: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Whose sinks each token opens in training, and what its gradient in the shared weights is multiplied by.

    Args:
        ids, exposures, flags: int64 [B, T] each; flags: `ISOLATION`, None = 0 for all.

    Returns:
        int64 [B, T], see `opened_ids`, and float64 [B, T] or None = 1, see `SinkState.weight_rule` and `isolated_weight`.
    """
    opened = opened_ids(state.config, ids, exposures, flags)
    weight = state.weight_rule(state.config, exposures, opened)
    if flags is not None:
        weight = isolated_weight(state.config, weight, exposures, opened, flags)
    return opened, weight


def _router_loss_weight(model: Any) -> float:
    """What the stock forward multiplies its router loss by."""
    holders = (model, model.config.get_text_config())
    found = [getattr(x, name, None) for x in holders for name in ("router_aux_loss_coef", "aux_loss_coef")]
    known = [x for x in found if x is not None]
    if not known:
        raise ConfigError(
            f"{type(model).__name__} gives a router loss, but not its weight (router_aux_loss_coef); set "
            "config.output_router_logits=False"
        )
    return known[0]


def _unless_one(weight: Tensor | None) -> Tensor | None:
    """`weight`, or None where it is 1 for every token."""
    return None if weight is None or bool((weight == 1).all()) else weight


def _rows_apart(weight: Tensor | None, document_ids: Tensor, labels: Tensor | None) -> Tensor:
    """Which rows run apart, bool [B]: those with a token of weight 0. Padding goes with its row."""
    zero = torch.zeros_like(document_ids, dtype=torch.bool) if weight is None else weight == 0
    apart = zero.any(1)
    if labels is None:
        before_the_last = zero.flip(1).cumsum(1).flip(1).bool()
        text = before_the_last | (document_ids != NO_SINKS)
    else:
        text = labels != IGNORED
    mixed = apart & (~zero & text).any(1)
    if bool(mixed.any()):
        raise DataError(
            f'shared="none" needs rows that open sinks apart from the others; row {int(mixed.nonzero()[0])} mixes '
            "both: pack with apart_from=config.open_from"
        )
    return apart
