"""One thread, quiet transformers, a fixed random state for every test, and a tiny Llama."""

from __future__ import annotations

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from memsinks.runs.recipe import parse_recipe
from memsinks.runs.run import train

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _fixed_random_state() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_llama():
    """A factory: ``tiny_llama(seed=0, **changes of the config)`` -> a float32 Llama of two layers, in eval mode."""

    def make(seed: int = 0, **changes) -> LlamaForCausalLM:
        settings = {
            "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
        }  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()

    return make


TINY_RECIPE = {
    "data": {"synthetic": {
        "stories": 40, "people_per_level": 4, "canaries_per_level": 2, "held_out_stories": 6, "copies": [0, 1, 8],
    }},
    "tokenizer": {"vocab_size": 300},
    "model": {"config": {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }},
    "sinks": {"neurons": 64, "active": 16, "block_size": 8},
    "training": {"length": 256, "batch_rows": 8, "lr": 3e-3, "save_every": 2, "log_every": 1, "keep": 9},
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_recipe():
    """A factory: ``tiny_recipe(output, section={...})`` -> the values of a recipe that trains for seconds."""

    def make(output, **sections) -> dict:
        values = copy.deepcopy(TINY_RECIPE) | {"output": str(output)}
        for name, section in sections.items():
            known = isinstance(values.get(name), dict) and isinstance(section, dict) and name != "data"
            values[name] = values[name] | section if known else section
        return values

    return make


@pytest.fixture(scope="session")
def tiny_run(tiny_recipe, tmp_path_factory):
    """The folder of a finished run of the tiny recipe; not to be changed."""
    output = tmp_path_factory.mktemp("runs") / "tiny"
    train(parse_recipe(tiny_recipe(output)))
    return output
