"""Parameter groups, schedule, clipping and the lazy AdamW that leaves closed sink blocks alone."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memsinks.checks import at_least, positive
from memsinks.errors import ConfigError, refuse
from memsinks.sinks.gradient import nonzero_blocks
from memsinks.sinks.sharding import is_sharded, local, part_like, per_block, require_whole_blocks, reshard, whole
from memsinks.sinks.state import has_adapters, has_sinks, require_sinks, shared_parameters, sink_parameters
from memsinks.training.config import TrainingConfig


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, sink_lr_factor: float = 3.0
) -> list[dict[str, Any]]:
    """Groups for any optimizer: shared matrices with weight decay, other shared parameters and sinks without.

    Args:
        lr: learning rate of the shared parameters.
        weight_decay: of the shared parameters with two or more dimensions.
        sink_lr_factor: the sinks' learning rate is ``lr * sink_lr_factor``.

    Warns where weights that are to learn have 16 bits.

    Returns:
        Up to three groups with the extra key ``name``: "decay", "no decay", "sinks" (the last marked ``lazy=True``).

    Raises:
        ConfigError: a setting out of range; no sinks to learn beside adapters of PEFT, or in a model of owners.
    """
    require_sinks(model)
    problems = positive("lr", lr) + positive("sink_lr_factor", sink_lr_factor)
    refuse(problems + at_least("weight_decay", weight_decay, 0), "invalid parameter groups")
    shared = [x for x in shared_parameters(model) if x.requires_grad]
    sinks = [x for x in sink_parameters(model) if x.requires_grad]
    if not sinks and (has_adapters(model) or not require_sinks(model).config.hashed_blocks):
        raise ConfigError(
            "no sink is to learn (requires_grad is False for all), so what owners' texts teach would be lost; beside adapters of "
            'PEFT give modules_to_save=["sinks"] in their config'
        )
    if shared:
        _warn_of_16_bits(
            "shared weights",
            shared,
            "load the model with dtype=torch.float32 and train under bf16 autocast (TrainingArguments(bf16=True))",
        )
    else:
        _warn_of_16_bits(
            "sinks", sinks, "beside a base of 16 bits they are float32, unless model.to(...) comes after them"
        )
    groups: list[dict[str, Any]] = [
        {"name": "decay", "params": [x for x in shared if x.dim() > 1], "lr": lr, "weight_decay": weight_decay},
        {"name": "no decay", "params": [x for x in shared if x.dim() < 2], "lr": lr, "weight_decay": 0.0},
        {
            "name": "sinks",
            "params": sinks,
            "lr": lr * sink_lr_factor,
            "weight_decay": 0.0,
            "lazy": True,
        },
    ]
    return [group for group in groups if group["params"]]


def _warn_of_16_bits(what: str, parameters: list[nn.Parameter], remedy: str) -> None:
    """Warn the caller of `param_groups` of parameters that lose small steps."""
    small = sorted(
        {str(x.dtype).removeprefix("torch.") for x in parameters if x.dtype in (torch.bfloat16, torch.float16)}
    )
    if small:
        warnings.warn(
            f"the {what} that are to learn are {' and '.join(small)}, in which small steps are lost; {remedy}",
            stacklevel=3,
        )


def optimizer_and_schedule(
    model: nn.Module, config: TrainingConfig, steps: int
) -> tuple[AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with the groups of `param_groups`, or the shared ones of a model without sinks; its learning rates rise linearly
    over the warm-up and fall as a cosine over the rest of `steps`."""
    if has_sinks(model):
        groups = param_groups(model, config.lr, config.weight_decay, config.sink_lr_factor)
    else:
        matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]))
    warmup = round(steps * config.warmup)

    def cosine(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        share = (step - warmup) / max(1, steps - warmup)
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)


