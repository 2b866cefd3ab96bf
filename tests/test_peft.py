"""PEFT beside sinks: LoRA for what all may learn, sinks for what documents own; trained, saved, loaded, merged, exported."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainers import arguments
from transformers import AutoModelForCausalLM

import memsinks as ms
from memsinks.sinks.state import named_sinks, shared_parameters, sink_parameters

peft = pytest.importorskip("peft")
CONFIG = ms.SinkConfig(neurons=64, active=16, block_size=8, seed=3, shared="decay")
A = 11
AGAIN = """
import sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
import memsinks as ms
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
ms.load_sinks(model, adapter)
model = PeftModel.from_pretrained(model, adapter)
rows = torch.arange(12).reshape(2, 6)
with torch.no_grad():
    found = {"closed": model(input_ids=rows).logits}
    with ms.sinks_open(model, 11):
        found["open"] = model(input_ids=rows).logits
save_file(found, out)
"""


def adapted(model):
    ms.add_sinks(model, CONFIG)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["sinks"])
    )


def batch() -> dict[str, torch.Tensor]:
    rows = torch.arange(12).reshape(2, 6)
    return {
        "input_ids": rows, "labels": rows, "document_ids": torch.tensor([A, A]), "exposures": torch.tensor([2, 3]),
    }  # fmt: skip


def logits(model, *opened) -> torch.Tensor:
    with torch.no_grad():
        if not opened:
            return model(input_ids=batch()["input_ids"]).logits
        with ms.sinks_open(model, *opened):
            return model(input_ids=batch()["input_ids"]).logits


@pytest.fixture(scope="module")
def base(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def trained(base):
    model = adapted(AutoModelForCausalLM.from_pretrained(base)).train()
    optimizer = ms.AdamW(ms.param_groups(model, lr=3e-2))
    assert [group["name"] for group in optimizer.param_groups] == ["decay", "sinks"]
    for _ in range(4):
        ms.sinks_first(model, optimizer, [batch()])
        model(**batch()).loss.backward()
        norms = ms.clip_grad_norm_(model, 1.0)
        assert norms.shared > 0
        assert norms.sinks > 0
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_everything_sees_through_the_wrapper(trained) -> None:
    assert ms.has_sinks(trained)
    base = trained.get_base_model()
    assert ms.fingerprint(trained) == ms.fingerprint(base)
    assert list(named_sinks(trained)) == [
        f"model.layers.{layer}.mlp.sinks.{part}" for layer in (0, 1) for part in ("up", "gate", "down")
    ]
    assert all(parameter.requires_grad for parameter in sink_parameters(trained))
    assert all(bool(parameter.any()) for name, parameter in named_sinks(trained).items() if name.endswith("down"))
    learning = {id(parameter) for parameter in shared_parameters(trained) if parameter.requires_grad}
    assert learning == {id(parameter) for name, parameter in trained.named_parameters() if "lora_" in name}
    assert (logits(trained, A) - logits(trained)).abs().max() > 1e-3


def test_saved_and_loaded_in_a_fresh_process_it_is_the_same(trained, base, tmp_path) -> None:
    adapter = tmp_path / "adapter"
    trained.save_pretrained(adapter)
    ms.save_sinks(trained, adapter)
    done = subprocess.run(
        [sys.executable, "-c", AGAIN, base, adapter, tmp_path / "logits.safetensors"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "logits.safetensors")
    torch.testing.assert_close(found["closed"], logits(trained), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["open"], logits(trained, A), rtol=1e-5, atol=1e-6)


def test_merged_it_is_a_model_with_sinks_that_exports(trained, tmp_path) -> None:
    closed, opened = logits(trained), logits(trained, A)
    merged = trained.merge_and_unload()
    torch.testing.assert_close(logits(merged), closed, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(merged, A), opened, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(ms.load(tmp_path / "model"), A), logits(merged, A))
    ms.export(merged, tmp_path / "clean")
    clean = AutoModelForCausalLM.from_pretrained(tmp_path / "clean")
    torch.testing.assert_close(logits(clean), logits(merged))


def test_what_would_lose_the_adapter_is_refused(trained, tmp_path) -> None:
    with pytest.raises(ms.ArchitectureError, match=r"carries PEFT adapters.*merge_and_unload"):
        trained.get_base_model().save_pretrained(tmp_path / "model")
    with pytest.raises(ms.ArchitectureError, match=r"carries PEFT adapters.*merge_and_unload"):
        ms.export(trained, tmp_path / "clean")
    with pytest.raises(ms.ArchitectureError, match="add sinks to the base model first"):
        ms.add_sinks(peft.get_peft_model(AutoModelForCausalLM.from_config(trained.config), peft.LoraConfig()), CONFIG)
    assert not any(tmp_path.iterdir())


def test_sinks_of_another_layout_do_not_get_into_it(trained, base, tmp_path) -> None:
    ms.save_sinks(trained, tmp_path)
    other = AutoModelForCausalLM.from_pretrained(base)
    ms.add_sinks(other, ms.SinkConfig(neurons=64, active=16, block_size=8, seed=4))
    with pytest.raises(ms.CheckpointError, match="seed is 3 there and 4 here"):
        ms.load_sinks(other, tmp_path)
    path = tmp_path / "sinks" / "sinks.safetensors"
    tensors = load_file(path)
    save_file({name: value + 1 for name, value in tensors.items()}, path)
    with pytest.raises(ms.CheckpointError, match=r"sinks\.safetensors is not the file"):
        ms.load_sinks(AutoModelForCausalLM.from_pretrained(base), tmp_path)


def test_owners_beside_a_lora_that_learns_what_is_nobodys(base):
    learned = []
    for blank in (False, True):
        model = AutoModelForCausalLM.from_pretrained(base)
        owners = ms.add_owners(
            model, ["acme", "bolt"], config=ms.SinkConfig.for_finetuning(model, 2, neurons=8, layers=(1,))
        )
        stock = ms.shared_hash(model)
        torch.manual_seed(0)
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["sinks"])
        ).train()
        optimizer = ms.AdamW(ms.param_groups(model, lr=3e-2))
        rows = torch.arange(18).reshape(3, 6)
        labels = torch.where(torch.tensor([[blank], [False], [False]]), -100, rows)
        for _ in range(3):
            ids = torch.tensor([owners["acme"], owners["bolt"], ms.NO_SINKS])
            model(input_ids=rows, labels=labels, document_ids=ids, num_items_in_batch=torch.tensor(15)).loss.backward()
            ms.clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        learned.append({name: x.detach().clone() for name, x in model.named_parameters() if x.requires_grad})
        ms.remove_sinks(model.get_base_model())
        assert ms.shared_hash(model.unload()) == stock
    lora = [name for name in learned[0] if "lora_B" in name]
    assert lora and all(torch.equal(learned[0][name], learned[1][name]) and learned[0][name].any() for name in lora)
    downs = [name for name in learned[0] if name.endswith("down") and "sinks" in name]
    assert downs and all(torch.equal(learned[0][x][1], learned[1][x][1]) and learned[0][x][0].any() for x in downs)
    assert not any(learned[1][x][0].any() for x in downs)


def test_sinks_that_peft_froze_are_said(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    owners = ms.add_owners(model, ["acme"])
    frozen = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ms.ConfigError, match=r'give modules_to_save=\["sinks"\]'):
        ms.param_groups(frozen, lr=1e-3)
    with pytest.raises(ms.ArchitectureError, match="carries PEFT adapters, beside which these sinks were trained"):
        ms.save_sinks(frozen, tmp_path, owners=owners.values())


def test_a_checkpoint_of_an_adapter_goes_on_only_with_its_owners(base, tmp_path):
    """It does not say whose sinks are whose; in another order of owners each would get the other's."""
    rows = ms.pack([[1, 2, 3, 4, 5]] * 8, [11, 22] * 4, [1] * 8, length=6, pad_id=0, one_document_per_row=True)

    def trainer(owners, folder):
        model = AutoModelForCausalLM.from_pretrained(base)
        ms.add_owners(model, owners)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["sinks"])
        args = arguments(folder, save_strategy="steps", save_steps=1, max_steps=2, train_sampling_strategy="random")
        return ms.SinkTrainer(peft.get_peft_model(model, config), args, train_dataset=rows)

    trainer([11, 22], tmp_path).train()
    resumed = str(tmp_path / "checkpoint-1")
    trainer([11, 22], tmp_path / "same").train(resume_from_checkpoint=resumed)
    with pytest.raises(ms.CheckpointError, match="owners have other blocks in this model"):
        trainer([22, 11], tmp_path / "other").train(resume_from_checkpoint=resumed)


