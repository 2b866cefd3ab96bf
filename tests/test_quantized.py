"""Beside quantized weights owners learn as beside others; what would not learn is refused.

The packed layer of these tests needs no package; the others are tested where they are installed.
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_llama
from torch import nn
from torch.nn.functional import cosine_similarity, linear
from trainers import arguments, some_rows
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

import memsinks as ms
from memsinks.sinks import quantized
from memsinks.sinks.state import named_sinks, sink_modules

SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64, "initializer_range": 0.1}
OWNERS = ["acme", "bolt"]
IDS = torch.arange(24)[None] * 7 % 64


class Packed(nn.Module):
    """An 8-bit linear layer without bias, as a quantizer makes it."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.register_buffer("scale", plain.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((plain.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


class Silent(Packed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).detach()


class Curved(Packed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def packed(kind: type = Packed, name: str = "") -> nn.Module:
    model = tiny_llama(torch.float32, **SIZES).eval()
    for path, part in list(model.model.layers.named_modules()):
        if isinstance(part, nn.Linear) and path.endswith(name):
            model.model.layers.set_submodule(path, kind(part))
    return model


def settings_of(kind: str) -> BitsAndBytesConfig | TorchAoConfig | QuantoConfig:
    package, _, what = kind.partition(" ")
    pytest.importorskip({"quanto": "optimum.quanto"}.get(package, package))
    if kind == "bitsandbytes nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    if kind == "bitsandbytes int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if package == "quanto":
        return QuantoConfig(weights=what)
    from torchao import quantization

    makers = {
        "int8": quantization.Int8WeightOnlyConfig,
        "activations": quantization.Int8DynamicActivationInt8WeightConfig,
    }
    return TorchAoConfig(makers[what]())


def loaded(kind: str, folder, dtype: torch.dtype = torch.float32, device_map: str | None = None) -> nn.Module:
    """The model of these tests, quantized while it is loaded."""
    settings = settings_of(kind)
    if not (folder / "config.json").exists():
        tiny_llama(torch.float32, **SIZES).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=dtype, device_map=device_map
    )


KINDS = ["packed", "bitsandbytes nf4", "bitsandbytes int8", "torchao int8", "quanto int8", "quanto int4"]
SAVED = ["bitsandbytes nf4", "bitsandbytes int8", "torchao int8"]


@pytest.fixture(params=KINDS)
def make(request, tmp_path, monkeypatch):
    """A factory of the same quantized model."""
    if request.param == "packed":
        monkeypatch.setitem(quantized.TESTED, "torch", "packed")
        return packed
    settings_of(request.param)
    return lambda **changes: loaded(request.param, tmp_path / "float", **changes)


def owned(model: nn.Module) -> dict:
    return ms.add_owners(model, OWNERS, config=ms.SinkConfig.for_finetuning(model, 2, neurons=8, layers=(0, 1)))


def step_of(model: nn.Module, owner: int, optimizer: torch.optim.Optimizer | None = None) -> float:
    """The loss on the text of an owner; its gradients stay, or with an optimizer are taken."""
    marks = {"document_ids": torch.tensor([owner]), "exposures": torch.tensor([1])}
    loss = model.train()(input_ids=IDS, labels=IDS, **marks).loss
    loss.backward()
    if optimizer is not None:
        ms.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def learned(model: nn.Module, owner: int, steps: int = 12) -> torch.optim.Optimizer:
    optimizer = ms.AdamW(ms.param_groups(model, lr=1e-2))
    losses = [step_of(model, owner, optimizer) for _ in range(steps)]
    assert losses[-1] < losses[0] - 1
    model.eval()
    return optimizer


def logits(model: nn.Module, owner: int = -1) -> torch.Tensor:
    with torch.no_grad(), ms.sinks_open(model, owner):
        return model(input_ids=IDS).logits


def dequantized(model: nn.Module) -> nn.Module:
    """The model in plain weights: what its layers compute with."""
    plain = tiny_llama(torch.float32, **SIZES).eval()
    with torch.no_grad():
        for path, part in plain.named_modules():
            if isinstance(part, nn.Linear) and path != "lm_head":
                part.weight.copy_(model.get_submodule(path)(torch.eye(part.in_features)).T)
    return plain


# Owners beside quantized weights


def test_the_function_and_all_packed_bits_stay(make) -> None:
    model = make()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    digest = ms.shared_hash(model)
    assert ms.shared_hash(make()) == digest
    owners = owned(model)
    assert torch.equal(logits(model), before)
    assert all(x.requires_grad == (".sinks." in name) for name, x in model.named_parameters())
    optimizer = learned(model, owners["acme"])
    assert torch.equal(logits(model), before)
    assert ms.shared_hash(model) == digest
    numbers = [*named_sinks(model).values(), *(x for state in optimizer.state.values() for x in state.values())]
    assert {x.dtype for x in numbers if isinstance(x, torch.Tensor)} == {torch.float32}
    ms.erase(model, owners["acme"])
    ms.remove_sinks(model)
    assert ms.shared_hash(model) == digest
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, before)


