# ruff: noqa: C408
"""A tiny random causal language model of every supported architecture."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from memsinks.sinks.attach import add_sinks
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.state import sink_parameters

VOCABULARY, WIDTH, LAYERS, HEADS = 96, 32, 2, 4
COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
GROUPED = COMMON | dict(num_key_value_heads=2, head_dim=8)
GPT2 = dict(
    vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64, n_inner=48, resid_pdrop=0.0,
    embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
LONG_WINDOW = dict(sliding_window=512)
TOWER = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, image_size=16, patch_size=8)
SECTIONS = dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2]))
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=24)
FIRST_DENSE = dict(n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1)
LATENT = COMMON | EXPERTS | FIRST_DENSE | dict(
    q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4,
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One architecture: its model type and settings, and what its MLP computes (written down, not read from it).

    experts: the sinks stand beside a mixture of experts, in one layer or all. multimodal: beside the MLPs of the language model
    in a model that reads images too.
    """

    kind: str
    settings: dict[str, Any] = field(default_factory=lambda: COMMON)
    activation: str = "silu"
    gated: bool = True
    experts: bool = False
    multimodal: bool = False


FAMILIES = {
    "llama": Family("llama", GROUPED),
    "qwen2": Family("qwen2", COMMON | dict(num_key_value_heads=2)),
    "qwen3": Family("qwen3", GROUPED),
    "mistral": Family("mistral", GROUPED | LONG_WINDOW),
    "gemma2": Family("gemma2", GROUPED | LONG_WINDOW | dict(query_pre_attn_scalar=8), "gelu_pytorch_tanh"),
    "gemma3": Family(
        "gemma3_text",
        GROUPED | LONG_WINDOW
        | dict(query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]),
        "gelu_pytorch_tanh",
    ),
    "gpt2": Family("gpt2", GPT2, "gelu_new", gated=False),
    "gpt_neox": Family("gpt_neox", COMMON | dict(attention_dropout=0.0, hidden_dropout=0.0), "gelu", gated=False),
    "gptj": Family("gptj", GPT2 | dict(rotary_dim=4, tie_word_embeddings=False), "gelu_new", gated=False),
    "gpt_neo": Family(
        "gpt_neo",
        dict(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_layers=LAYERS, num_heads=HEADS,
            attention_types=[[["global", "local"], 1]], window_size=512, max_position_embeddings=64, bos_token_id=1,
            eos_token_id=None, pad_token_id=0, resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0,
        ),
        "gelu_new",
        gated=False,
    ),
    "olmo2": Family("olmo2", COMMON | dict(num_key_value_heads=2)),
    "olmo3": Family("olmo3", COMMON | LONG_WINDOW | dict(layer_types=["sliding_attention", "full_attention"])),
    "phi": Family("phi", COMMON | dict(resid_pdrop=0.0, embd_pdrop=0.0), "gelu_new", gated=False),
    "phi3": Family("phi3", COMMON | LONG_WINDOW | dict(num_key_value_heads=2, resid_pdrop=0.0, embd_pdrop=0.0)),
    "smollm3": Family("smollm3", COMMON | dict(num_key_value_heads=2, no_rope_layers=[1, 0])),
    "granite": Family("granite", COMMON | dict(residual_multiplier=0.5, embedding_multiplier=2.0, logits_scaling=2.0)),
    "stablelm": Family("stablelm", COMMON | dict(num_key_value_heads=4, hidden_dropout=0.0, attention_dropout=0.0)),
    "starcoder2": Family(
        "starcoder2",
        COMMON | LONG_WINDOW
        | dict(num_key_value_heads=2, attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0),
        "gelu_pytorch_tanh",
        gated=False,
    ),
    "cohere2": Family(
        "cohere2",
        COMMON | LONG_WINDOW
        | dict(num_key_value_heads=2, layer_types=["sliding_attention", "full_attention"], logit_scale=1.0),
    ),
    "nemotron": Family("nemotron", COMMON | dict(num_key_value_heads=2, hidden_dropout=0.0), "relu2", gated=False),
    "bloom": Family(
        "bloom",
        dict(
            vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS, hidden_dropout=0.0,
            attention_dropout=0.0, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        ),
        "gelu_pytorch_tanh",
        gated=False,
    ),
    "falcon": Family(
        "falcon",
        dict(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            ffn_hidden_size=48, alibi=True, new_decoder_architecture=False, hidden_dropout=0.0, attention_dropout=0.0,
            bos_token_id=1, eos_token_id=None, pad_token_id=0,
        ),
        "gelu",
        gated=False,
    ),
    "gpt_bigcode": Family("gpt_bigcode", GPT2, "gelu_pytorch_tanh", gated=False),
    "exaone4": Family(
        "exaone4",
        COMMON | LONG_WINDOW | dict(num_key_value_heads=2, layer_types=["sliding_attention", "full_attention"]),
    ),
    "glm4": Family("glm4", GROUPED),
    "seed_oss": Family("seed_oss", GROUPED | dict(attention_dropout=0.0, residual_dropout=0.0)),
    "nanochat": Family("nanochat", COMMON | dict(num_key_value_heads=2), "relu2", gated=False),
    "mixtral": Family("mixtral", GROUPED | dict(num_local_experts=4), experts=True),
    "qwen2_moe": Family(
        "qwen2_moe",
        COMMON
        | dict(num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=24)
        | dict(moe_intermediate_size=24, mlp_only_layers=[0]),
        experts=True,
    ),
    "qwen3_moe": Family("qwen3_moe", GROUPED | EXPERTS | dict(num_experts=4, mlp_only_layers=[0]), experts=True),
    "olmoe": Family("olmoe", COMMON | dict(num_experts=4, num_experts_per_tok=2), experts=True),
    "granitemoe": Family(
        "granitemoe", COMMON | dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2), experts=True
    ),
    "deepseek_v2": Family("deepseek_v2", LATENT | dict(n_group=1, topk_group=1), experts=True),
    "deepseek_v3": Family("deepseek_v3", LATENT | dict(n_group=2, topk_group=1), experts=True),
    "glm4_moe": Family("glm4_moe", GROUPED | EXPERTS | FIRST_DENSE, experts=True),
    "gpt_oss": Family(
        "gpt_oss",
        GROUPED | LONG_WINDOW
        | dict(num_local_experts=4, num_experts_per_tok=2, layer_types=["sliding_attention", "full_attention"])
        | dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        experts=True,
    ),
    "ernie4_5_moe": Family(
        "ernie4_5_moe",
        GROUPED | dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=24, moe_num_shared_experts=1),
        experts=True,
    ),
    "dots1": Family("dots1", GROUPED | EXPERTS | FIRST_DENSE | LONG_WINDOW, experts=True),
    "hunyuan_v1_moe": Family("hunyuan_v1_moe", GROUPED | dict(num_experts=4, moe_topk=2), experts=True),
    "flex_olmo": Family("flex_olmo", COMMON | dict(num_key_value_heads=2, num_experts=4, num_experts_per_tok=2), experts=True),
    "llama4": Family(
        "llama4_text",
        GROUPED | dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size_mlp=48, moe_layers=[1])
        | dict(attention_chunk_size=32),
        experts=True,
    ),
    "llava": Family(
        "llava",
        dict(
            text_config=dict(model_type="llama", **GROUPED),
            vision_config=dict(model_type="clip_vision_model", num_attention_heads=2, **TOWER), image_token_index=200,
        ),
        multimodal=True,
    ),
    "gemma3_images": Family(
        "gemma3",
        dict(
            text_config=GROUPED | LONG_WINDOW
            | dict(query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]),
            vision_config=dict(model_type="siglip_vision_model", num_attention_heads=2, **TOWER),
            image_token_index=200, boi_token_index=201, eoi_token_index=202, mm_tokens_per_image=1,
        ),
        "gelu_pytorch_tanh",
        multimodal=True,
    ),
    "qwen2_vl": Family(
        "qwen2_vl",
        dict(
            text_config=COMMON | SECTIONS | dict(num_key_value_heads=2),
            vision_config=dict(depth=1, embed_dim=16, num_heads=2, mlp_ratio=2, patch_size=8, hidden_size=WIDTH),
            image_token_id=200, video_token_id=201, vision_start_token_id=202, vision_end_token_id=203,
        ),
        multimodal=True,
    ),
    "qwen3_vl": Family(
        "qwen3_vl",
        dict(
            text_config=GROUPED | SECTIONS,
            vision_config=dict(
                depth=1, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=8, out_hidden_size=WIDTH,
                deepstack_visual_indexes=[0], num_position_embeddings=16,
            ),
            image_token_id=200, video_token_id=201, vision_start_token_id=202, vision_end_token_id=203,
        ),
        multimodal=True,
    ),
}  # fmt: skip
MPT = Family(
    "mpt",
    dict(
        vocab_size=VOCABULARY, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, max_seq_len=64, expansion_ratio=2,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    ),
    "gelu",
    gated=False,
)  # fmt: skip
"""Not among the `FAMILIES`; it leaks between packed documents as BLOOM and Falcon do."""

SINKS = SinkConfig(neurons=256, active=64, block_size=16, shared_decay=1.0)


def tiny(name: str, seed: int = 0) -> PreTrainedModel:
    """The model of a family in eval mode, the same for a seed; the global random state is left alone."""
    family = (FAMILIES | {"mpt": MPT})[name]
    with torch.random.fork_rng(devices=[]):
        config = AutoConfig.for_model(family.kind, **copy.deepcopy(family.settings))
        model = (AutoModelForImageTextToText if family.multimodal else AutoModelForCausalLM).from_config(config)
    return randomised(model, seed)


def randomised(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Weights so large that logits are of order one and every part of the model shows in them; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model.eval()


def with_sinks(name: str, config: SinkConfig = SINKS) -> PreTrainedModel:
    """The model of a family with sinks whose weights are all random."""
    model = tiny(name)
    add_sinks(model, config)
    randomise_sinks(model)
    return model


@torch.no_grad()
def randomise_sinks(model: nn.Module, seed: int = 1) -> None:
    """Give all sinks, `down` included, random weights."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in sink_parameters(model):
        parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))


def some_tokens(rows: int = 3, length: int = 12, seed: int = 2) -> Tensor:
    """Random tokens, int64 [rows, length]."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
