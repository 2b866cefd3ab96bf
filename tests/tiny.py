"""A tiny Llama and its batches, for tests that need a whole model."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memsinks.sinks.attach import add_sinks
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.state import sink_parameters

VOCABULARY = 37
IGNORED = -100
A, B = 11, 22
"""Two document ids."""


def tiny_llama(dtype: torch.dtype = torch.float64, cls: type = LlamaForCausalLM, **changes) -> LlamaForCausalLM:
    """Two layers, tied embeddings, the same weights at every call; the global random state stays as it was."""
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
        "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(LlamaConfig(**(settings | changes)))
    return model.to(dtype).train()


def fill_sinks(model: torch.nn.Module, std: float = 0.2) -> None:
    """Give all sinks random weights (the down projection starts at zero), the same at every call."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sink_parameters(model):
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
            parameter.copy_(values)


def sink_llama(dtype: torch.dtype = torch.float64, cls: type = LlamaForCausalLM, **settings) -> LlamaForCausalLM:
    """`tiny_llama` with filled sinks: 8 blocks of 8 in each layer, of which 2 open unless `settings` say otherwise."""
    model = tiny_llama(dtype, cls)
    add_sinks(model, SinkConfig(**({"neurons": 64, "active": 16, "block_size": 8, "shared": "decay"} | settings)))
    fill_sinks(model)
    return model


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """int64 [rows, length]."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every gradient by name; every parameter must have one."""
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient for {missing}"
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def batch(**changes) -> dict[str, torch.Tensor]:
    """Two rows of five tokens, the documents A and B, met for the second time; None leaves a field out."""
    input_ids = tokens(2, 5)
    whole = {
        "input_ids": input_ids, "labels": input_ids.clone(), "document_ids": torch.tensor([A, B]),
        "exposures": torch.tensor([2, 2]),
    }  # fmt: skip
    return {name: value for name, value in (whole | changes).items() if value is not None}