def test_scales_are_hashed(make) -> None:
    model = make()
    digest = ms.shared_hash(model)
    part = next(iter(quantized.packed_modules(model).values()))
    scales = [part.weight, *part.buffers(), getattr(part.weight, "quant_state", None)]
    with torch.no_grad():
        for name in ("absmax", "SCB", "scale", "_scale"):
            for holder in (x for x in (part, *scales) if isinstance(getattr(x, name, None), torch.Tensor)):
                getattr(holder, name).mul_(2)
    assert ms.shared_hash(model) != digest


def test_sinks_get_the_gradient_of_the_dequantized_model(make) -> None:
    model = make()
    plain = dequantized(model)
    for each in (model, plain):
        owner = owned(each)["acme"]
        with torch.no_grad():
            for x in named_sinks(each).values():
                x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(len(x.shape))) * 0.1)
        step_of(each, owner)
    for (name, one), other in zip(named_sinks(model).items(), named_sinks(plain).values(), strict=True):
        assert cosine_similarity(one.grad.flatten(), other.grad.flatten(), 0) > 0.99, name
    for one, other in zip(sink_modules(model).values(), sink_modules(plain).values(), strict=True):
        assert one.std == pytest.approx(other.std, rel=0.05)


def test_bfloat16_quantized(make, request) -> None:
    if request.node.callspec.params["make"] == "packed":
        pytest.skip("it is float32")
    model = make(dtype=torch.bfloat16, device_map="cpu")
    learned(model, owned(model)["acme"])
    assert {x.dtype for x in named_sinks(model).values()} == {torch.float32}


def test_sinks_open_in_generation_and_under_a_rescale(make) -> None:
    model = make()
    owner = owned(model)["acme"]
    learned(model, owner, 20)
    with torch.no_grad(), ms.sinks_open(model, owner):
        cached, slow = (
            model.generate(IDS[:, :4], max_new_tokens=6, do_sample=False, use_cache=x, pad_token_id=0)
            for x in (True, False)
        )
        assert torch.equal(cached, slow)
    closed = logits(model)
    with ms.sinks_closed(model, rescale="expected"), torch.no_grad():
        assert not torch.equal(model(input_ids=IDS).logits, closed)


# Files


def test_owners_travel_between_the_quantized_and_the_float_model(make, tmp_path, caplog) -> None:
    model = make()
    owner = owned(model)["acme"]
    learned(model, owner)
    ms.save_sinks(model, tmp_path / "acme", owners=[owner])
    ms.save_sinks(model, tmp_path / "all")
    for folder in ("acme", "all"):
        again = make()
        ms.load_sinks(again, tmp_path / folder)
        torch.testing.assert_close(logits(again, owner), logits(model, owner))
        assert all(x.requires_grad == (".sinks." in name) for name, x in again.named_parameters())
    plain = tiny_llama(torch.float32, **SIZES).eval()
    with pytest.raises(ms.CheckpointError, match='saved beside other weights .*give base="any"'):
        ms.load_sinks(plain, tmp_path / "acme")
    with caplog.at_level(logging.WARNING):
        ms.load_sinks(plain, tmp_path / "acme", base="any")
    assert "saved beside other weights" in caplog.text
    loss = torch.nn.functional.cross_entropy
    found = [float(loss(logits(plain, x)[0, :-1], IDS[0, 1:])) for x in (-1, owner)]
    assert found[1] < found[0] - 1
    with pytest.raises(ms.ArchitectureError, match=r'is quantized \(.*load the full-precision model.*base="any"'):
        ms.export(model, tmp_path / "clean")
    ms.export(plain, tmp_path / "clean", open=[owner], verify=False)


def test_owners_of_a_model_trained_from_scratch_come_beside_quantized_weights(make, tmp_path) -> None:
    plain = tiny_llama(torch.float32, **SIZES)
    ms.add_sinks(plain, ms.SinkConfig(neurons=64, active=16, block_size=8, reserved_blocks=4, shared_decay=0.5))
    ms.assign(plain, [7])
    with torch.no_grad():
        for sinks in sink_modules(plain).values():
            sinks.down += 0.1
    ms.save_sinks(plain, tmp_path, owners=[7])
    model = make()
    ms.load_sinks(model, tmp_path, base="any")
    assert not torch.equal(logits(model, 7), logits(model))
    assert not model.sink_state.config.needs_exposures


def test_a_whole_checkpoint_is_saved_or_refused(make, request, tmp_path) -> None:
    model = make()
    owner = owned(model)["acme"]
    learned(model, owner)
    if request.node.callspec.params["make"] not in SAVED:
        with pytest.raises(ms.ArchitectureError, match="transformers cannot save .*save the sinks alone"):
            model.save_pretrained(tmp_path / "model")
        return
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(ms.load(tmp_path / "model"), owner), logits(model, owner))
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(input_ids=IDS).logits
    assert torch.equal(stock, logits(model))