def test_who_is_erased_is_in_no_adapter_and_not_in_what_was_before(base):
    """PEFT keeps the sinks that it found beside a copy for each adapter; taking the adapters off would bring him back."""
    model = AutoModelForCausalLM.from_pretrained(base)
    owners = ms.add_owners(model, ["acme", "bolt"])
    with torch.no_grad():
        for parameter in sink_parameters(model):
            parameter.fill_(0.5)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["sinks"])
    model = peft.get_peft_model(model, config, adapter_name="one")
    model.add_adapter("two", config)
    gone, kept = (model.get_base_model().sink_state.table.own_blocks(owners[x])[0] for x in ("acme", "bolt"))
    ms.erase(model, owners["acme"])
    downs = [x for name, x in model.named_parameters() if ".sinks." in name and name.endswith("down")]
    assert len(downs) == 3  # of before, and of each adapter
    assert not any(x[gone].any() for x in downs) and all((x[kept] == 0.5).all() for x in downs)
    assert not any(x[gone].any() for name, x in named_sinks(model.unload()).items() if name.endswith("down"))


@pytest.mark.parametrize("where", ["target_modules", "modules_to_save"])
def test_decay_refuses_an_adapter_of_the_output_embedding(base, where):
    """What passes beside the scaled logits would teach the shared weights in full."""
    for shared in ("decay", "none"):
        model = AutoModelForCausalLM.from_pretrained(base)
        ms.add_sinks(model, ms.SinkConfig(neurons=64, active=16, block_size=8, shared=shared))
        settings = {"target_modules": ["q_proj"], "modules_to_save": ["sinks"]}
        settings[where] = [*settings[where], "lm_head"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, **settings)).train()
        if shared == "none":
            model(**batch()).loss.backward()
            continue
        with pytest.raises(ms.ArchitectureError, match="output embedding, which something has wrapped"):
            model(**batch())
