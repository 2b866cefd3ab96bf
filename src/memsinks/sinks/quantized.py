"""Bases whose weights are quantized: they stay frozen, and sinks learn beside them.

How a library packs a weight is not looked at. Proved is what the sinks need, for each module that holds such a weight: that it is
linear, and that its gradient is that of the function it computes. What passes no gradient on is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memsinks.errors import ArchitectureError
from memsinks.sinks.config import SinkConfig

TESTED = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "optimum": "quanto"}
"""Root packages of quantized weights with which sinks were tested, and how transformers names their quantizers."""
TOLERANCE = 3e-2
"""Greatest relative error of the gradient; 8-bit layers round what comes in."""
COLUMNS = 64
"""Columns of a packed weight that are read for its spread."""


def is_packed(parameter: Tensor) -> bool:
    """Whether a weight is no plain tensor of 16 bits or more: whole numbers, 8-bit floats, a class of a quantizer."""
    plain = type(parameter.data) in (Tensor, DTensor) and parameter.is_floating_point() and parameter.element_size() > 1
    return not plain


def packed_modules(model: nn.Module) -> dict[str, Any]:
    """The modules that hold quantized weights themselves, by name."""
    modules = model.named_modules()
    return {name: part for name, part in modules if any(map(is_packed, part.parameters(recurse=False)))}


def quantizer_of(model: nn.Module) -> str:
    """The name of what quantized a model, as transformers calls it; "" for plain weights."""
    weights = [x for x in model.parameters() if is_packed(x)]
    if not weights:
        return ""
    settings = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    method = getattr(settings, "quant_method", None)
    root = _root(weights[0])
    return str(getattr(method, "value", method) or TESTED.get(root) or (weights[0].dtype if root == "torch" else root))


def _root(weight: Tensor) -> str:
    """The package that a weight's class comes from."""
    classes = (type(weight), type(weight.data))
    return next((x.__module__.split(".")[0] for x in classes if not x.__module__.startswith("torch.")), "torch")


def refuse_quantized(model: nn.Module, what: str) -> None:
    """ArchitectureError for a quantized model, of which `what` cannot be had."""
    if name := quantizer_of(model):
        raise ArchitectureError(
            f"the model is quantized ({name}), so {what}; load the full-precision model, put the sinks beside it with "
            'memsinks.load_sinks(model, folder, base="any"), and take that'
        )


def refuse_unsavable(model: Any) -> None:
    """ArchitectureError for a quantized model that transformers cannot write."""
    name, quantizer = quantizer_of(model), getattr(model, "hf_quantizer", None)
    if name and (quantizer is None or not quantizer.is_serializable()):
        raise ArchitectureError(
            f"transformers cannot save a model quantized like this ({name}); its weights do not change, so save the sinks alone "
            'with memsinks.save_sinks(model, folder), and give a Trainer save_strategy="no"'
        )


def prepare_quantized(model: Any, config: SinkConfig) -> bool:
    """Whether a model is quantized; if so, that it may carry sinks of these settings is proved.

    Raises:
        ArchitectureError: settings that train the shared weights; a quantizer that was not tested; a layer that is not linear or
            passes no gradient on.
    """
    name = quantizer_of(model)
    if not name:
        return False
    full = "or add sinks to the full-precision model"
    if not {_root(x) for x in model.parameters() if is_packed(x)} <= set(TESTED):
        raise ArchitectureError(
            f"models quantized by {name} are not supported, as they were not tested; load the model with "
            f"{' or '.join(TESTED.values())}, {full} (a GGUF file is loaded with dequantized weights)"
        )
    if config.hashed_blocks or config.shared != "none" or config.open_from > 1:
        raise ArchitectureError(
            f"the model is quantized ({name}), so its weights cannot learn, and these settings train them; give owners blocks of "
            f"their own (memsinks.add_owners, or SinkConfig.for_finetuning), {full}"
        )
    for path, module in packed_modules(model).items():
        if not isinstance(getattr(module, "in_features", None), int):
            raise ArchitectureError(
                f"{path} ({type(module).__name__}) is quantized ({name}) and no linear layer; leave it in full precision, {full}"
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = (
                False  # bitsandbytes repacks in evaluation for a kernel without gradient
            )
        _prove(path, module, name, model.dtype)
    return True


def _prove(path: str, module: Any, quantizer: str, dtype: torch.dtype) -> None:
    """With y = W x: W (-x) must be -y, and <y, y> be <W' y, x>, where W' y is the gradient that the module gives."""
    device = next(module.parameters()).device
    if device.type == "meta":
        return
    x = torch.randn(4, module.in_features, generator=torch.Generator().manual_seed(0))
    given = torch.cat([x, -x, torch.zeros_like(x)]).to(device, dtype).requires_grad_()
    with torch.enable_grad():
        out = module(given)
    if not out.requires_grad:
        raise ArchitectureError(
            f"{path} ({type(module).__name__}) passes no gradient on as {quantizer} quantizes it, so sinks below it would not "
            "learn; quantize weights alone, not activations, and load the model anew"
        )
    plus, minus, nothing = out.detach().double().chunk(3)
    y, norm = plus - nothing, float((plus - nothing).norm())
    (gradient,) = torch.autograd.grad(out[:4], given, y.to(out.dtype))
    odd = float((plus + minus - 2 * nothing).norm()) / max(norm, 1e-20)
    error = max(odd, abs(float((gradient.double() * given.detach().double()).sum()) / max(norm, 1e-20) ** 2 - 1))
    if not error <= TOLERANCE:
        raise ArchitectureError(
            f"{path} ({type(module).__name__}) is not linear, or its gradient is not that of what it computes (relative error "
            f"{error:.2g}), as {quantizer} quantizes it; load the model in full precision"
        )


@torch.no_grad()
def packed_spread(module: Any) -> float:
    """Standard deviation of the first columns of a quantized linear layer's weight, as it computes with them."""
    weight = next(x for x in module.parameters() if is_packed(x))
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    size = module.in_features
    units = torch.eye(min(COLUMNS, size), size, device=weight.device, dtype=dtype)
    return float((module(units) - module(torch.zeros_like(units))).float().std())


def packed_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that the quantized modules compute with, scales included, as plain tensors by name."""
    found: dict[str, Tensor] = {}
    for path, module in packed_modules(model).items():
        for name, value in module.state_dict().items():
            if isinstance(value, Tensor):
                found |= dict(_plain(f"{path}.{name}", value.data))
    return found


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{part}", getattr(tensor, part))


@contextmanager
def taken_as_trainable(model: Any) -> Iterator[None]:
    """Within the block transformers does not see that a model is quantized, whose Trainer trains such ones with PEFT alone."""
    quantized = isinstance(model, nn.Module) and vars(model).get("is_quantized") is True
    if quantized:
        vars(model)["is_quantized"] = False
    try:
        yield
    finally:
        if quantized:
            vars(model)["is_quantized"] = True