def test_the_trainer(make, request, tmp_path) -> None:
    rows = some_rows(apart_from=1)
    documents = {str(x): x for x in set(rows.segments["document_id"].tolist())}
    saved = request.node.callspec.params["make"] in SAVED
    settings = {"use_cpu": True, "save_steps": 3, "save_strategy": "steps" if saved else "no"}

    def trainer(**changes) -> ms.SinkTrainer:
        model = make()
        ms.add_owners(model, documents.values(), config=ms.SinkConfig.for_finetuning(model, len(documents), neurons=8))
        return ms.SinkTrainer(
            model, arguments(tmp_path / "run", **settings | changes), train_dataset=rows, eval_dataset=rows
        )

    whole = trainer()
    digest = ms.shared_hash(whole.model)
    whole.train()
    assert ms.shared_hash(whole.model) == digest
    assert any(bool(x.any()) for name, x in named_sinks(whole.model).items() if name.endswith("down"))
    if not saved:
        with pytest.raises(ms.ArchitectureError, match="transformers cannot save"):
            trainer(save_strategy="steps")
        return
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert ms.shared_hash(again.model) == digest
    for one, other in zip(named_sinks(again.model).values(), named_sinks(whole.model).values(), strict=True):
        torch.testing.assert_close(one, other)
    best = trainer(eval_strategy="steps", eval_steps=3, load_best_model_at_end=True)
    best.train()
    kept = load_file(f"{best.state.best_model_checkpoint}/sinks/sinks.safetensors")
    assert all(torch.equal(x, kept[name]) for name, x in named_sinks(best.model).items())


# What is refused


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shared_decay": 0.5},
        {"reserved_blocks": 8, "shared_decay": 0.5},
        {"reserved_blocks": 8},
    ],
)
def test_settings_that_train_the_shared_weights_are_refused(make, settings) -> None:
    model = make()
    with pytest.raises(ms.ArchitectureError, match=r"is quantized .*cannot learn.*memsinks\.add_owners"):
        ms.add_sinks(model, ms.SinkConfig(**{"neurons": 64, "active": 16, "block_size": 8} | settings))
    assert not ms.has_sinks(model)


@pytest.mark.parametrize(
    ("kind", "message"), [(Silent, "passes no gradient on"), (Curved, "is not linear, or its gradient is not")]
)
def test_layers_that_are_not_linear_or_pass_no_gradient_are_refused(kind, message, monkeypatch) -> None:
    monkeypatch.setitem(quantized.TESTED, "torch", "packed")
    for name in ("o_proj", "up_proj"):
        model = packed(kind, name)
        with pytest.raises(ms.ArchitectureError, match=f"layers.0.*{name} .*{message}"):
            ms.add_owners(model, OWNERS)
        assert not ms.has_sinks(model) and model.lm_head.weight.requires_grad


def test_other_quantizers_and_other_layers_are_refused_by_name(monkeypatch) -> None:
    with pytest.raises(ms.ArchitectureError, match=r"by torch\.int8 are not supported.*bitsandbytes or torchao"):
        ms.add_owners(packed(), OWNERS)
    monkeypatch.setitem(quantized.TESTED, "torch", "packed")
    model = packed()
    weight = model.model.norm.weight.data.to(torch.float8_e4m3fn)
    model.model.norm.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ms.ArchitectureError, match=r"model\.norm .* no linear layer; leave it in full precision"):
        ms.add_owners(model, OWNERS)


def test_quantized_activations_are_refused(tmp_path) -> None:
    model = loaded("torchao activations", tmp_path)
    with pytest.raises(ms.ArchitectureError, match="passes no gradient on as torchao quantizes it"):
        ms.add_owners(model, OWNERS)


def test_bitsandbytes_does_not_repack_for_a_kernel_without_gradient(tmp_path) -> None:
    model = loaded("bitsandbytes nf4", tmp_path)
    parts = quantized.packed_modules(model).values()
    for part in parts:
        part.support_avx512bf16_for_cpu = True
    model.train()
    ms.add_owners(model, OWNERS)
    assert not any(part.support_avx512bf16_for_cpu for part in parts)


def test_a_copy_is_quantized_too(monkeypatch) -> None:
    monkeypatch.setitem(quantized.TESTED, "torch", "packed")
    model = packed()
    owned(model)
    assert ms.shared_hash(copy.deepcopy(model)) == ms.shared_hash(model)


# Files with dequantized weights

GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk", "self_attn.o_proj": "attn_output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def test_a_gguf_file_is_a_model_in_plain_weights(tmp_path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(64)
    for name, value in tiny_llama(torch.float32, **SIZES).state_dict().items():
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        kind = gguf.GGMLQuantizationType.Q8_0 if value.dim() == 2 else gguf.GGMLQuantizationType.F32
        if name != "lm_head.weight":
            writer.add_tensor(name, gguf.quants.quantize(value.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").eval()
    assert model.is_quantized and not quantized.quantizer_of(model)
    ms.add_sinks(model, ms.SinkConfig(neurons=64, active=16, block_size=8))
    assert all(x.requires_grad for x in model.parameters())
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(ms.load(tmp_path / "model")), logits(model))
    ms.export(model, tmp_path / "clean", verify=False)
    assert "quantization_config" not in (tmp_path / "clean" / "config.json").read_text()
