"""What would train in silence with closed sinks, or in the wrong order, raises in the first forward."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from tiny import VOCABULARY, A, B, batch, sink_llama, tiny_llama, tokens
from torch.nn.functional import cross_entropy

import memsinks as ms
from memsinks.sinks.state import sink_parameters

# Entering past the model's own forward


def backbone(model) -> torch.Tensor:
    return model.lm_head(model.model(input_ids=tokens(2, 5)).last_hidden_state)


def backbone_with_ids(model) -> torch.Tensor:
    marks = {name: batch()[name] for name in ("document_ids", "exposures")}
    return model.lm_head(model.model(input_ids=tokens(2, 5), **marks).last_hidden_state)


def layer_by_layer(call):
    def run(model) -> torch.Tensor:
        x = model.model.embed_tokens(tokens(2, 5))
        places = torch.arange(5)[None]
        angles = model.model.rotary_emb(x, position_ids=places)
        for layer in model.model.layers:
            x = call(layer)(x, position_embeddings=angles, position_ids=places)
        return model.lm_head(model.model.norm(x))

    return run


def mlp_alone(model) -> torch.Tensor:
    return model.model.layers[0].mlp(torch.zeros(1, 2, 16, dtype=model.dtype))


def own_forward(model) -> torch.Tensor:
    model.forward = lambda input_ids, **_: backbone(model)
    return model(**batch())


ROUNDABOUT = {
    "backbone": backbone, "backbone with ids": backbone_with_ids, "layers": layer_by_layer(lambda layer: layer),
    "layers' forward": layer_by_layer(lambda layer: layer.forward), "an MLP": mlp_alone, "a forward of its own": own_forward,
}  # fmt: skip


@pytest.mark.parametrize("shared", ["decay", "none"])
@pytest.mark.parametrize("way", ROUNDABOUT)
def test_training_past_the_forward_of_the_model_is_refused(way, shared) -> None:
    model = sink_llama(shared=shared)
    with pytest.raises(ms.ArchitectureError, match="without the forward of the whole model"):
        ROUNDABOUT[way](model)
    model.eval()
    ROUNDABOUT[way](model)


def test_checkpointed_layers_do_not_go_past_it() -> None:
    for reentrant in (False, True):
        model = sink_llama()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch()).loss.backward()
        assert all(parameter.grad is not None for parameter in sink_parameters(model))


# Evaluation mode


def test_training_in_evaluation_mode_is_refused() -> None:
    model = sink_llama().eval()
    with pytest.raises(ms.ConfigError, match=r"evaluation mode.*call model\.train\(\)"):
        model(**batch())
    with torch.no_grad():
        evaluated = model(**batch()).loss
    assert torch.equal(model(**batch(document_ids=None, exposures=None)).loss, evaluated)
    model.train()
    model(**batch()).loss.backward()
    assert all(bool(parameter.grad.any()) for parameter in sink_parameters(model))


# The order of the rows


def place(order: int, *rows: int) -> torch.Tensor:
    return torch.tensor([(order << 32) + row for row in rows])


def test_rows_that_come_back_are_refused() -> None:
    model = sink_llama()
    for rows in ((0, 1), (2, 3), (2, 3), (6, 7)):  # a step that is tried again, rows of other ranks between
        model(**batch(places=place(5, *rows)))
    for rows in ((0, 1), (4, 9)):
        with pytest.raises(ms.DataError, match=rf"row {rows[0]} of the training order is met after row 6"):
            model(**batch(places=place(5, *rows)))
    model(**batch(places=place(4, 0, 1)))  # another training order
    model(**batch())  # no places: no check
    model.eval()
    with torch.no_grad():
        model(**batch(places=place(4, 0, 1)))


def test_where_exposures_do_not_matter_rows_may_come_in_any_order() -> None:
    model = sink_llama(open_from=1, shared_decay=0.0)
    for row in (5, 0, 5):
        model(**batch(places=place(1, row, row + 1)))


def test_places_are_int64_one_a_row() -> None:
    model = sink_llama()
    for places, what in ((place(1, 2), r"shape \[2\], got \[1\]"), (torch.tensor([1.0, 2.0]), "must be int64")):
        with pytest.raises(ms.DataError, match=what):
            model(**batch(places=places))


# Rows that train only sinks, without labels


def test_padding_is_no_text_without_labels() -> None:
    model = sink_llama(shared="none")
    marks = {
        "document_ids": torch.tensor([[A, A, A, -1, -1], [B, B, B, B, B]]),
        "exposures": torch.tensor([[2, 2, 2, 1, 1], [1, 1, 1, 1, 1]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]),
    }
    labels = tokens(2, 5).masked_fill(marks["document_ids"] == -1, -100)
    want = model(**batch(**marks, labels=labels)).logits
    assert torch.equal(model(**batch(**marks, labels=None)).logits, want)
    mixed = {"document_ids": torch.tensor([[A, A, A, B, B]] * 2), "exposures": torch.tensor([[2, 2, 2, 1, 1]] * 2)}
    with pytest.raises(ms.DataError, match="row 0 mixes both"):
        model(**batch(**mixed, position_ids=marks["position_ids"][:1].repeat(2, 1), labels=None))


# Threads


def test_each_thread_has_its_own_open_sinks() -> None:
    model = sink_llama(torch.float32).eval()
    want = {}
    for one in (None, A, B):
        with torch.no_grad(), ms.sinks_open(model, -1 if one is None else one):
            want[one] = model(input_ids=tokens(1, 5)).logits
    wrong: list[object] = []
    start = threading.Barrier(3)

    def serve(one: int | None) -> None:
        start.wait()
        for _ in range(30):
            with torch.no_grad():
                if one is None:
                    got = model(input_ids=tokens(1, 5)).logits
                else:
                    with ms.sinks_open(model, [one]):
                        got = model(input_ids=tokens(1, 5)).logits
            if not torch.equal(got, want[one]):
                wrong.append(one)

    threads = [threading.Thread(target=serve, args=(one,)) for one in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert model.sink_state.opened.get() is None
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens(1, 5)).logits, want[None])


def test_copies_start_closed() -> None:
    model = sink_llama().eval()
    with ms.sinks_open(model, A):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.sink_state.opened.get() is None
            assert other.sink_state is not model.sink_state
        assert model.sink_state.opened.get() is not None


# Seams


def test_a_weight_rule_takes_the_place_of_the_decay() -> None:
    model = sink_llama(shared_decay=0.0)
    seen = []

    def half(config: ms.SinkConfig, exposures: torch.Tensor, opened: torch.Tensor) -> torch.Tensor:
        seen.append(opened)
        return torch.full_like(exposures, 0.5, dtype=torch.float64)

    model(**batch()).loss.backward()
    whole = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    sinks = [parameter.grad.clone() for parameter in sink_parameters(model)]
    model.zero_grad()
    model.sink_state.weight_rule = half
    model(**batch()).loss.backward()
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, whole / 2)
    for parameter, gradient in zip(sink_parameters(model), sinks, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert seen[0].tolist() == [[A] * 5, [B] * 5]


def test_the_compute_path_can_be_chosen() -> None:
    model = sink_llama(torch.float32, neurons=64, active=16, block_size=8).eval()
    found = []
    for path in (None, "masked", "tiled", "grouped"):
        model.sink_state.path = path
        with torch.no_grad(), ms.sinks_open(model, A):
            found.append(model(input_ids=tokens(2, 5)).logits)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


# Models that cannot, or can


def test_quantized_weights_are_refused_and_dequantized_ones_saved_as_what_they_are(tmp_path) -> None:
    model = tiny_llama(torch.float32)
    model.hf_quantizer = object()
    model.is_quantized = True
    model.config.quantization_config = {"quant_method": "gguf"}
    ms.add_sinks(model, ms.SinkConfig(neurons=64, active=16, block_size=8))
    model.save_pretrained(tmp_path / "model")
    assert "quantization_config" not in (tmp_path / "model" / "config.json").read_text()
    ms.load(tmp_path / "model")
    ms.export(model, tmp_path / "clean", verify=False)
    assert "quantization_config" not in (tmp_path / "clean" / "config.json").read_text()

    for dtype in (torch.int8, torch.float8_e4m3fn):
        quantized = tiny_llama(torch.float32)
        weight = quantized.model.layers[0].mlp.up_proj.weight.data.to(dtype)
        quantized.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
        with pytest.raises(ms.ArchitectureError, match=rf"models quantized by {dtype} are not supported"):
            ms.add_sinks(quantized, ms.SinkConfig(neurons=64, active=16, block_size=8))


def test_the_report_says_that_it_is_no_model() -> None:
    report = ms.add_sinks(tiny_llama(), ms.SinkConfig(neurons=64, active=16, block_size=8))
    assert isinstance(report, ms.Added)
    for use in (
        lambda: report(input_ids=tokens(1, 2)),
        lambda: report.train(),
        lambda: report.parameters(),
        lambda: report.to("cpu"),
    ):
        with pytest.raises((TypeError, AttributeError), match="changes the model in place and returns a report"):
            use()
    assert not hasattr(report, "no_such_thing")
    assert pickle.loads(pickle.dumps(report)) == copy.deepcopy(report) == report


def test_a_backbone_with_its_own_loss_trains_through_the_models_forward() -> None:
    """The road of TRL's compute_loss_func: logits from the model, a loss of one's own."""
    model = sink_llama()
    given = batch()
    labels = given.pop("labels")
    logits = model(**given).logits
    cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1)).backward()
    assert all(bool(parameter.grad.any()) for parameter in sink_parameters(model))
