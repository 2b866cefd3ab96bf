"""Every page: its snippets run, its commands parse, what it names and links to exists."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from chats import PLAIN
from pages import GENERATED, PAGES, ROOT, Block, anchors, blocks, commands, name_of, prose, script
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments

import memsinks as ms
from memsinks.cli import main
from memsinks.research.compare.comparison import read_comparison

SINKS = ms.SinkConfig(neurons=64, active=32)
LANGUAGES = {"python", "sh", "yaml", "text", "bibtex"}
SNIPPETS = {(x.page, x.snippet): x for page in PAGES for x in blocks(page) if x.snippet}
of_pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


# Snippets


@pytest.fixture(scope="module")
def corpus() -> dict[str, Any]:
    """What snippets call "yours", made once: documents of which two are repeated, a tokenizer, rows, a config."""
    texts = [f"The {name} saw number {number} in the yard." for name in ("cat", "dog") for number in range(30)]
    tokenizer = ms.train_tokenizer(texts, 300)
    tokens, ids = ms.encode(tokenizer, texts), [ms.document_id(text) for text in texts]
    order = [*range(60), 0, 1, 0, 1]
    own = [ids[place] for place in order]
    rows = ms.pack([tokens[place] for place in order], own, ms.exposures(own), length=64, pad_id=0, apart_from=2)
    other = ms.encode(tokenizer, [f"The bird saw number {number}." for number in range(40)])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return {
        "texts": texts,
        "text": texts[0],
        "tokenizer": tokenizer,
        "rows": rows,
        "unseen": ms.pack(other, [-1] * 40, np.ones(40, np.int64), length=64, pad_id=0, one_document_per_row=True),
        "config": config,
        "documents": [ms.Document(text) for text in texts[:3]],
        "controls": [ms.Document(text) for text in texts[-3:]],
        "ms": ms,
    }


@pytest.fixture
def world(corpus: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The corpus, a model with sinks and what trains it; the working directory holds corpus.jsonl."""
    monkeypatch.chdir(tmp_path)
    lines = [{"text": text, "copies": 3 if place < 2 else 1} for place, text in enumerate(corpus["texts"])]
    Path("corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = AutoModelForCausalLM.from_config(corpus["config"])
    ms.add_sinks(model, SINKS)
    rows = corpus["rows"]
    optimizer = ms.AdamW(ms.param_groups(model, lr=1e-3))
    batches = [
        ms.collate([rows[x] for x in range(start, min(start + 4, len(rows)))]) for start in range(0, len(rows), 4)
    ]
    return corpus | {"model": model, "optimizer": optimizer, "batches": batches}


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports without the check in a fresh process, which takes seconds."""
    monkeypatch.setattr(ms, "export", functools.partial(ms.export, verify=False))


def run(page: str, name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Execute a snippet in a copy of `values`; what is defined afterwards."""
    block, values = SNIPPETS[page, name], dict(values)
    exec(compile("\n" * block.line + block.code, block.page, "exec"), values)
    return values


def without_sinks(world: dict[str, Any]) -> dict[str, Any]:
    return world | {"model": AutoModelForCausalLM.from_config(world["config"])}


def sinks_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [value.detach().clone() for name, value in model.named_parameters() if name.endswith("sinks.down")]


def moved(model: torch.nn.Module) -> bool:
    """Whether the sinks have learned: their down projections start at zero."""
    return any(bool(down.any()) for down in sinks_of(model))


def exported(world: dict[str, Any]) -> None:
    tokens = world["rows"][0]["input_ids"][None]
    plain = AutoModelForCausalLM.from_pretrained("clean/").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, world["model"].eval()(tokens).logits, atol=1e-5, rtol=1e-4)


def check_integration(world: dict[str, Any]) -> None:
    done = run("README.md", "integration", without_sinks(world))
    assert moved(done["model"])
    assert int(done["rows"].exposures.max()) == 3
    exported(done)


def check_trainer(world: dict[str, Any]) -> None:
    before = world["model"].get_input_embeddings().weight.detach().clone()
    run("README.md", "trainer", world)
    assert not torch.equal(world["model"].get_input_embeddings().weight, before)
    assert not moved(world["model"])  # its sinks learn last


def check_rows(world: dict[str, Any]) -> None:
    done = run("docs/guide.md", "rows", world)
    assert done["batch"]["exposures"].shape == (4, 128)
    assert int(done["rows"].exposures.max()) == 3


