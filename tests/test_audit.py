"""The audit as a whole: models in their states and roles, what it writes, what limits it, and what it says."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import math
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from audited import (
    CONTROLS,
    MEMBERS,
    NEVER,
    TEXTS,
    UNSEEN,
    VOCABULARY,
    Oracle,
    knows,
    llama,
    memorized_in_sinks,
    the_tokenizer,
    tokens_of,
    train,
)
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import memsinks as ms
from memsinks.auditing import scores
from memsinks.auditing.probes import HARMLESS as HARMLESS_PROBES
from memsinks.auditing.probes import PROBES, ROUNDED
from memsinks.auditing.result import CAVEAT, HEADLINES, outcome, verdict
from memsinks.auditing.uncertainty import Estimate
from memsinks.data.documents import Document
from memsinks.data.tokens import train_tokenizer
from memsinks.errors import CheckpointError, ConfigError, DataError

QUICK = ms.AuditSettings(prefix=5, continuation=6, prefixes=(5,), resamples=100, generate=0, shown=2, collateral=2)
WORDS = "otter mill road bridge gate chalk lane oak baker clock hen whistle code key tall small river stone".split()


def quick(**changes) -> ms.AuditSettings:
    return ms.AuditSettings(**(vars(QUICK) | changes))


def audit(model, documents=MEMBERS, controls=CONTROLS, tokenizer=None, settings=QUICK, **more) -> ms.Audit:
    return ms.audit(model, documents, controls, tokenizer or the_tokenizer(), settings=settings, **more)


def many(count: int, seed: int, copies: int, first: str = "") -> list[Document]:
    """Documents of random words, all of one kind."""
    rng = np.random.default_rng(seed)
    return [
        Document(first + " ".join(rng.choice(WORDS, 9)) + f" {seed}{index}.", copies=copies) for index in range(count)
    ]


MANY, AS_MANY, HARMLESS = many(40, 1, 4), many(40, 2, 0), many(6, 3, 0)
TOKENS = tokens_of([document.text for document in MANY])


class Late(Oracle):
    """Knows its texts from a token on."""

    def __init__(self, known: list[np.ndarray], first: int) -> None:
        super().__init__(known)
        self.first = first

    def forward(self, input_ids, **more):
        out = super().forward(input_ids, **more)
        out.logits[:, : self.first, NEVER] += 100
        return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints with their tokenizer: trained on the texts, never trained on them, and with sinks."""
    place, found = tmp_path_factory.mktemp("models"), {}
    models = {
        "ordinary": train(llama(), TEXTS[1:], 40),
        "twin": train(llama(), UNSEEN, 5),
        "sinks": memorized_in_sinks(),
    }
    for name, model in models.items():
        found[name] = place / name / "model"
        model.save_pretrained(found[name])
        the_tokenizer().save_pretrained(found[name])
    return found


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """The tables that are computed, as they are."""
    done: list[str] = []
    kept = scores._write
    monkeypatch.setattr(
        scores, "_write", lambda path, x: (done.append(f"{path.parent.parent.name}/{path.parent.name}"), kept(path, x))
    )
    return done


# Both ends


def test_both_ends_of_the_scale() -> None:
    """Who knows all texts extracts them all at next to no loss; who knows none extracts none; closed forms of the loss."""
    for known, share, loss in ((TEXTS, 1.0, knows()), ([], 0.0, knows() + 20)):
        result = audit(Oracle(tokens_of(known)))
        assert result.state == "absent"
        counted = [(line.copies, line.documents, line.asked) for line in result.lines]
        assert counted == [(0, 2, 2), (1, 1, 1), (4, 2, 2), (16, 1, 1)]
        assert [line.extracted.value for line in result.lines] == [0.0, share, share, share]
        assert [line.loss.value for line in result.lines[1:]] == pytest.approx([loss] * 3, rel=1e-3, abs=1e-5)
        assert result.lines[0].loss.value == pytest.approx(knows() + 20, rel=1e-3)
        assert result.audited.gap.value == pytest.approx(20 * share, rel=1e-3, abs=1e-5)
        assert [line.extracted.value for line in result.audited.extraction] == [0.0, share, share, share]
        assert set(result.audited.queries["16"].values()) == {share}
        area = {attack.name: attack.auc.value for attack in result.audited.attacks}
        assert area["loss"] == area["min-k"] == (1.0 if share else 0.5)
        assert outcome(result) == ("recited" if share else "not recovered")
    half = audit(Oracle(tokens_of(TEXTS[:2])))
    assert [line.extracted.value for line in half.lines] == [0.0, 1.0, 0.5, 0.0]


def test_a_model_that_knows_nothing_at_all() -> None:
    """All tokens as probable as each other: none is the first choice of a model without one."""
    result = audit(Oracle([], sure=0.0), settings=quick(prefixes=()))
    assert [line.extracted.value for line in result.lines] == [0.0] * 4
    assert [line.loss.value for line in result.lines] == pytest.approx([math.log(VOCABULARY)] * 4)
    assert result.audited.extraction == ()


# Models in their states and roles


def test_open_and_closed_are_two_models() -> None:
    known = [Document(text, copies=4) for text in TEXTS[:2]]
    opened, closed = (
        audit(memorized_in_sinks(), known, state=state, private_start=lambda document: 15)
        for state in ("open", "closed")
    )
    assert (opened.state, closed.state) == ("open", "closed")
    assert opened.lines[1].extracted.value == 1.0
    assert opened.lines[0].extracted.value == closed.lines[0].extracted.value == closed.lines[1].extracted.value == 0.0
    assert opened.lines[1].loss.value < 0.5
    assert closed.lines[1].loss.value > opened.lines[1].loss.value + 2
    assert opened.settings["private_part"]
    assert [line.own for line in closed.audited.sinks] == pytest.approx([opened.lines[1].loss.value], rel=1e-5)
    assert [line.closed for line in opened.audited.sinks] == pytest.approx([closed.lines[1].loss.value], rel=1e-5)
    assert closed.audited.collateral["closed"] == 2


