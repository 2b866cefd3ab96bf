"""Which model, in which state: what the command line says, what is refused, and hashes that see every bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from audited import Oracle, llama, memorized_in_sinks, the_tokenizer
from tiny import sink_llama

from memsinks.auditing.subjects import Subject, facts, weights_hash
from memsinks.errors import CheckpointError, ConfigError
from memsinks.sinks.checkpoint import load
from memsinks.sinks.state import assign_blocks


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints: stock with its tokenizer, and with sinks without one."""
    place = tmp_path_factory.mktemp("models")
    found = {"stock": place / "stock", "sinks": place / "sinks"}
    llama().save_pretrained(found["stock"])
    the_tokenizer().save_pretrained(found["stock"])
    memorized_in_sinks().save_pretrained(found["sinks"])
    return found


# The command line


@pytest.mark.parametrize(
    ("text", "path", "state", "name"),
    [
        ("model", "model", None, None), ("model@open", "model", "open", None), ("model@closed", "model", "closed", None),
        ("mine=model", "model", None, "mine"), ("mine=model@open", "model", "open", "mine"),
        ("my model=a/b@closed", "a/b", "closed", "my model"), ("model@ajar", "model@ajar", None, None),
        ("a=b=c", "b=c", None, "a"), ("org/name", "org/name", None, None),
    ],
)  # fmt: skip
def test_a_model_as_the_command_line_says_it(tmp_path, monkeypatch, text, path, state, name) -> None:
    monkeypatch.chdir(tmp_path)
    assert Subject.parse(text) == Subject(path, state, name)


@pytest.mark.parametrize("name", ["run@open", "lr=0.1", "x=y@closed"])
def test_a_path_that_exists_is_taken_as_it_is(tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    assert Subject.parse(name) == Subject(name)
    assert Subject.parse(f"{name}@closed") == Subject(name, "closed")
    assert Subject.parse(f"mine={name}@open") == Subject(name, "open", "mine")


# Wrappers


class Wrapper(torch.nn.Module):
    """As DDP keeps a model."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def with_adapter(model: torch.nn.Module):
    """A PeftModel whose LoRA does something."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    return wrapped.eval()


@pytest.mark.parametrize("wrap", [Wrapper, torch.compile, with_adapter])
def test_a_wrapped_model_is_seen_through(wrap) -> None:
    for model, state in ((llama(), None), (copy.deepcopy(memorized_in_sinks()), "closed")):
        subject = Subject(wrap(model), state)
        assert subject.checked_state() == (state or "absent")
        assert subject.config() is model.config
        with subject.loaded() as loaded:
            assert loaded is model
        with pytest.raises(ConfigError, match="state must be one of"):
            Subject(wrap(model), "open" if state is None else None).checked_state()


def test_learned_prompts_are_refused_by_name() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ConfigError, match="learned prompts .* cannot be audited"):
        Subject(model).checked_state()


# The state


def test_the_state_of_a_model_with_sinks_must_be_said(folders) -> None:
    for model in (memorized_in_sinks(), folders["sinks"], str(folders["sinks"])):
        for state in ("open", "closed"):
            assert Subject(model, state).checked_state() == state
        with pytest.raises(ConfigError, match="got None: sinks open and closed are two different models, say which"):
            Subject(model).checked_state()
        with pytest.raises(ConfigError, match="got 'absent'.*say which"):
            Subject(model, "absent").checked_state()


def test_a_model_without_sinks_has_none_to_open(folders) -> None:
    for model in (llama(), Oracle([]), folders["stock"]):
        assert Subject(model).checked_state() == Subject(model, "absent").checked_state() == "absent"
        for state in ("open", "closed", "ajar"):
            with pytest.raises(ConfigError, match=f"got '{state}': sinks are not there"):
                Subject(model, state).checked_state()


# Loading


def test_a_live_model_is_itself_and_has_no_tokenizer() -> None:
    model = llama()
    subject = Subject(model)
    assert subject.path is None
    assert subject.tokenizer() is None
    assert subject.config() is model.config
    with subject.loaded() as loaded:
        assert loaded is model


