"""Saving and loading: a stock checkpoint with its sinks beside it; what does not fit together is refused."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import fill_sinks
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from memsinks.errors import ArchitectureError, CheckpointError, ConfigError
from memsinks.files import file_hash
from memsinks.removal.export import export
from memsinks.sinks import storage
from memsinks.sinks.attach import add_sinks, remove_sinks
from memsinks.sinks.checkpoint import describe, load, load_sinks, save_sinks
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.opening import sinks_open
from memsinks.sinks.state import assign_blocks, has_sinks, shared_parameters, sink_parameters
from memsinks.sinks.storage import fingerprint, has_saved_sinks, read_settings
from memsinks.sinks.table import AssignmentTable

SETTINGS = {
    "neurons": 64,
    "active": 16,
    "block_size": 8,
    "reserved_blocks": 2,
    "open_from": 3,
    "layers": (1,),
    "seed": 5,
}
CONFIG = SinkConfig(**SETTINGS)
TOKENS = torch.arange(12).reshape(2, 6)
TABLE = {7: [6, 7], 9: [0]}


def with_sinks(model: LlamaForCausalLM, config: SinkConfig = CONFIG) -> LlamaForCausalLM:
    add_sinks(model, config)
    fill_sinks(model)
    return model


def logits(model, *opened) -> torch.Tensor:
    with torch.no_grad():
        if not opened:
            return model(input_ids=TOKENS).logits
        with sinks_open(model, *opened):
            return model(input_ids=TOKENS).logits


def files(folder: Path) -> list[str]:
    """Every file below a folder's parent, hidden ones too."""
    return sorted(str(path.relative_to(folder.parent)) for path in folder.parent.rglob("*") if path.is_file())


def edit_settings(folder: Path, **changes) -> None:
    path = folder / "sinks" / "sinks.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def model(tiny_llama):
    model = with_sinks(tiny_llama())
    assign_blocks(model, TABLE)
    return model


@pytest.fixture(scope="module")
def saved(tiny_llama, tmp_path_factory) -> Path:
    """A saved model with a non-empty table; copied by tests that damage it."""
    model = with_sinks(tiny_llama())
    assign_blocks(model, TABLE)
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.mark.parametrize("tied", [True, False])
def test_main_files_are_a_stock_checkpoint(tiny_llama, tmp_path, tied) -> None:
    model = with_sinks(tiny_llama(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "model")
    stock, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(stock) is LlamaForCausalLM
    assert not has_sinks(stock)
    assert torch.equal(logits(stock), logits(model))
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert not any("sinks" in name for name in stored)
    assert ("lm_head.weight" in stored) == (not tied)
    assert sorted(path.name for path in (tmp_path / "model" / "sinks").iterdir()) == ["sinks.json", "sinks.safetensors"]


def test_load_restores_everything_bit_for_bit(model, folder) -> None:
    loaded = load(folder)
    assert not loaded.training
    assert loaded.sink_state.config == CONFIG
    assert fingerprint(loaded) == fingerprint(model) == read_settings(folder).stored["fingerprint"]
    for name in ("ids", "offsets", "blocks"):
        assert torch.equal(getattr(loaded.sink_state.table, name), getattr(model.sink_state.table, name))
    states = [logits(loaded), logits(loaded, 7), logits(loaded, 12)]
    assert all(
        torch.equal(a, b) for a, b in zip(states, [logits(model), logits(model, 7), logits(model, 12)], strict=True)
    )
    assert not torch.equal(states[0], states[1])
    assert not torch.equal(states[1], states[2])


def test_the_table_matters_after_loading(folder) -> None:
    loaded = load(folder)
    assigned = logits(loaded, 7)
    assign_blocks(loaded, {})
    assert not torch.equal(logits(loaded, 7), assigned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_survives_and_can_be_chosen(tiny_llama, tmp_path, dtype) -> None:
    model = with_sinks(tiny_llama().to(dtype))
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert {x.dtype for x in shared_parameters(loaded)} == {dtype}
    assert {x.dtype for x in sink_parameters(loaded)} == {torch.promote_types(dtype, torch.float32)}
    assert torch.equal(logits(loaded, 3), logits(model, 3))
    as_float = load(tmp_path / "model", dtype=torch.float32)
    assert {parameter.dtype for parameter in as_float.parameters()} == {torch.float32}


def test_load_sinks_into_an_own_model(model, folder, tiny_llama) -> None:
    own, stock = tiny_llama(), tiny_llama()
    add_sinks(own, CONFIG)
    for other in (own, stock):
        load_sinks(other, folder)
        assert torch.equal(logits(other, 7), logits(model, 7))
    with pytest.raises(ArchitectureError, match="not a Hugging Face PreTrainedModel"):
        load_sinks(torch.nn.Linear(2, 2), folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 6}, "seed is 5 there and 6 here"), ({"layers": (0,)}, r"layers is \[1\] there and \[0\] here"),
     ({"routing": "neurons"}, "routing is 'blocks' there and 'neurons' here")],
)  # fmt: skip
def test_model_of_other_settings_is_refused(folder, tiny_llama, change, named) -> None:
    settings = SETTINGS | change
    if "routing" in change:
        settings.pop("block_size")
    other = with_sinks(tiny_llama(), SinkConfig(**settings))
    before = logits(other, 7)
    with pytest.raises(CheckpointError, match=f"another layout than the model: .*{named}"):
        load_sinks(other, folder)
    assert torch.equal(logits(other, 7), before)