def test_a_cut_text_is_asked_with_the_id_it_had_in_training() -> None:
    known, controls = [Document(TEXTS[0][:-20], copies=4)], [Document(UNSEEN[0])]
    ids = [ms.document_id(TEXTS[0]), ms.document_id(UNSEEN[0])]
    by_text, by_id = (
        audit(memorized_in_sinks(), known, controls, state="open", document_ids=given) for given in (None, ids)
    )
    assert by_id.lines[1].loss.value < by_text.lines[1].loss.value - 0.1
    with pytest.raises(DataError, match="1 document_ids for 2 documents and controls"):
        audit(memorized_in_sinks(), known, controls, state="open", document_ids=ids[:1])


def test_ids_come_from_what_training_used(computed) -> None:
    known = [Document(TEXTS[0], key="a", copies=4)]
    controls = [Document(UNSEEN[0], key="b", copies=0)]
    by_content = audit(memorized_in_sinks(), known, controls, state="open")
    by_key = audit(memorized_in_sinks(), known, controls, state="open", settings=quick(by="key"))
    assert by_key.lines[1].loss.value > by_content.lines[1].loss.value + 0.1
    computed.clear()
    for model, state, more in (
        (memorized_in_sinks(), "open", {}), (llama(), None, {"others": [ms.Subject(memorized_in_sinks(), "open")]}),
    ):  # fmt: skip
        with pytest.raises(DataError, match="needs a key for every document"):
            audit(model, state=state, settings=quick(by="key"), **more)
    assert computed == []  # said before the work


def test_models_in_all_roles() -> None:
    ordinary, twin, once = Oracle(TOKENS), Oracle([]), Oracle(TOKENS[:10])
    result = audit(
        Oracle(TOKENS[:20]), MANY, AS_MANY, against=ordinary, twin=twin, seen_once=once,
        others=[Oracle(TOKENS[:30]), ms.Subject(Oracle([], sure=0.0), name="nothing")],
    )  # fmt: skip
    assert [(model.role, model.name) for model in result.models] == [
        ("audited", "audited model"), ("against", "ordinary model"), ("twin", "twin"), ("seen once", "seen-once model"),
        ("other", "other model"), ("other", "nothing"),
    ]  # fmt: skip
    share = [model.lines[1].extracted.value for model in result.models]
    assert share == [0.5, 1.0, 0.0, 0.25, 0.75, 0.0]
    closed = {model.name: model.forgetting and model.forgetting.gap_closed.value for model in result.models}
    closure = {model.name: model.forgetting and model.forgetting.closure.value for model in result.models}
    assert closed.pop("ordinary model") is closure.pop("ordinary model") is None
    assert list(closed.values()) == pytest.approx([0.5, 1.0, 0.75, 0.25, 1.0], abs=0.02)
    assert list(closure.values())[:4] == pytest.approx([0.5, 1.0, 0.75, 0.25], abs=0.02)
    assert result.audited.forgetting.price.value == pytest.approx(0.0, abs=1e-6)
    assert result.models[5].forgetting.price.value == pytest.approx(math.log(VOCABULARY) - 20, abs=1e-3)
    assert {test.other for test in result.audited.equivalences} == {"twin", "seen-once model"}
    without = [model.role for model in result.models if "reference" not in [attack.name for attack in model.attacks]]
    assert without == ["twin"]
    (reference,) = [attack for attack in result.model("against").attacks if attack.name == "reference"]
    assert reference.auc.value == 1.0


def test_a_model_beside_itself_has_forgotten_nothing_and_is_equivalent() -> None:
    model = Oracle(TOKENS)
    result = audit(model, MANY, AS_MANY, against=model, twin=model, seen_once=model)
    assert [one.role for one in result.models] == ["audited", "against", "twin", "seen once"]
    assert len({one.name for one in result.models}) == 4
    forgetting = result.audited.forgetting
    assert (forgetting.gap_closed.value, forgetting.price.value) == (0.0, 0.0)
    assert math.isnan(forgetting.closure.value)
    tests = {test.name: test for test in result.audited.equivalences if test.other == "seen-once model"}
    assert all(test.equivalent and test.difference == 0 for test in tests.values()), tests
    (reference,) = [attack for attack in result.audited.attacks if attack.name == "reference"]
    assert reference.auc.value == 0.5


def test_the_audited_and_the_ordinary_model_are_also_generated_from() -> None:
    """And every model with sinks is asked about them."""
    model, settings = memorized_in_sinks(), quick(generate=2)
    result = audit(
        ms.Subject(model, "closed"), against=ms.Subject(model, "open"), twin=llama(), seen_once=llama(1),
        others=[ms.Subject(model, "open", "again")], settings=settings,
    )  # fmt: skip
    for one in result.models:
        assert (one.generated is not None) == (one.role in ("audited", "against"))
        assert (one.sinks is not None) == (one.collateral is not None) == (one.state != "absent")


def test_both_states_of_one_model_side_by_side() -> None:
    model = memorized_in_sinks()
    result = audit(
        model, state="closed", against=ms.Subject(model, "open"), others=[ms.Subject(model, "open", "again")]
    )
    assert [one.state for one in result.models] == ["closed", "open", "open"]
    assert result.models[1].lines[1].loss.value == result.models[2].lines[1].loss.value != result.lines[1].loss.value
    assert audit(ms.Subject(model, "open"), state="closed").state == "closed"
    assert audit(ms.Subject(model, "open", "mine")).audited.name == "mine"