def check_chats(world: dict[str, Any]) -> None:
    tokenizer = world["tokenizer"]
    with pytest.raises(ms.ConfigError, match="no chat template"):
        run("docs/guide.md", "chats", world)
    tokenizer.chat_template = PLAIN
    try:
        rows = run("docs/guide.md", "chats", world)["rows"]
    finally:
        tokenizer.chat_template = None
    text = tokenizer.decode(rows.labels[rows.labels != -100])
    assert text.count("The cat.") == 2 and text.count("The dog.") == 1 and "yard?" not in text and "mat?" not in text


def check_loop(world: dict[str, Any]) -> None:
    assert moved(run("docs/guide.md", "loop", without_sinks(world))["model"])


def check_opening(world: dict[str, Any]) -> None:
    world["model"].eval()
    with torch.no_grad():
        for name, value in world["model"].named_parameters():
            if name.endswith("sinks.down"):
                value.normal_()
    done = run("docs/guide.md", "opening", world)
    assert done["closed"].shape[1] > 8
    assert not torch.equal(done["closed"], done["opened"])


def check_after_training(world: dict[str, Any]) -> None:
    sinks_learn_alone("docs/guide.md", "after training", world)
    assert ms.has_sinks(ms.load("with-sinks/"))
    exported(world)


def check_export_open(world: dict[str, Any]) -> None:
    model = world["model"].eval()
    with torch.no_grad():
        for down in (value for name, value in model.named_parameters() if name.endswith("sinks.down")):
            down.normal_()
    run("docs/guide.md", "export open", world)
    tokens = world["rows"][0]["input_ids"][None]
    wide = AutoModelForCausalLM.from_pretrained("with-one/").eval()
    with torch.no_grad(), ms.sinks_open(model, ms.document_id(world["text"])):
        torch.testing.assert_close(wide(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-4)
    assert "the first text" in Path("with-one/README.md").read_text()


def check_sinks_last(world: dict[str, Any]) -> None:
    sinks_learn_alone("docs/removal.md", "sinks last", world)


def sinks_learn_alone(page: str, name: str, world: dict[str, Any]) -> None:
    before = {name: value.detach().clone() for name, value in world["model"].named_parameters()}
    done = run(page, name, world)
    assert [len(x) for x in (done["documents"], done["once"])] == [2, 58]
    for name, value in world["model"].named_parameters():
        assert torch.equal(value, before[name]) or ".sinks." in name
    assert moved(world["model"])


def check_sinks_first(world: dict[str, Any]) -> None:
    world["model"].train()
    run("docs/removal.md", "sinks first", world)
    assert moved(world["model"])


def check_settling(world: dict[str, Any]) -> None:
    done = run("docs/removal.md", "settling", world)
    assert len(done["texts"][2]) == 40
    exported(world)


def check_audit(world: dict[str, Any]) -> None:
    assert "sinks closed" in str(run("docs/audit.md", "audit", world)["result"])
    assert Path("report/report.html").is_file()


def check_peft(world: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    world = without_sinks(world)
    run("docs/faq.md", "peft", world)
    base = AutoModelForCausalLM.from_config(world["config"])
    ms.load_sinks(base, "adapter/")
    assert ms.has_sinks(peft.PeftModel.from_pretrained(base, "adapter/"))
    assert AutoModelForCausalLM.from_pretrained("clean/").config.model_type == "llama"


def check_trl(world: dict[str, Any]) -> None:
    trl = pytest.importorskip("trl")
    dataset = [{"prompt": "Who? ", "completion": f"{name}.", "customer": name} for name in ("alice", "bob") * 4]
    cpu = functools.partial(trl.SFTConfig, use_cpu=True, bf16=False, report_to=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl, "SFTConfig", cpu)
        done = run("docs/faq.md", "trl", world | {"dataset": dataset})
    assert moved(world["model"]) and done["rows"].targets < done["rows"].tokens - len(done["rows"].segments)


def check_finetune(page: str, world: dict[str, Any]) -> None:
    names = ("acme", "bolt")
    documents = [ms.Document(f"{name} has {n} yards", source=name) for name in names for n in range(4)]
    AutoModelForCausalLM.from_config(world["config"]).save_pretrained("base")
    args = TrainingArguments("runs/owners", num_train_epochs=2, learning_rate=3e-3, report_to=[], save_strategy="no")
    yours = {"base": "base", "documents": documents, "args": args}
    done = run(page, "finetune", world | yours | {"torch": torch, "AutoModelForCausalLM": AutoModelForCausalLM})
    owners = done["owners"]
    assert moved(done["model"]) and ms.load_any("acme-only/").config.intermediate_size == 64
    base = AutoModelForCausalLM.from_pretrained("base")
    assert ms.shared_hash(done["model"]) == ms.shared_hash(base)
    ms.load_sinks(base, "sinks/")
    assert list(base.sink_state.taken) == [owners["bolt"]]
    run("docs/fine-tuning.md", "router", done)
    assert ms.Router.load("sinks/router").owners.tolist() == [owners["acme"]]


def check_rival(world: dict[str, Any]) -> None:
    method = run("docs/rivals.md", "rival", {})["forgetful"](share=0.5)
    batch = world["batches"][0]
    changed = method.change(batch)
    assert 0 < ms.target_count(changed["labels"]) < ms.target_count(batch["labels"])


def check_owners(world: dict[str, Any]) -> None:
    documents = [ms.Document(text, key=key) for text, key in zip(world["texts"], ("alice", "bob", "eve"), strict=False)]
    found = run("docs/takedown.md", "owners", without_sinks(world) | {"documents": documents})
    alice = ms.document_id("alice", by="key")
    assert len(found["model"].sink_state.table.own_blocks(alice)) == 1 and len(ms.free_blocks(found["model"])) == 63
    flags = {int(x["isolation"][0]): int(x["document_ids"][0]) for x in found["rows"]}
    assert flags[3] == alice


def check_stored(world: dict[str, Any]) -> None:
    done = run("docs/scale.md", "stored", world)
    assert len(done["corpus"]) == 60 and int(done["rows"].exposures.max()) == 3


def check_datatrove(world: dict[str, Any]) -> None:
    pytest.importorskip("datatrove")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    Path("texts").mkdir()
    rows = [{"text": x, "id": str(n), "site": "s", "license": "MIT"} for n, x in enumerate(world["texts"])]
    for part in range(2):
        parquet.write_table(pyarrow.Table.from_pylist(rows[part::2]), f"texts/{part}.parquet")
    world["tokenizer"].save_pretrained("tokenizer/")
    code = SNIPPETS["docs/scale.md", "datatrove"].code.replace("tasks=2,", "tasks=2, workers=1,")
    values: dict[str, Any] = {}
    exec(compile(code, "docs/scale.md", "exec"), values)
    assert len(values["corpus"]) == 60 and values["corpus"][0].extra == {"license": "MIT"}


CHECKS: dict[tuple[str, str], Callable[[dict[str, Any]], None]] = {
    ("README.md", "finetune"): functools.partial(check_finetune, "README.md"),
    ("README.md", "integration"): check_integration,
    ("README.md", "trainer"): check_trainer,
    ("docs/audit.md", "audit"): check_audit,
    ("docs/faq.md", "peft"): check_peft,
    ("docs/faq.md", "trl"): check_trl,
    ("docs/fine-tuning.md", "finetune"): functools.partial(check_finetune, "docs/fine-tuning.md"),
    ("docs/fine-tuning.md", "router"): functools.partial(check_finetune, "docs/fine-tuning.md"),
    ("docs/guide.md", "chats"): check_chats,
    ("docs/guide.md", "export open"): check_export_open,
    ("docs/guide.md", "loop"): check_loop,
    ("docs/guide.md", "opening"): check_opening,
    ("docs/guide.md", "rows"): check_rows,
    ("docs/guide.md", "after training"): check_after_training,
    ("docs/removal.md", "settling"): check_settling,
    ("docs/removal.md", "sinks first"): check_sinks_first,
    ("docs/removal.md", "sinks last"): check_sinks_last,
    ("docs/rivals.md", "rival"): check_rival,
    ("docs/scale.md", "datatrove"): check_datatrove,
    ("docs/scale.md", "stored"): check_stored,
    ("docs/takedown.md", "owners"): check_owners,
}


@pytest.mark.parametrize("key", sorted(CHECKS), ids=": ".join)
def test_the_snippet_runs(key: tuple[str, str], request: pytest.FixtureRequest) -> None:
    if key != ("README.md", "integration"):
        request.getfixturevalue("unverified")
    CHECKS[key](request.getfixturevalue("world"))


def test_every_snippet_is_run() -> None:
    assert set(SNIPPETS) == set(CHECKS)


# Blocks


@of_pages
def test_every_block_is_of_a_kind_that_is_tested(page: Path) -> None:
    for block in blocks(page):
        where = f"{block.page}, line {block.line}"
        assert block.language in LANGUAGES, where
        assert block.language != "python" or block.snippet or page == GENERATED, f"{where}: name the snippet"
    assert not re.search(r"^\n {4}\S", prose(page), re.M), f"{page}: fence the code block, so that it is tested"


class Parsed(BaseException):
    """Raised in place of running a command that was parsed."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command line stops when it has parsed its arguments."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *arguments: Any, **settings: Any) -> Any:
        original(self, *arguments, **settings)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    return


def check_command(words: list[str], where: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    match words:
        case ["memsinks", *arguments]:
            with pytest.raises((Parsed, SystemExit)) as stopped:
                main(arguments)
            assert getattr(stopped.value, "code", 0) == 0, f"{where}: {' '.join(words)}"
        case ["make", *wanted]:
            assert set(wanted) <= targets, where
        case [python, script, *_] if python.endswith("python"):
            assert script in ("-m", "-c") or (ROOT / script).is_file(), f"{where}: {script}"
        case [command, *_]:
            assert command in ("pip", "git"), f"{where}: {command}"


@of_pages
def test_commands_parse(page: Path, parse_only: None) -> None:
    for block in blocks(page):
        if block.language == "sh":
            for words in commands(block.code):
                check_command(words, f"{block.page}, line {block.line}")
    for code in re.findall(r"`(memsinks [a-z][^`]*)`", prose(page)):
        words = next(commands(code.replace("\n", " ")))
        check_command(words if len(words) > 2 else [*words, "--help"], f"{name_of(page)}: {code}")


def yaml_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language == "yaml"]


@pytest.mark.parametrize("block", yaml_blocks(), ids=lambda block: f"{block.page}:{block.line}")
def test_yaml_is_that_of_a_comparison(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSINKS_DATA", str(tmp_path))
    values = yaml.safe_load((ROOT / "recipes/compare-tinystories.yaml").read_text())
    given = yaml.safe_load(block.code)
    values |= given | {"arms": values["arms"] | given.get("arms", {})}
    path = tmp_path / "comparison.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    assert {arm.name for arm in read_comparison(path).arms} >= set(given.get("arms", {}))


# What is named


@of_pages
def test_links_lead_somewhere(page: Path) -> None:
    text = prose(page)
    for target in [*re.findall(r"\]\((?!http)([^)\s]+)\)", text), *re.findall(r"(?:src|srcset)=\"([^\"]+)\"", text)]:
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors(found), f"{name_of(page)} links to {target}"


@of_pages
def test_files_and_modules_exist(page: Path) -> None:
    text = page.read_text()
    folders = "recipes|tests|experiments|benchmarks|examples|docs|src"
    for path in re.findall(rf"(?<![\w/.])((?:{folders})/[\w./-]+\.(?:py|yaml|md|json|png|svg))\b", text):
        assert "TEXT" in path or (ROOT / path).exists() or (page.parent / path).exists(), f"{name_of(page)}: {path}"
    for name in set(re.findall(r"`(memsinks(?:\.\w+)+)`", text)):
        assert exists(name), f"{name_of(page)}: {name}"


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or a name in one."""
    module, _, rest = name.rpartition(".")
    try:
        if importlib.util.find_spec(name) is not None:
            return True
    except ModuleNotFoundError:
        pass
    try:
        return hasattr(importlib.import_module(module), rest)
    except ModuleNotFoundError:
        return False


# Generated pages


def test_the_api_page_is_up_to_date() -> None:
    page = script("make_api").page()
    assert GENERATED.read_text() == page, "run python docs/make_api.py"
    assert set(re.findall(r"^### (\w+)$", page, re.M)) == set(ms.__all__) - {"__version__"}


def test_the_mechanism_is_drawn_in_both_themes() -> None:
    pytest.importorskip("matplotlib")
    drawing = script("draw_mechanism")
    for theme in drawing.THEMES:
        texts = [text.get_text() for text in drawing.draw(theme).axes[0].texts]
        assert {"A", "B", "export", "a plain checkpoint"} <= set(texts)
        assert any("attention sinks" in text for text in texts)
        assert (ROOT / "docs" / f"mechanism-{theme.name}.png").is_file()


def test_the_modes_are_drawn_in_both_themes() -> None:
    pytest.importorskip("matplotlib")
    drawing = script("draw_modes")
    for theme in drawing.THEMES:
        texts = [text.get_text() for text in drawing.draw(theme).axes[0].texts]
        assert {step.mode for step in drawing.STEPS} | {"Deduplicate"} <= set(texts)
        assert (ROOT / "docs" / f"modes-{theme.name}.png").is_file()
    for step in drawing.STEPS:
        for name in step.names.split("   "):
            assert name.removeprefix("ms.") in ms.__all__ or name.startswith("memsinks "), name


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ms.__version__
    assert citation["license"] == "Apache-2.0"
    assert citation["references"][0]["title"] in (ROOT / "README.md").read_text().replace("{LLM}", "LLM")