def test_other_settings_of_training_are_taken_and_said(folder, model, tiny_llama, caplog) -> None:
    other = with_sinks(tiny_llama(), SinkConfig(**SETTINGS | {"open_from": 2, "shared": "decay"}))
    load_sinks(other, folder)
    assert "open_from is 3 there and 2 here; shared is 'none' there and 'decay' here" in caplog.text
    assert fingerprint(other) == fingerprint(model)
    assert torch.equal(logits(other, 7), logits(model, 7))


def test_changed_layout_in_the_file_is_refused(folder) -> None:
    edit_settings(folder, config=read_settings(folder).stored["config"] | {"seed": 7})
    with pytest.raises(CheckpointError, match="fingerprint"):
        load(folder)


def test_newer_format_version_is_refused(folder) -> None:
    edit_settings(folder, format_version=3)
    with pytest.raises(ConfigError, match=r"sinks\.json has format_version 3, this memsinks reads 1 to 2"):
        load(folder)


@pytest.mark.parametrize("name", ["blocks", "single-neurons"])
def test_format_1_is_read_for_ever(name) -> None:
    """The folders were written by the last version that wrote format 1, the logits are what it computed."""
    folder = Path(__file__).parent / "format-1" / name
    loaded = load(folder)
    want = load_file(folder.with_name(f"{name}.logits.safetensors"))
    assert loaded.sink_state.config.start_scale == 1
    rows = torch.arange(12).reshape(2, 6)
    for state, expected in want.items():
        with torch.no_grad(), sinks_open(loaded, int(state[5:])) if state != "closed" else nullcontext():
            torch.testing.assert_close(loaded(input_ids=rows).logits, expected, rtol=1e-5, atol=1e-6)
    if name == "blocks":
        assert loaded.sink_state.table.ids.tolist() == [7, 9]
        assert (loaded.sink_state.config.open_from, loaded.sink_state.intermediate_size) == (3, 32)
    else:
        assert (loaded.sink_state.config.routing, loaded.sink_state.config.shared) == ("neurons", "none")


def test_format_1_is_checked(tmp_path) -> None:
    folder = Path(shutil.copytree(Path(__file__).parent / "format-1" / "blocks", tmp_path / "model"))
    edit_settings(folder, config=read_settings(folder).stored["config"] | {"seed": 6})
    with pytest.raises(CheckpointError, match="another fingerprint than they were saved with"):
        load(folder)


def test_a_part_of_the_layout_that_comes_later_leaves_older_checkpoints_loadable(folder, monkeypatch) -> None:
    before = fingerprint(load(folder))
    layout = storage._layout
    monkeypatch.setattr(storage, "_layout", lambda *arguments: layout(*arguments) | {"shape": "square"})
    monkeypatch.setattr(storage, "ADDED_LATER", {"shape": "square"})
    assert fingerprint(load(folder)) == before
    monkeypatch.setattr(storage, "_layout", lambda *arguments: layout(*arguments) | {"shape": "round"})
    with pytest.raises(CheckpointError, match="fingerprint"):
        load(folder)


def test_a_table_of_a_larger_pool_is_refused(folder, model) -> None:
    path = folder / "sinks" / "sinks.safetensors"
    tensors = load_file(path)
    tensors["table.blocks"] = tensors["table.blocks"] + 6
    save_file(tensors, path)
    edit_settings(folder, sha256=read_settings(folder).sha256 | {"sinks/sinks.safetensors": file_hash(path)})
    with pytest.raises(CheckpointError, match="the pool has blocks 0 to 7"):
        load(folder)
    larger = AssignmentTable.from_dict({7: [12]}, SinkConfig(**SETTINGS | {"neurons": 128}))
    with pytest.raises(ConfigError, match="the pool has blocks 0 to 7"):
        assign_blocks(model, larger)