def test_a_path_is_loaded_with_what_lies_there(folders) -> None:
    stock, sinks = Subject(folders["stock"]), Subject(str(folders["sinks"]), "closed")
    assert stock.path == folders["stock"]
    assert stock.tokenizer().get_vocab() == the_tokenizer().get_vocab()
    assert sinks.tokenizer() is None
    assert stock.config().hidden_size == 32
    for subject, model in ((stock, llama()), (sinks, memorized_in_sinks())):
        with subject.loaded() as loaded:
            assert not loaded.training
            assert loaded is not model
            assert weights_hash(loaded) == weights_hash(model)


def test_a_path_without_a_model_is_said(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="cannot load a model from"):
        Subject(tmp_path / "nothing").config()
    with pytest.raises(CheckpointError, match="cannot load a model from"), Subject(tmp_path / "nothing").loaded():
        pass


# Hashes


def test_the_hash_sees_every_bit() -> None:
    found = {weights_hash(llama()), weights_hash(llama(1)), weights_hash(llama().bfloat16())}
    model = llama()
    before = weights_hash(model)
    assert before in found
    for name, tensor in model.state_dict().items():
        bits = tensor.view(torch.int32).view(-1)
        bits[-1] ^= 1
        found.add(weights_hash(model))
        bits[-1] ^= 1
        assert weights_hash(model) == before, name
    tied = 1
    assert len(found) == 3 + len(model.state_dict()) - tied


def strided(values: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values, laid out in another way."""
    if kind == "columns":
        return values.t().contiguous().t()
    if kind == "every other":
        wide = torch.zeros(*values.shape[:-1], 2 * values.shape[-1])
        wide[..., ::2] = values
        return wide[..., ::2]
    if kind == "part of a longer one":
        return torch.cat([torch.ones_like(values), values])[len(values) :]
    if kind == "negated":
        return torch._neg_view(-values)
    return torch.zeros(64).as_strided(values.shape, (7,) * values.dim()).copy_(values)  # "one value"


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((4, 6), "columns"), ((4, 6), "every other"), ((4, 6), "part of a longer one"), ((4, 6), "negated"),
     ((1, 1), "one value"), ((1,), "one value"), ((1, 6), "columns"), ((6, 1), "every other")],
)  # fmt: skip
def test_the_hash_is_of_the_values_not_of_how_they_lie(shape, kind) -> None:
    model = torch.nn.Module()
    values = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    model.weight = torch.nn.Parameter(values.clone())
    before = weights_hash(model)
    model.weight.data = strided(values, kind)
    assert torch.equal(model.weight.data, values) and weights_hash(model) == before


def test_the_hash_sees_names_and_shapes() -> None:
    a, b, c = (torch.nn.Linear(4, 6, bias=False) for _ in range(3))
    values = torch.arange(24.0)
    a.weight.data, b.weight.data = values.view(6, 4), values.view(4, 6)
    c.other = torch.nn.Parameter(values.view(6, 4))
    del c.weight
    assert len({weights_hash(x) for x in (a, b, c)}) == 3


def test_the_hash_sees_which_sinks_a_document_opens(tmp_path) -> None:
    """Neither the seed of the hash nor the assignment table are weights, but what open sinks say depends on them."""
    model, other = sink_llama(torch.float32, reserved_blocks=2), sink_llama(torch.float32, reserved_blocks=2, seed=1)
    other.load_state_dict(model.state_dict())
    before = weights_hash(model)
    assert weights_hash(other) != before
    assign_blocks(model, {5: [6, 7]})
    assigned = weights_hash(model)
    assert assigned != before
    model.save_pretrained(tmp_path / "assigned")
    assert weights_hash(load(tmp_path / "assigned")) == assigned


def test_facts() -> None:
    model = llama().bfloat16()
    stock = sum(x.numel() for x in model.parameters())
    assert facts(model) == {
        "model_type": "llama", "parameters": stock, "sink_parameters": 0, "device": "cpu", "dtype": "bfloat16",
        "weights_sha256": weights_hash(model),
    }  # fmt: skip
    assert len(weights_hash(model)) == 64
    found = facts(memorized_in_sinks())
    assert (found["parameters"], found["sink_parameters"]) == (stock, 2 * 3 * 64 * 32)