class GradientNorms(NamedTuple):
    """Norms before clipping, 0-dimensional tensors; of a sharded model those of all its shards."""

    shared: Tensor
    sinks: Tensor


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float | None) -> GradientNorms:
    """Clip the gradient norm of the shared weights, that of the hashed sink blocks, and that of each own block, to `max_norm`.

    One norm over all would couple them: a document's sinks would shrink the step of the shared weights, and one owner's that of
    another's. A block that is not hashed to (`SinkConfig.reserved_blocks`) has one norm over its layers and projections. Every
    rank of a sharded model must call this.

    Args:
        max_norm: 0 or less, None and infinity only measure.

    Raises:
        ConfigError: `max_norm` is nan.
    """
    config, limit = require_sinks(model).config, norm_limit(max_norm)
    if is_sharded(model):
        reshard(model)
    shared, sinks = clip_together(shared_parameters(model), limit), sink_parameters(model)
    if not config.reserved_blocks:
        return GradientNorms(shared, clip_together(sinks, limit))
    return GradientNorms(
        shared, _clip_blocks([x.grad for x in sinks if x.grad is not None], config.hashed_blocks, limit)
    )


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float | None) -> None:
    """`clip_grad_norm_` for a model with sinks or without."""
    if has_sinks(model):
        clip_grad_norm_(model, max_norm)
    elif math.isfinite(limit := norm_limit(max_norm)):
        clip_together(list(model.parameters()), limit)


def norm_limit(max_norm: float | None) -> float:
    """The largest norm that gradients may have: above 0, infinity where clipping is off; ConfigError for nan."""
    if max_norm is None or max_norm <= 0:
        return math.inf
    if math.isnan(max_norm):
        raise ConfigError("the largest gradient norm is nan; give a number, or 0 for no clipping")
    return max_norm