def test_sinks_alone(model, tiny_llama, tmp_path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"somebody else's")
    assert save_sinks(model, tmp_path / "adapter") == tmp_path / "adapter" / "sinks"
    stock = tiny_llama()
    load_sinks(stock, tmp_path / "adapter")
    assert torch.equal(logits(stock, 7), logits(model, 7))
    with pytest.raises(CheckpointError, match=r"holds sinks alone; load the model .* memsinks\.load_sinks"):
        load(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == b"somebody else's"


def test_nothing_is_done_with_a_mixture(model, tiny_llama, tmp_path) -> None:
    """The weights of another model without its sinks: no fresh fingerprint over both."""
    model.load_state_dict(tiny_llama(seed=1).state_dict(), strict=False)
    for act in (
        lambda: model.save_pretrained(tmp_path / "model"),
        lambda: save_sinks(model, tmp_path / "model"),
        lambda: sinks_open(model, 7).__enter__(),
        lambda: export(model, tmp_path / "clean"),
    ):
        with pytest.raises(CheckpointError, match="a state dict without sinks was loaded"):
            act()
    assert not any(tmp_path.iterdir())
    assert has_sinks(model)
    remove_sinks(model)


def test_invalid_setting_in_the_file_is_refused(folder) -> None:
    edit_settings(folder, config=read_settings(folder).stored["config"] | {"active": 128})
    with pytest.raises(ConfigError, match=r"active \(128\) exceeds neurons"):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[]", "", '{"config": {}}', "7"])
def test_damaged_settings_file_is_named(folder, text) -> None:
    (folder / "sinks" / "sinks.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"sinks\.json"):
        load(folder)


def test_settings_file_without_utf8_is_named(folder) -> None:
    (folder / "sinks" / "sinks.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match=r"sinks\.json is damaged"):
        load(folder)


def test_checkpoint_without_sinks_says_so(tiny_llama, tmp_path) -> None:
    tiny_llama().save_pretrained(tmp_path / "stock")
    assert not has_saved_sinks(tmp_path / "stock")
    with pytest.raises(CheckpointError, match=r"holds no sinks.*from_pretrained"):
        load(tmp_path / "stock")
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere"):
        load(tmp_path / "nowhere")
    (tmp_path / "run" / "model" / "sinks").mkdir(parents=True)
    (tmp_path / "run" / "model" / "sinks" / "sinks.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is a run folder; its model is .*model"):
        load(tmp_path / "run")


@pytest.mark.parametrize("name", ["model.safetensors", "sinks/sinks.safetensors"])
def test_missing_or_cut_tensor_file_is_named(folder, name) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"{name} is not the file"):
        load(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load(folder)


def test_missing_config_is_a_checkpoint_error(folder) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot load a model"):
        load(folder)


def test_tensor_file_with_other_tensors_is_refused(folder) -> None:
    path = folder / "sinks" / "sinks.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.sinks.up"] = tensors.pop("model.layers.1.mlp.sinks.up")
    save_file(tensors, path)
    hashes = read_settings(folder).sha256 | {"sinks/sinks.safetensors": file_hash(path)}
    edit_settings(folder, sha256=hashes)
    with pytest.raises(
        CheckpointError, match=r"missing.*layers\.1\.mlp\.sinks\.up.*unknown.*layers\.0\.mlp\.sinks\.up"
    ):
        load(folder)


def test_tensor_of_another_shape_is_refused_and_nothing_changes(folder, model) -> None:
    path = folder / "sinks" / "sinks.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.sinks.up"
    tensors[name] = tensors[name][:1].contiguous()  # would broadcast in silence
    save_file(tensors, path)
    edit_settings(folder, sha256=read_settings(folder).sha256 | {"sinks/sinks.safetensors": file_hash(path)})
    before = logits(model, 7)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.sinks\.up.*shape"):
        load_sinks(model, folder)
    assert torch.equal(logits(model, 7), before)


def test_mixture_of_two_checkpoints_is_refused(folder, tiny_llama, tmp_path) -> None:
    with_sinks(tiny_llama(seed=1)).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="mixture"):
        load(folder)


def test_foreign_main_file_that_would_be_read_first_is_refused(tiny_llama, tmp_path) -> None:
    folder = tmp_path / "model"
    with_sinks(tiny_llama()).save_pretrained(folder, max_shard_size="4KB")
    assert load(folder) is not None
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not belong"):
        load(folder)


def test_stock_files_do_not_depend_on_the_sinks(model, folder, tmp_path) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.sinks.down += 1
    model.save_pretrained(tmp_path / "changed")
    for name in ("model.safetensors", "config.json"):
        assert file_hash(tmp_path / "changed" / name) == file_hash(folder / name)
    assert file_hash(tmp_path / "changed/sinks/sinks.safetensors") != file_hash(folder / "sinks/sinks.safetensors")
    assert fingerprint(load(tmp_path / "changed")) == fingerprint(load(folder))


def test_saving_again_replaces_ours_and_keeps_the_rest(folder, tiny_llama) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "sub").mkdir()
    (folder / "sub" / "more.txt").write_text("mine too")
    newer = with_sinks(tiny_llama(seed=1), SinkConfig(neurons=32, active=8, block_size=8))
    newer.save_pretrained(folder)
    assert torch.equal(logits(load(folder), 4), logits(newer, 4))
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "sub" / "more.txt").read_text() == "mine too"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_saving_into_an_existing_empty_folder(model, tmp_path) -> None:
    (tmp_path / "model").mkdir()
    model.save_pretrained(str(tmp_path / "model"))
    assert torch.equal(logits(load(tmp_path / "model"), 7), logits(model, 7))