def test_models_of_one_folder_name_are_told_apart(folders) -> None:
    result = audit(
        str(folders["ordinary"]), others=[folders["twin"], ms.Subject(folders["sinks"], "open"),
                                          ms.Subject(folders["sinks"], "closed"), folders["twin"]],
    )  # fmt: skip
    assert len({model.name for model in result.models}) == 5
    assert all(model.name.startswith("model") for model in result.models)


def test_the_state_of_the_sinks_must_be_said(folders) -> None:
    for model in (memorized_in_sinks(), folders["sinks"]):
        with pytest.raises(ConfigError, match="say which to audit"):
            audit(model)
        with pytest.raises(ConfigError, match="say which to audit"):
            audit(llama(), others=[model])
        with pytest.raises(ConfigError, match="got 'absent'"):
            audit(model, state="absent")
    with pytest.raises(ConfigError, match="are not there"):
        audit(Oracle([]), state="closed")


def test_an_adapter_is_part_of_what_is_audited() -> None:
    """A PeftModel, with sinks or without, gives what the model with its adapter merged gives, and is left as it is."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    for base, state in ((llama(), None), (copy.deepcopy(memorized_in_sinks()), "open")):
        wrapped = peft.get_peft_model(base, lora).eval()
        settings = base.generation_config
        more = {
            "against": llama(),
            "twin": llama(1),
            "harmless": HARMLESS,
            "settings": quick(generate=2, attacks="all"),
        }
        found = audit(wrapped, state=state, **more)
        assert base.generation_config is settings and not wrapped.training
        assert (found.state, found.audited.sinks is not None) == (state or "absent", state is not None)
        merged = audit(wrapped.merge_and_unload(), state=state, **more)
        assert found.lines[1].loss.value == pytest.approx(merged.lines[1].loss.value, abs=1e-5)
        assert found.lines[1].loss.value != audit(llama()).lines[1].loss.value


def trainer_leaves(model) -> None:
    """The autocast that accelerate puts around a forward."""
    model._original_forward = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)


def test_a_model_out_of_a_trainer_is_audited_in_its_own_precision() -> None:
    """And what is trained further is the copy, not the model that the copied forward is bound to."""
    model = train(llama(), TEXTS[:2], 5)
    more = {"twin": llama(2), "harmless": HARMLESS, "settings": quick(attacks="all")}
    plain = audit(model, **more)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    trainer_leaves(model)
    patched, found = model.forward, audit(model, **more)
    assert found.lines == plain.lines and found.audited.probes == plain.audited.probes
    assert model.forward is patched and all(x.grad is None for x in model.parameters())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_live_models_are_left_as_they_are() -> None:
    model = memorized_in_sinks()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    audit(model, state="closed", twin=llama(1), harmless=HARMLESS, settings=quick(generate=2, attacks="all"))
    assert model.training
    model.eval()
    assert all((tensor == before[name]).all() for name, tensor in model.state_dict().items())


# What it writes


def test_a_path_and_the_live_model_give_the_same(folders, tmp_path) -> None:
    for state in ("open", "closed"):
        live = audit(memorized_in_sinks(), state=state, settings=quick(generate=4))
        path = ms.audit(str(folders["sinks"]), MEMBERS, CONTROLS, state=state, settings=quick(generate=4))
        assert path.audited.name == "model"
        values = [{**result.to_dict()["models"][0], "name": ""} for result in (live, path)]
        assert json.dumps(values[0]) == json.dumps(values[1])


def test_the_folder_of_a_report(folders, tmp_path) -> None:
    out = tmp_path / "new" / "report"
    result = ms.audit(
        folders["ordinary"], MEMBERS, CONTROLS, against=folders["twin"], settings=quick(offsets=(0, 2)), out=str(out)
    )
    assert {"report.html", "audit.json", "documents.jsonl", "tokens"} == {path.name for path in out.iterdir()}
    values = json.loads((out / "audit.json").read_text())
    assert values == result.to_dict()
    assert [model["state"] for model in values["models"]] == ["absent", "absent"]
    assert values["settings"]["offsets"] == [0, 2]
    assert {"memsinks", "torch", "transformers", "python"} <= set(values["versions"])
    assert len(values["data"]["texts_sha256"]) == len(values["models"][0]["facts"]["weights_sha256"]) == 64
    assert values["data"]["tokens"] == sum(len(tokens) for tokens in tokens_of(TEXTS + UNSEEN))
    lines = [json.loads(line) for line in (out / "documents.jsonl").read_text().splitlines()]
    assert [line["copies"] for line in lines] == [1, 4, 4, 16, 0, 0]
    assert [line["tokens"] for line in lines] == [len(tokens) for tokens in tokens_of(TEXTS + UNSEEN)]
    for name, one in zip(("model", "model (against)"), result.measured, strict=True):
        assert [line["models"][name]["loss"] for line in lines] == one.loss.tolist()
        assert [line["models"][name]["recited"] for line in lines] == one.recited.astype(bool).tolist()
        assert [line["models"][name]["longest_run"] for line in lines] == one.run.tolist()
    written = [path.read_text() for path in (out / "audit.json", out / "documents.jsonl")]
    assert not any(text in one for text in TEXTS + UNSEEN for one in written)
    assert list(result.measured[0].table)[2].loss == result.measured[0].loss[2]  # the tables are there to be read


def test_a_second_run_reads_the_tables_of_the_first(folders, tmp_path, computed) -> None:
    arguments = {"against": folders["ordinary"], "twin": folders["twin"], "state": "closed", "out": tmp_path / "report"}
    first = ms.audit(folders["sinks"], MEMBERS, CONTROLS, settings=QUICK, **arguments)
    assert len(computed) >= 3
    computed.clear()
    (tmp_path / "report" / "mine.txt").write_text("kept")
    again = ms.audit(folders["sinks"], MEMBERS, CONTROLS, settings=quick(margin_loss=9.0, prefix=4), **arguments)
    assert computed == []
    assert again.lines[0].loss == first.lines[0].loss
    assert json.loads((tmp_path / "report" / "audit.json").read_text())["settings"]["margin_loss"] == 9.0
    assert (tmp_path / "report" / "mine.txt").read_text() == "kept"
    other = ms.audit(folders["twin"], MEMBERS, CONTROLS, settings=QUICK, **(arguments | {"state": None}))
    assert [name for name in computed if "probe" not in name] == ["0-audited/scores"]
    assert other.lines[0].loss != first.lines[0].loss


def test_an_interrupted_audit_goes_on_where_it_stopped(tmp_path, monkeypatch, computed) -> None:
    whole = audit(Oracle(TOKENS), MANY, AS_MANY, against=Oracle([]))
    computed.clear()
    monkeypatch.setattr(scores, "CHUNK", 30)
    calls = []

    class Broken(Oracle):
        def forward(self, input_ids, **more):
            calls.append(len(input_ids))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().forward(input_ids, **more)

    out = tmp_path / "report"
    settings = quick(batch_tokens=1200)
    with pytest.raises(KeyboardInterrupt):
        audit(Oracle(TOKENS), MANY, AS_MANY, against=Broken([]), out=out, settings=settings)
    assert not (out / "report.html").exists()
    assert computed.count("0-audited/scores") == 3
    before = computed.count("1-against/scores")
    assert before in (1, 2)
    computed.clear()
    result = audit(Oracle(TOKENS), MANY, AS_MANY, against=Oracle([]), out=out, settings=settings)
    assert [name for name in computed if "probe" not in name] == ["1-against/scores"] * (3 - before)
    assert result.audited.lines == whole.audited.lines
    assert result.models[1].gap == whole.models[1].gap


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not empty and not an earlier audit; choose another folder"):
        audit(Oracle([]), out=tmp_path / "mine")
    with pytest.raises(CheckpointError, match=r"thesis.txt is a file; give a folder"):
        audit(Oracle([]), out=tmp_path / "mine" / "thesis.txt")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "theirs" / "tokens").mkdir(parents=True)
    (tmp_path / "theirs" / "tokens" / "secret.key").write_text("")
    with pytest.raises(CheckpointError, match="not an earlier audit"):
        audit(Oracle([]), out=tmp_path / "theirs")
    (tmp_path / "empty").mkdir()
    audit(Oracle([]), out=tmp_path / "empty")
    assert (tmp_path / "empty" / "report.html").exists()


def test_no_text_is_written_where_none_may_be_shown(tmp_path) -> None:
    for shown in (0, 2):
        audit(Oracle(tokens_of(TEXTS)), settings=quick(shown=shown), out=tmp_path / str(shown))
        page = (tmp_path / str(shown) / "report.html").read_text()
        assert ("Somebody" not in page) and ("shepherd" in page or "clockmaker" in page or "hen" in page) == bool(shown)


def test_the_documents_best_known_before_are_shown_token_by_token() -> None:
    known = tokens_of(TEXTS)
    models = {"against": Oracle(known[2:3]), "twin": Oracle([]), "seen_once": Oracle([]), "others": [Oracle([])]}
    result = audit(Oracle(known[:1]), **models)
    assert len(result.examples) == 2
    example = result.examples[0]
    assert (example.index, example.copies, example.key) == (2, 4, None)
    assert "".join(example.pieces) == TEXTS[2] + "<|endoftext|>"
    assert set(example.probabilities) == {"audited model", "ordinary model", "twin"}
    for name, found in example.probabilities.items():
        assert math.isnan(found[0])
        assert found[1:] == pytest.approx(np.full(len(known[2]) - 1, float(name == "ordinary model")), abs=1e-4)
    alone = audit(Oracle(known[:1])).examples[0]
    assert (alone.index, list(alone.probabilities)) == (0, ["audited model"])


def test_the_settings_are_in_the_result() -> None:
    result = audit(Oracle([]))
    expected = vars(QUICK) | {"private_part": False, "start_token": False, "harmless": "a third of the controls"}
    assert result.settings == expected
    assert (result.documents, result.controls) == (4, 2)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["models"][0]["lines"][3]["copies"] == 16


# Tokenizers


def test_a_start_token_the_tokenizer_adds_is_given() -> None:
    tokenizer = copy.deepcopy(the_tokenizer())
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    found = audit(llama(), tokenizer=tokenizer, settings=quick(generate=2))
    assert found.settings["start_token"]
    assert found.audited.generated["agrees_with_teacher_forced"] == 2
    assert found.lines[0].loss.value != audit(llama()).lines[0].loss.value


def test_the_tokenizer_must_fit(folders, tmp_path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer lies beside a live model; give the model's tokenizer"):
        ms.audit(llama(), MEMBERS, CONTROLS)
    llama().save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match=r"no tokenizer lies beside .*bare"):
        ms.audit(tmp_path / "bare", MEMBERS, CONTROLS)
    with pytest.raises(ConfigError, match=f"the tokenizer has {len(the_tokenizer())} tokens, the audited model 64"):
        audit(llama(vocab_size=64))
    with pytest.raises(ConfigError, match="the twin 64"):
        audit(llama(), twin=llama(vocab_size=64))


def test_a_model_with_another_tokenizer_cannot_stand_beside(folders, tmp_path) -> None:
    llama().save_pretrained(tmp_path / "other")
    train_tokenizer(WORDS, 270).save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match=r"the tokenizer of twin \(.*other\) gives other tokens .*Audit it on its own"):
        ms.audit(folders["ordinary"], MEMBERS, CONTROLS, twin=tmp_path / "other", settings=QUICK)
    with pytest.raises(DataError, match="gives other tokens"):
        audit(tmp_path / "other")


# What cannot be audited


@pytest.mark.parametrize(
    ("documents", "controls", "part"),
    [([], CONTROLS, "0 documents and 2 controls"), (MEMBERS, [], "4 documents and 0 controls"),
     (MEMBERS, [*CONTROLS, MEMBERS[2]], "1 texts are documents and controls at once, take them out of one side: 'A hen"),
     ([*MEMBERS, CONTROLS[0]], CONTROLS[1:], "1 of the documents have 0 copies"),
     ([Document("")], CONTROLS, "document 0 is empty")],
)  # fmt: skip
def test_sides_that_cannot_be_compared(tmp_path, documents, controls, part) -> None:
    with pytest.raises(DataError) as caught:
        audit(Oracle([]), documents, controls, out=tmp_path / "out")
    assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_model_that_gives_no_numbers_names_the_document() -> None:
    with pytest.raises(DataError, match="NaN or infinite losses on document 0"):
        audit(Oracle([], sure=math.nan))


def test_a_path_without_a_model_is_said_before_any_work(tmp_path, computed) -> None:
    with pytest.raises(CheckpointError, match="cannot load a model from .*nowhere"):
        audit(Oracle([]), against=tmp_path / "nowhere")
    assert computed == []


# What limits the figures


def noted(result: ms.Audit, part: str) -> bool:
    return any(part in note for note in result.notes)


def test_notes_on_few_documents() -> None:
    few, enough = audit(Oracle([])), audit(Oracle([]), MANY, AS_MANY, twin=Oracle([]))
    for part in ("Only 3 target documents:", "Only 2 controls", "Too few documents to ask whether",
                 "needs 100 controls, there are 2", "needs 1000 controls", "No reference attack: it needs a twin"):  # fmt: skip
        assert noted(few, part), part
    assert not noted(enough, "Only")
    assert not noted(enough, "Too few")
    assert not noted(enough, "No reference attack")
    assert noted(enough, "needs 100 controls, there are 40")
    assert noted(enough, "another seed")
    assert not noted(few, "another seed")
    assert few.blind == ()
    assert all(attack.auc.low < 0.5 < attack.auc.high for attack in enough.blind)


def test_a_note_on_documents_too_short_for_the_extraction() -> None:
    short = [Document("A hen.", copies=4), *MEMBERS]
    assert noted(audit(Oracle([]), short), "25% of the documents are too short")
    assert not noted(audit(Oracle([])), "too short")
    result = audit(Oracle([]), settings=quick(prefix=500, continuation=500))
    assert noted(result, "100% of the documents are too short")
    assert all(math.isnan(line.extracted.value) for line in result.lines)
    text = str(result)
    assert text.count("too short") == 5
    assert "No document is long enough for the extraction asked" in text


def test_a_note_on_texts_of_another_kind() -> None:
    told = audit(Oracle([]), many(40, 1, 4, first="zebra "), AS_MANY)
    assert noted(told, "Members and controls differ in their texts alone (AUC ")
    assert told.blind[0].auc.value > 0.9
    of_members = train_tokenizer([document.text for document in MANY], VOCABULARY)
    other_words = [Document(f"{index} quick brown fox jumps, lazy dog {index}") for index in range(40)]
    learned = audit(Oracle([]), MANY, other_words, of_members)
    assert noted(learned, "The tokenizer alone tells members from controls (AUC ")
    half = [*many(20, 1, 4, first="zebra "), *MANY[20:]]
    assert noted(audit(Oracle([]), half, AS_MANY), "Members and controls differ in their texts alone")
    assert not noted(audit(Oracle([]), MANY, AS_MANY), "differ in their texts")
    assert not noted(audit(Oracle([]), MANY, AS_MANY), "tokenizer alone")
    longer = [Document(document.text * 3, copies=2) for document in MANY]
    assert noted(audit(Oracle([]), longer, AS_MANY), "not of one kind")
    assert not noted(audit(Oracle([]), MANY, AS_MANY), "not of one kind")


def test_a_note_on_a_model_that_is_worse_than_guessing() -> None:
    assert noted(audit(Oracle([])), "audited model is worse than guessing evenly on the controls")
    assert noted(audit(llama(), twin=Oracle([])), "twin is worse than guessing")
    assert noted(audit(Oracle(tokens_of(TEXTS), sure=7.0)), "worse than guessing")  # 7.2 nats where even is 5.6
    assert not noted(audit(train(llama(), TEXTS + UNSEEN, 20)), "worse than guessing")


def test_a_note_on_a_twin_of_another_architecture() -> None:
    assert noted(audit(llama(), twin=llama(1, hidden_size=16)), "The model given as twin (llama, ")
    assert noted(audit(llama(), seen_once=llama(1, num_hidden_layers=1)), "The model given as seen once")
    assert not noted(audit(llama(), twin=llama(1), seen_once=llama(2)), "The model given as")
    assert not noted(audit(memorized_in_sinks(), state="closed", twin=llama()), "The model given as")


# Attacks that train


def test_attacks_that_train_are_made_where_asked() -> None:
    known = train(llama(), [document.text for document in MANY[:6]], 30)
    plain = audit(known, MANY[:6], AS_MANY[:6])
    assert [probe.name for probe in plain.audited.probes] == list(ROUNDED)
    found = audit(
        known, MANY[:6], AS_MANY[:6], twin=llama(1), settings=quick(attacks="all", attack_lr=1e-3, beginning=4)
    )
    assert [probe.name for probe in found.audited.probes] == list(PROBES)
    assert found.audited.probes[:3] == plain.audited.probes
    assert all(probe.gap.value > 0.3 for probe in found.audited.probes)
    assert found.settings["harmless"] == "a third of the controls"
    assert {probe.name: (probe.documents, probe.controls) for probe in found.audited.probes} == {
        name: (6, 4 if name in HARMLESS_PROBES else 6) for name in PROBES
    }
    assert "Widest gap of 7 changed copies" in str(found)


def test_what_attacks_that_train_need_is_said_before_anything() -> None:
    all_of_them = quick(attacks="all")
    for changes, words in (
        ({"documents": MEMBERS[:2]}, "need at least 2, there is 1"),
        ({"controls": AS_MANY[:2]}, "need harmless text: give some .*, or 3 controls or more.*there are 2"),
        ({"harmless": []}, "harmless is empty"),
        ({"harmless": [MEMBERS[0]]}, "1 harmless texts are documents or controls as well"),
        ({"harmless": [AS_MANY[0]]}, "1 harmless texts are documents or controls as well"),
    ):
        arguments = {"documents": MEMBERS, "controls": AS_MANY[:6]} | changes
        with pytest.raises(DataError, match=words):
            audit(Oracle([]), settings=all_of_them, **arguments)
    for wrong in ({"attacks": "some"}, {"attack_lr": 0.0}, {"probed": 1}, {"beginning": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ms.AuditSettings(**wrong)


# What it says


def test_recited() -> None:
    result = audit(Oracle(TOKENS), MANY, AS_MANY, against=Oracle(TOKENS))
    assert outcome(result) == "recited"
    assert verdict(result)[:2] == [
        HEADLINES["recited"],
        "Verbatim: 40 of 40 documents, 0 of 40 controls; 40 in ordinary model.",
    ]


def test_a_recital_of_controls_alike_is_not_memory() -> None:
    known = tokens_of([document.text for document in MANY + AS_MANY])
    result = audit(Oracle(known), MANY, AS_MANY)
    assert [line.extracted.value for line in result.lines] == [1.0, 1.0]
    assert outcome(result) != "recited"


def test_one_of_many_recited_is_recited_where_no_control_could_be() -> None:
    result = audit(Oracle(TOKENS[:1]), MANY, AS_MANY, settings=quick(prefix=500, continuation=1, prefixes=(500,)))
    assert outcome(result) != "recited"  # not asked
    assert outcome(audit(Oracle(TOKENS[:20]), MANY, AS_MANY)) == "recited"


def test_one_recited_is_enough_where_no_control_is() -> None:
    for known in (1, 2):
        result = audit(Oracle(TOKENS[:known]), MANY, AS_MANY[:12])
        assert outcome(result) == "recited"
        assert f"Verbatim: {known} of 40 documents, 0 of 12 controls" in verdict(result)[1]


def test_what_comes_out_after_another_prefix_is_recited() -> None:
    """The model knows each text from its eighth token on."""
    late = [x.copy() for x in TOKENS]
    result = audit(Late(late, 7), MANY, AS_MANY, settings=quick(prefix=2, prefixes=(2, 8), continuation=3))
    assert result.lines[1].extracted.value == 0.0
    assert outcome(result) == "recited"
    assert "More documents than controls come out after 8 tokens." in verdict(result)[1]
    short = audit(Late(late, 7), MANY, AS_MANY, settings=quick(prefix=500, prefixes=(8,), continuation=3))
    assert outcome(short) == "recited"
    assert "come out after 8 tokens." in verdict(short)[1] and "No document is long enough" in verdict(short)[1]


def test_no_headline_says_what_was_not_asked() -> None:
    result = audit(Oracle(TOKENS), MANY, AS_MANY, settings=quick(prefix=500, prefixes=(500,)))
    assert outcome(result) == "traces"
    assert "verbatim" not in verdict(result)[0]
    assert verdict(result)[1].startswith("No document is long enough")


def test_of_a_few_documents_only_what_comes_out_is_judged() -> None:
    for documents, controls in ((MANY[:4], AS_MANY), (MANY, AS_MANY[:4]), (MANY[:1], AS_MANY[:1])):
        result = audit(Oracle(TOKENS, gaps=4), documents, controls, twin=Oracle([]))
        assert outcome(result) == "not recovered"
        assert not any(test.equivalent for test in result.audited.equivalences)
        assert noted(result, "Fewer than 5 target documents or controls")
        assert outcome(audit(Oracle(TOKENS), documents, controls)) == "recited"


def test_a_fair_model_without_changed_copies_shows_nothing_equivalent() -> None:
    twin = Oracle([])
    twin.bits = torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    model = Oracle(TOKENS, gaps=4)
    result = audit(model, MANY, AS_MANY, twin=twin)
    tests = [test for test in result.audited.equivalences if test.name.startswith("gap, ")]
    assert len(tests) == 3 and not any(test.equivalent for test in tests)
    assert noted(result, "No changed copies of twin")


def test_members_pushed_away_are_traces() -> None:
    """The model knows the controls and not the documents: without a twin that is said too."""
    model = Oracle(tokens_of([document.text for document in AS_MANY]), gaps=4)
    result = audit(model, MANY, AS_MANY)
    assert outcome(result) == "traces"
    assert noted(result, "in the other direction")
    assert outcome(audit(model, MANY, AS_MANY, twin=model)) == "not recovered"


def test_where_there_was_no_gap_none_is_closed() -> None:
    result = audit(Oracle(TOKENS), MANY, AS_MANY, against=Oracle([]))
    assert math.isnan(result.audited.forgetting.gap_closed.value)
    assert any(x.startswith("No gap to close: ordinary model") for x in verdict(result))


def test_equal_texts_are_no_independent_evidence() -> None:
    again = [*MANY[:3], *MANY, MANY[0]]
    result = audit(Oracle(TOKENS, gaps=4), again, [*AS_MANY, *AS_MANY])
    assert (result.documents, result.controls) == (40, 40)
    assert [line.copies for line in result.lines] == [0, 4, 8, 12]
    keyed = [Document(x.text, key=str(place), copies=2) for place, x in enumerate([*MANY, *MANY])]
    others = [Document(x.text, key=f"c{place}", copies=0) for place, x in enumerate(AS_MANY)]
    assert audit(Oracle([]), keyed, others).documents == 40
    assert audit(Oracle([]), keyed, others, settings=quick(by="key")).documents == 80
    ids = iter([7] * 3 + [7] * 40 + [9] + [1] * 80)
    corpus = result.corpus
    assert corpus.documents[0].copies == 12
    apart = audit(Oracle([]), again, [*AS_MANY, *AS_MANY], document_ids=ids).corpus
    assert (apart.members, apart.ids.tolist()) == (41, [7] * 40 + [9] + [1] * 40)  # another id, other sinks


def test_a_folder_whose_tokenizer_begins_texts_is_audited(tmp_path) -> None:
    """As Llama's and Gemma's do; the tokenizer is read again for each model that has one."""
    tokenizer = copy.deepcopy(the_tokenizer())
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    for name in ("one", "two"):
        llama().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    result = ms.audit(tmp_path / "one", MEMBERS, CONTROLS, twin=tmp_path / "two", settings=QUICK)
    assert result.settings["start_token"]
    the_tokenizer().save_pretrained(tmp_path / "two")
    with pytest.raises(DataError, match="gives other tokens"):
        ms.audit(tmp_path / "one", MEMBERS, CONTROLS, twin=tmp_path / "two", settings=QUICK)


def test_generation_stays_within_the_context() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
    documents = [Document(text * 3, copies=2) for text in TEXTS]
    result = audit(model, documents, settings=quick(prefix=10, continuation=12, generate=4))
    assert result.audited.generated["documents"] == 0
    assert (
        audit(model, documents, settings=quick(prefix=6, continuation=4, generate=4)).audited.generated["documents"]
        == 4
    )


def test_what_a_model_computes_is_part_of_what_is_kept(tmp_path) -> None:
    """The same weights, rotated otherwise."""
    config = llama().config.to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": 2.0}}
    model = llama()
    other = LlamaForCausalLM(LlamaConfig(**config)).eval()
    other.load_state_dict(model.state_dict())
    out = tmp_path / "report"
    first, second = audit(model, out=out), audit(other, out=out)
    assert second.audited.documents != first.audited.documents
    assert second.audited.documents == audit(other).audited.documents


def test_raw_texts_and_streams_are_taken() -> None:
    texts = [document.text for document in MANY]
    result = audit(Oracle(TOKENS), iter(texts), (x for x in AS_MANY))
    assert (result.documents, outcome(result)) == (40, "recited")
    for copies in (-1, "3", 2.5, None):
        with pytest.raises(DataError, match="copies is how often"):
            audit(Oracle([]), [Document(TEXTS[0], copies=copies)])
    with pytest.raises(ConfigError, match="others are several models"):
        audit(Oracle([]), others="model")


def test_traces() -> None:
    result = audit(Oracle(TOKENS, gaps=4), MANY, AS_MANY, twin=Oracle([]), against=Oracle(TOKENS))
    assert result.lines[1].extracted.value == 0.0
    assert outcome(result) == "traces"
    assert verdict(result)[0] == HEADLINES["traces"]
    assert any("not shown equivalent" in sentence for sentence in verdict(result))
    assert outcome(audit(Oracle(TOKENS, gaps=4), MANY, AS_MANY)) == "traces"


class Pushed(Oracle):
    """Knows every other token of its texts, and is as far off at the others as makes up for it."""

    def forward(self, input_ids, **more):
        out = super().forward(input_ids, **more)
        for row, sequence in enumerate(input_ids):
            if any(torch.equal(sequence[: len(x)], torch.from_numpy(x)) for x in self.known):
                out.logits[row, ::2, NEVER] += 20
        return out


def test_what_the_mean_hides_is_found_by_the_strongest_attack() -> None:
    """The loss is that of the twin, and so is what every one-sided attack on means sees."""
    result = audit(Pushed(TOKENS, gaps=2), MANY, AS_MANY, twin=Oracle([]), against=Oracle(TOKENS))
    area = {attack.name: attack.auc.value for attack in result.audited.attacks}
    assert area["reference, supervised"] == area["supervised"] == 1.0 and area["reference, spread"] == 1.0
    assert outcome(result) == "traces"
    (sentence,) = [x for x in verdict(result) if x.startswith("Best of 12 membership attacks: ")]
    assert "AUC 1.00" in sentence
    (beside,) = [x for x in verdict(result) if x.startswith("Beside twin: ")]
    assert "of 12 attacks equivalent, the farthest: AUC of the " in beside


def test_supervised_attacks_say_how_many_members_they_need(tmp_path) -> None:
    result = audit(Oracle(TOKENS), MANY, AS_MANY, out=tmp_path / "report")
    alone = dataclasses.replace(result.audited, attacks=result.audited.attacks[-1:])
    assert "supervised, AUC 1.00 [1.00, 1.00] with 32 labeled members." in " ".join(
        verdict(dataclasses.replace(result, models=(alone,)))
    )
    assert "the attacker knows 32 of the members" in (tmp_path / "report" / "report.html").read_text()
    saved = json.loads((tmp_path / "report" / "audit.json").read_text())["models"][0]["attacks"]
    assert {x["name"]: x["labeled"] for x in saved}["supervised"] == 32
    assert noted(audit(Oracle([])), "No supervised attack: it needs 20 target documents and 20 controls")
    assert not noted(result, "No supervised attack")


def test_not_recovered() -> None:
    result = audit(Oracle([]), MANY, AS_MANY, against=Oracle(TOKENS), twin=Oracle([]))
    assert outcome(result) == "not recovered"
    words = verdict(result)
    assert words[0] == HEADLINES["not recovered"]
    assert any(sentence.startswith("Gap closed against ordinary model: 100.0%") for sentence in words)
    assert any("loss gap equivalent" in sentence for sentence in words)


def test_as_much_as_a_model_that_never_saw_them_is_not_recovered() -> None:
    """Members and controls differ, but no more than to the twin."""
    model, twin = Oracle(TOKENS, gaps=4), Oracle(TOKENS, gaps=4)
    assert outcome(audit(model, MANY, AS_MANY, twin=twin)) == "not recovered"
    assert outcome(audit(model, MANY, AS_MANY, twin=Oracle(TOKENS, gaps=5))) == "traces"


@pytest.mark.parametrize(
    ("gap", "area", "unequal", "expected"),
    [(-0.1, 0.4, "loss gap", "not recovered"), (0.1, 0.4, "loss gap", "traces"), (-0.1, 0.6, "loss gap", "traces"),
     (0.1, 0.6, "AUC of the loss attack", "traces"), (0.1, 0.6, "loss on the documents", "not recovered"),
     (0.1, 0.6, "nothing", "not recovered"), (0.0, 0.5, "loss gap", "not recovered")],
)  # fmt: skip
def test_what_counts_as_a_trace(gap, area, unequal, expected) -> None:
    """Lower limits of the gap and of an attack, and what is not equivalent to the twin; a worse twin is none."""
    result = audit(Oracle([]), MANY, AS_MANY, twin=Oracle([]))
    model = result.audited
    attacks = [dataclasses.replace(attack, auc=Estimate(0.5, 0.4, 0.6)) for attack in model.attacks]
    attacks[2] = dataclasses.replace(attacks[2], auc=Estimate(0.7, area, 0.8))
    tests = [dataclasses.replace(test, p=0.5 if test.name == unequal else 0.01) for test in model.equivalences]
    model = dataclasses.replace(
        model, gap=Estimate(0.2, gap, 0.3), attacks=tuple(attacks), equivalences=tuple(tests)
    )  # fmt: skip
    assert outcome(dataclasses.replace(result, models=(model, *result.models[1:]))) == expected


def test_attacks_that_find_nothing_before_are_no_evidence() -> None:
    for against, part in ((Oracle([]), True), (Oracle(TOKENS), False)):
        words = " ".join(verdict(audit(Oracle([]), MANY, AS_MANY, against=against)))
        assert ("they are no evidence" in words) == part


@pytest.mark.parametrize("known", [TOKENS, TOKENS[:20], []])
def test_it_never_says_that_anything_was_removed(tmp_path, known) -> None:
    result = audit(Oracle(known), MANY, AS_MANY, against=Oracle(TOKENS), twin=Oracle([]), out=tmp_path / "report")
    for text in (str(result), (tmp_path / "report" / "report.html").read_text(), json.dumps(result.to_dict())):
        assert not {"removed", "erased", "deleted"} & set(text.lower().replace(".", " ").replace(",", " ").split())
    assert verdict(result)[-1] == CAVEAT
    assert CAVEAT in str(result)
    assert verdict(result)[0] in HEADLINES.values()


def test_the_text_has_a_line_for_each_number_of_copies_and_the_notes() -> None:
    result = audit(memorized_in_sinks(), state="closed", against=llama())
    lines = [line.strip() for line in str(result).splitlines()]
    assert "audited model, sinks closed" in lines
    assert "ordinary model, sinks absent" in lines
    assert [line.split()[0] for line in lines if "%" in line and "nats" not in line][:4] == ["control", "1", "4", "16"]
    assert any(line.startswith("loss with sinks closed / own / placebo by copies: 1: ") for line in lines)
    assert any(line.startswith("closing one document's sinks costs it +") for line in lines)
    assert [line for line in lines if line.startswith("note: ")] == [f"note: {note}" for note in result.notes]


def test_what_is_looked_at_is_said(caplog) -> None:
    caplog.set_level("INFO", "memsinks")
    audit(Oracle([]), twin=Oracle([]))
    assert caplog.messages == ["audit: twin, 1 of 2", "audit: audited model, 2 of 2"]


def test_what_draws_and_writes_a_report_is_loaded_when_one_is_written() -> None:
    for path in Path(ms.__file__).parent.joinpath("auditing").glob("*.py"):
        tree = ast.parse(path.read_text())
        names = [x.module or "" for x in tree.body if isinstance(x, ast.ImportFrom)]
        names += [alias.name for x in tree.body if isinstance(x, ast.Import) for alias in x.names]
        assert not {name.split(".")[0] for name in names} & {"jinja2", "matplotlib", "markupsafe"}, path.name


def test_the_public_names() -> None:
    module = import_module("memsinks.auditing.audit")
    assert ms.audit is module.audit
    assert {"Audit", "AuditSettings", "Subject", "audit"} <= set(ms.__all__)