@torch.no_grad()
def clip_together(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """torch's `clip_grad_norm_`, also of sharded and whole parameters together; the norm before, of all shards.

    On a CPU it leaves gradients alone that need no clipping, closed blocks in the first place.
    """
    gradients = [x.grad for x in parameters if x.grad is not None]
    cut = [x for x in gradients if local(x) is not x]
    if not cut:
        norm = torch.nn.utils.get_total_norm(gradients)
    else:  # torch takes no list of whole and cut ones
        kinds = [kind for kind in (cut, [x for x in gradients if local(x) is x]) if kind]
        norm = torch.stack([whole(torch.nn.utils.get_total_norm(kind)) for kind in kinds]).norm()
    if math.isfinite(limit) and (norm.device.type != "cpu" or not limit / (norm + 1e-6) >= 1):
        for part in [local(x) for x in gradients] if cut else ():
            part *= (limit / (norm + 1e-6)).clamp(max=1.0)
        if not cut:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def _clip_blocks(gradients: list[Tensor], hashed: int, limit: float) -> Tensor:
    """Clip the first `hashed` blocks together and each of the others by itself; the norm of all before."""
    if not gradients:
        return torch.zeros(())
    norms = torch.stack([torch.linalg.vector_norm(local(x).flatten(1), dim=1) for x in gradients])
    cut = local(gradients[0]) is not gradients[0]
    square = whole(per_block(norms.square().sum(0), gradients[0]))
    own = square[hashed:].sqrt()
    if math.isfinite(limit) and cut:
        together = square[:hashed].sum().sqrt().expand(hashed)
        factor = (limit / (torch.cat([together, own]) + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            local(gradient).mul_(part_like(factor, gradient)[:, None, None])
    elif math.isfinite(limit):
        if hashed:
            together = [x[:hashed] for x in gradients]
            norm = torch.nn.utils.get_total_norm(together)
            if not limit / (norm + 1e-6) >= 1:
                for gradient in together:
                    gradient *= limit / (norm + 1e-6)
        large = (own > limit).nonzero()[:, 0]
        for block in large.tolist():
            for gradient in gradients:
                gradient[hashed + block] *= limit / (own[block] + 1e-6)
    return square.sum().sqrt()


CACHED = 2**16
"""Numbers of a parameter that are updated at a time on a CPU; five arrays of so many fit into a core's cache."""
# Without torch's wrapper, which would run the step hooks a second time.
_STOCK_STEP = inspect.unwrap(torch.optim.AdamW.step)


class AdamW(torch.optim.AdamW):
    """torch's AdamW; in groups marked ``lazy`` a sink block without gradient does not move, nor do its moments.

    A lazy block keeps its own step count for the bias correction. When every block has a gradient in every step, the
    update is torch's. Lazy groups need the layout [blocks, ...]; where that is sharded (FSDP2), so are moments and step counts,
    each rank updates its own blocks. Source of the update: Loshchilov and Hutter, ICLR 2019.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One optimizer step; ConfigError if the model has grown since the optimizer was made."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        set_aside: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            if not group.get("lazy"):
                continue
            if any(getattr(parameter, "outgrown", False) for parameter in group["params"]):
                raise ConfigError(
                    "the model has grown (add_owners, load_sinks or grow) since this optimizer was made, so it would "
                    "move nothing; make it anew, with memsinks.param_groups(model, ...)"
                )
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._lazy_step(parameter, group)
                    set_aside.append((parameter, parameter.grad))
                    parameter.grad = None
        _STOCK_STEP(self)
        for parameter, gradient in set_aside:
            parameter.grad = gradient
        return loss

    def _lazy_step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        if group.get("amsgrad") or group.get("maximize"):
            raise ConfigError("lazy groups support neither amsgrad nor maximize")
        state = self.state[parameter]
        if not state:
            require_whole_blocks(parameter)
            steps = torch.zeros(len(local(parameter)), dtype=torch.float32, device=parameter.device)
            state["step"] = per_block(steps, parameter)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        if state["step"].device != parameter.device:  # torch leaves "step" where a checkpoint was loaded
            state["step"] = state["step"].to(parameter.device)
        assert parameter.grad is not None
        parameter, gradient, state = local(parameter), local(parameter.grad), {x: local(y) for x, y in state.items()}
        moved = nonzero_blocks(gradient).nonzero()[:, 0]
        if not len(moved):
            return
        (beta1, beta2), lr, eps = group["betas"], group["lr"], group["eps"]
        if parameter.device.type == "cpu":  # in place: the copies below cost several times the update
            values = parameter, gradient, state["exp_avg"], state["exp_avg_sq"]
            _update_blocks(values, state["step"], moved, group)
            return
        shape = (-1, *[1] * (parameter.dim() - 1))
        gradient = gradient[moved]
        step = state["step"][moved].double() + 1  # 1 - beta2**step has 4 digits in float32
        first = state["exp_avg"][moved].lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"][moved].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction1 = (1 - beta1**step).view(shape).to(first.dtype)
        correction2 = (1 - beta2**step).sqrt().view(shape).to(first.dtype)
        value = parameter[moved].mul_(1 - lr * group["weight_decay"])
        value -= lr / correction1 * first / (second.sqrt() / correction2 + eps)
        parameter[moved] = value
        state["step"][moved], state["exp_avg"][moved], state["exp_avg_sq"][moved] = step.float(), first, second


def _update_blocks(values: tuple[Tensor, ...], steps: Tensor, moved: Tensor, group: dict[str, Any]) -> None:
    """AdamW on some blocks, in place, to the bits of torch's on each of them.

    So many at a time as stay in a core's cache: block by block Python takes longer than the numbers, and all at once memory does.

    Args:
        values: parameter, gradient and moments, [blocks, ...] each.
        steps: float32 [blocks]. moved: int64 [n], the blocks.
    """
    (beta1, beta2), lr, decay = group["betas"], float(group["lr"]), group["weight_decay"]
    foreach: Any = torch  # these functions have no types
    steps[moved] += 1
    for chunk in moved.split(max(1, CACHED // values[0][0].numel())):
        parameters, gradients, firsts, seconds = ([x[index] for index in chunk.tolist()] for x in values)
        made = steps[chunk].tolist()
        if decay:
            foreach._foreach_mul_(parameters, 1 - lr * decay)
        foreach._foreach_lerp_(firsts, gradients, 1 - beta1)
        foreach._foreach_mul_(seconds, beta2)
        foreach._foreach_addcmul_(seconds, gradients, gradients, 1 - beta2)
        spread = foreach._foreach_sqrt(seconds)
        foreach._foreach_div_(spread, [(1 - beta2**step) ** 0.5 for step in made])
        foreach._foreach_add_(spread, group["eps"])
        foreach._foreach_addcdiv_(parameters, firsts, spread, [-(lr / (1 - beta1**step)) for step in made])