def test_shards_leave_nothing_stale(model, tmp_path) -> None:
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="4KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(logits(load(folder), 7), logits(model, 7))
    model.save_pretrained(folder)
    assert sorted(path.name for path in folder.glob("model*")) == ["model.safetensors"]
    assert torch.equal(logits(load(folder), 7), logits(model, 7))
    model.save_pretrained(folder, max_shard_size="4KB")
    assert sorted(path.name for path in folder.glob("model*")) == sorted(
        ["model.safetensors.index.json", *(path.name for path in shards)]
    )
    assert torch.equal(logits(load(folder), 7), logits(model, 7))


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "interrupt"]
)
@pytest.mark.parametrize("there", [True, False], ids=["over a checkpoint", "new"])
def test_failing_write_leaves_the_previous_checkpoint(model, tiny_llama, tmp_path, monkeypatch, error, there) -> None:
    """The stock part is written already when the sinks' file fails."""
    folder = tmp_path / "model"
    if there:
        model.save_pretrained(folder)
    before = files(folder)
    newer = with_sinks(tiny_llama(seed=1))
    written = []

    def failing(tensors, path, **_) -> None:
        written.extend(Path(path).parent.parent.glob("model.safetensors"))
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(storage, "save_file", failing)
    if isinstance(error, OSError):
        with pytest.raises(
            CheckpointError, match=r"could not write .*model: .*No space left.*nothing there was changed"
        ):
            newer.save_pretrained(folder)
    else:
        with pytest.raises(KeyboardInterrupt):
            newer.save_pretrained(folder)
    assert written
    assert files(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == (["model"] if there else [])
    if there:
        assert torch.equal(logits(load(folder), 7), logits(model, 7))


def test_failing_stock_write_leaves_the_previous_checkpoint(model, folder, monkeypatch) -> None:
    def failing(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", failing)
    with pytest.raises(CheckpointError, match="No space left"):
        model.save_pretrained(folder)
    monkeypatch.undo()
    assert torch.equal(logits(load(folder), 7), logits(model, 7))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_what_saving_cannot_do_is_refused(model, tmp_path) -> None:
    with pytest.raises(ConfigError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "model", push_to_hub=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot write beside"):
        model.save_pretrained(tmp_path / "file" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_only_the_main_process_writes(model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "model", is_main_process=False)
    assert not (tmp_path / "model").exists()


def test_description_is_read_from_the_files(folder) -> None:
    text = describe(folder)
    for part in ("llama with sinks in layers [1]", "32 a layer", "64 a layer, 16 open", "3,072", "assigned ids     2",
                 "open_from=3", read_settings(folder).stored["fingerprint"]):  # fmt: skip
        assert part in text


def test_a_swap_that_fails_puts_the_old_checkpoint_back(tiny_llama, tmp_path, monkeypatch) -> None:
    model = tiny_llama()
    add_sinks(model, SinkConfig(neurons=64, active=32))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    replace = os.replace

    def fail_on_the_new(source, target) -> None:
        if ".part-" in str(source):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_on_the_new)
    with pytest.raises(CheckpointError, match="nothing there was changed"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_through_a_symlink_and_beside_other_folders(tiny_llama, tmp_path) -> None:
    model = tiny_llama()
    add_sinks(model, SinkConfig(neurons=64, active=32))
    (tmp_path / "real" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    model.save_pretrained(tmp_path / "link", True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "checkpoint-3").is_dir()
    load(tmp_path / "real")


def test_the_current_folder_is_not_replaced(tiny_llama, tmp_path, monkeypatch) -> None:
    model = tiny_llama()
    add_sinks(model, SinkConfig(neurons=64, active=32))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="current folder"):
        model.save_pretrained(".")


def test_an_interrupted_swap_is_named(tmp_path) -> None:
    (tmp_path / ".model.old-x1").mkdir()
    with pytest.raises(CheckpointError, match=r"interrupted; what was there is in .*\.model\.old-x1"):
        load(tmp_path / "model")
