"""Compare: arms x seeds on one corpus, resumable; the table and the JSON say what was run."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from memsinks.cli import main
from memsinks.errors import CheckpointError, ConfigError
from memsinks.research.compare import compare as module
from memsinks.research.compare.compare import compare, describe_plan, prepare_data, time_steps, train_arm
from memsinks.research.compare.comparison import read_comparison
from memsinks.research.compare.results import data_sources
from memsinks.research.compare.table import spread

ROOT = Path(__file__).parents[1]
SMALL = {
    "data": {
        "synthetic": {"stories": 40, "people_per_level": 2, "canaries_per_level": 0, "held_out_stories": 8, "near_copies": 0,
                      "copies": [0, 1]},
        "repeat": {"documents": 9, "copies": [1, 4, 8]}, "long": "truncate",
    },
    "tokenizer": {"vocab_size": 300},
    "model": {"config": {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    }},
    "training": {"length": 64, "batch_rows": 8, "lr": 5e-3, "log_every": 5},
    "seeds": [0, 1],
    "roles": {"audited": "ours", "against": "standard", "twin": "twin", "seen_once": "dedup"},
    "arms": {
        "standard": {"rival": "standard"}, "twin": {"rival": "twin"}, "dedup": {"rival": "cap", "copies": 1},
        "ours": {"rival": "gated", "neurons": 64, "active": 16, "block_size": 8},
        "exact": {"rival": "gated", "neurons": 64, "active": 16, "block_size": 8, "shared": "none"},
        "published": {"rival": "published", "neurons": 64, "active": 16},
        "masking": {"rival": "gradient-masking", "extra_neurons": 8},
        "sgtm": {"rival": "sgtm", "extra_neurons": 8, "heads": 2},
        "goldfish": {"rival": "goldfish"},
    },
}  # fmt: skip


def written(folder: Path, **changes) -> Path:
    values = copy.deepcopy(SMALL) | {"output": str(folder / "out")} | changes
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(file, result) of the small comparison, one seed."""
    path = written(tmp_path_factory.mktemp("compare"))
    result = compare(read_comparison(path), seeds=[0])
    assert result is not None
    return path, result


def test_every_arm_is_in_the_table(done) -> None:
    path, result = done
    names = [row["name"] for row in result["rows"]]
    rescaled = ["published, rescale expected", "published, rescale released"]
    arms = list(SMALL["arms"])
    assert names == [*arms[:6], *rescaled, *arms[6:]]
    out = path.parent / "out"
    lines = (out / "table.md").read_text().splitlines()
    assert len(lines) == len(names) + 2 and len({line.count("|") for line in lines}) == 1
    assert json.loads((out / "compare.json").read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "seed-0" / "report" / "report.html").is_file()


def test_the_ends_of_the_scales(done) -> None:
    rows = {row["name"]: row for row in done[1]["rows"]}
    assert rows["standard"]["gap_closed"] == rows["standard"]["closure"] == rows["standard"]["price"] == [0.0]
    assert rows["twin"]["closure"] == [1.0]
    assert rows["ours"]["own"][0] is not None and rows["standard"]["own"] == [None]


def test_the_strongest_attacks_are_in_the_table(done) -> None:
    rows = {row["name"]: row for row in done[1]["rows"]}
    values = json.loads((done[0].parent / "out" / "seed-0" / "report" / "audit.json").read_text())
    for model in values["models"]:
        area = {attack["name"]: attack["auc"]["value"] for attack in model["attacks"]}
        with_twin = [value for name, value in area.items() if name.startswith("reference")]
        assert rows[model["name"]]["attack_alone"] == [max(x for y, x in area.items() if not y.startswith("reference"))]
        assert rows[model["name"]]["attack_with_twin"] == [max(with_twin, default=None)]
    assert rows["twin"]["attack_with_twin"] == [None] and rows["standard"]["attack_with_twin"] != [None]


def test_the_exact_mode_leaves_what_deduplication_leaves(done) -> None:
    """Its shared weights learn from the first exposure alone, with the same divisor."""
    rows = {row["name"]: row for row in done[1]["rows"]}
    for column in ("gap_closed", "closure", "price"):
        assert rows["exact"][column] == pytest.approx(rows["dedup"][column], abs=1e-4)


def test_texts_are_audited_as_far_as_they_were_trained_on(done) -> None:
    lines = (done[0].parent / "out" / "seed-0" / "report" / "documents.jsonl").read_text().splitlines()
    tokens = [json.loads(line)["tokens"] for line in lines]
    assert max(tokens) <= 65 and tokens.count(64) > len(tokens) / 2  # cut again, a text may need one token more


def test_costs_are_said(done) -> None:
    rows = {row["name"]: row for row in done[1]["rows"]}
    stock = rows["standard"]["parameters"]
    assert stock["training"] == stock["open"] == stock["exported"]
    for name in ("ours", "published", "masking", "sgtm"):
        found = rows[name]["parameters"]
        assert found["exported"] == stock["exported"] < found["open"] <= found["training"]
    assert rows["ours"]["parameters"]["open"] < rows["ours"]["parameters"]["training"]
    assert all(run["versions"]["torch"] == torch.__version__ and run["curve"] for run in done[1]["runs"])
    assert done[1]["compute_seconds"] == round(sum(run["seconds"] for run in done[1]["runs"]))


def test_all_arms_see_the_same_documents(done) -> None:
    folders = [done[0].parent / "out" / "seed-0" / arm for arm in SMALL["arms"]]
    for name in ("documents.jsonl", "controls.jsonl"):
        assert len({(folder / name).read_text() for folder in folders}) == 1
    copies = [json.loads(x)["copies"] for x in (folders[0] / "documents.jsonl").read_text().splitlines()]
    assert sorted(copies) == [1, 1, 1, 4, 4, 4, 8, 8, 8]
    for folder in folders:
        assert AutoModelForCausalLM.from_pretrained(folder / "model").config.intermediate_size == 32


def test_finished_runs_are_kept_and_cut_off_ones_made_again(done, monkeypatch) -> None:
    path, _ = done
    made = []
    monkeypatch.setattr(module, "train_arm", lambda comparison, arm, seed: made.append((arm.name, seed)))
    again = compare(read_comparison(path), seeds=[0])
    assert made == [] and again is not None and again["seeds"] == [0]
    out = path.parent / "out"
    for name in ("seed-0/goldfish/run.json", "compare.json"):
        (out / name).rename(path.parent / Path(name).name)
    compare(read_comparison(path), seeds=[0], audits=False)
    for name in ("seed-0/goldfish/run.json", "compare.json"):
        (path.parent / Path(name).name).rename(out / name)
    assert made == [("goldfish", 0)]


def test_what_is_reported_stays_when_the_models_are_gone(done, tmp_path, monkeypatch, caplog) -> None:
    (tmp_path / "out").mkdir()
    report = json.loads((done[0].parent / "out" / "compare.json").read_text())
    report["rows"] = [row | {"seeds": [1]} for row in report["rows"]]
    report |= {
        "seeds": [1],
        "runs": [run | {"seed": 1} for run in report["runs"]],
        "audits": {"1": report["audits"]["0"]},
    }
    (tmp_path / "out" / "compare.json").write_text(json.dumps(report))
    comparison = read_comparison(written(tmp_path))
    for arm in comparison.arms:
        (comparison.folder(arm, 0)).parent.mkdir(exist_ok=True)
        comparison.folder(arm, 0).symlink_to(done[0].parent / "out" / "seed-0" / arm.slug)
    monkeypatch.setattr(module, "train_arm", lambda *_: pytest.fail("nothing is missing"))
    with caplog.at_level("INFO", "memsinks"):
        merged = compare(comparison)
    assert any(f"seed 1: the models of {', '.join(SMALL['arms'])} are gone" in line for line in caplog.messages)
    assert merged is not None and merged["seeds"] == [0, 1] and set(merged["audits"]) == {"0", "1"}
    for row, one in zip(merged["rows"], done[1]["rows"], strict=True):
        assert row["seeds"] == [0, 1] and row["price"] == pytest.approx([one["price"][0]] * 2)
    assert len(merged["runs"]) == 2 * len(done[1]["runs"])


def test_a_report_of_another_arm_or_role_is_not_mixed_with_this_one(done, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(done[0].parent / "out" / "compare.json", out)
    arms = SMALL["arms"] | {"goldfish": {"rival": "goldfish", "k": 3}}
    with pytest.raises(
        CheckpointError, match="reports arm 'goldfish' with {}, asked for is {'k': 3}; give it another name"
    ):
        compare(read_comparison(written(tmp_path, arms=arms)), arms=["goldfish"], seeds=[0])
    roles = SMALL.get("roles", {}) | {"against": "goldfish"}
    with pytest.raises(CheckpointError, match="measured with the roles"):
        compare(read_comparison(written(tmp_path, roles=roles)), seeds=[0])


def test_reserved_heads_of_groups_are_refused(tmp_path) -> None:
    config = SMALL["model"]["config"] | {"num_attention_heads": 4, "num_key_value_heads": 2}
    with pytest.raises(ConfigError, match="as many key-value heads as query heads, got 2 and 4"):
        read_comparison(written(tmp_path, model={"config": config}))


def test_pictures_that_cannot_be_drawn_are_said_before_training(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "train_arm", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr("memsinks.auditing.pictures.importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="needs matplotlib"):
        compare(read_comparison(written(tmp_path)), seeds=[0])


def test_step_times_are_added_to_the_table(done, tmp_path) -> None:
    path = written(tmp_path)
    with pytest.raises(ConfigError, match="run the comparison first"):
        time_steps(read_comparison(path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compare.json").write_text((done[0].parent / "out" / "compare.json").read_text())
    result = time_steps(read_comparison(path), turns=2)
    assert result["rows"] == json.loads(json.dumps(done[1]["rows"]))
    assert result["step_times"]["ratios"].keys() == SMALL["arms"].keys()
    assert result["step_times"]["ratios"]["standard"] == 1.0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| 1.00x |" in next(line for line in table.splitlines() if line.startswith("| standard"))


def test_runs_and_reports_of_other_settings_are_refused(done, tmp_path) -> None:
    other = read_comparison(
        written(tmp_path, output=str(done[0].parent / "out"), training=SMALL["training"] | {"lr": 1e-3})
    )
    with pytest.raises(CheckpointError, match=r"recipe\.training\.lr 0\.005 \(now 0\.001\); choose another output"):
        other.finished(other.arms[0], 0)
    with pytest.raises(
        CheckpointError, match=r"compare\.json was made with other settings: training\.lr 0\.005 \(now 0\.001\)"
    ):
        compare(other, arms=["standard"], seeds=[0])


def test_files_from_before_settings_were_renamed_are_taken(done, tmp_path, monkeypatch) -> None:
    """Runs and reports without a setting that was added later, or with a name it had before, count as finished."""
    out = tmp_path / "out"
    shutil.copytree(done[0].parent / "out", out, ignore=shutil.ignore_patterns("*.safetensors", "data", "report"))
    settings = [*out.glob("seed-0/*/settings.json"), out / "compare.json"]
    for path in settings:
        values = json.loads(path.read_text())
        data = values["recipe"]["data"]
        data["identity"] = data.pop("by")
        del data["unseen"], values["recipe"]["training"]["sinks_first"], values["recipe"]["settle"]
        for entry in [values, *values.get("runs", [])]:
            if "extra_neurons" in entry.get("settings", {}):
                entry["settings"]["width"] = entry["settings"].pop("extra_neurons")
        if values.get("method", {}).get("sinks"):
            values["method"]["sinks"]["host_width"] = values["method"]["sinks"].pop("intermediate_size")
            values["method"]["sinks"]["format_version"] = 1
        path.write_text(json.dumps(values))
    monkeypatch.setattr(module, "train_arm", lambda comparison, arm, seed: pytest.fail(f"{arm.name} was made again"))
    comparison = read_comparison(written(tmp_path))
    assert compare(comparison, seeds=[0], audits=False) is None
    for path in settings[:-1]:
        path.unlink()
        (path.parent / "run.json").unlink()
    assert "finished" in describe_plan(comparison, ["sgtm"], [0], 1)  # reported, under the old name of a setting


def test_a_file_that_changes_between_seeds_is_refused(tmp_path) -> None:
    """Before its new text is read; also where all that is left of the other seeds is compare.json."""
    stories = tmp_path / "stories.jsonl"
    text = "".join(
        json.dumps({"text": f"{n} " + " ".join(f"word{n * k % 17}" for k in range(1, 9))}) + "\n" for n in range(40)
    )
    stories.write_text(text)
    data = {"path": str(stories), "held_out": 6, "repeat": SMALL["data"]["repeat"], "long": "truncate"}
    comparison = read_comparison(written(tmp_path, data=data))
    out = tmp_path / "out"
    first = prepare_data(comparison, 0)
    hashes = data_sources(comparison)
    assert hashes == {"data.path": hashlib.sha256(text.encode()).hexdigest()}
    stories.write_text(text + '{"text": "one more"}\n')
    refused = r"changed since .*: data\.path \(SHA-256 \w{12}\.\.\., now \w{12}\.\.\.\); restore"
    for act in (lambda: prepare_data(comparison, 1), lambda: compare(comparison)):
        with pytest.raises(CheckpointError, match=refused):
            act()
    shutil.rmtree(first.parent)
    report = {
        "recipe": comparison.recipe.to_dict(),
        "sources": hashes,
        "runs": [],
        "seeds": [],
        "rows": [],
        "audits": {},
    }
    (out / "compare.json").write_text(json.dumps(report))
    with pytest.raises(CheckpointError, match=refused):
        prepare_data(comparison, 1)
    assert not (out / "seed-1").exists()
    stories.unlink()  # e.g. on another machine, to which prepared folders were copied
    assert data_sources(comparison) == hashes


def test_seeds_that_were_made_from_different_files_are_not_mixed(tmp_path) -> None:
    comparison = read_comparison(written(tmp_path))
    for seed, value in ((0, "a" * 64), (1, "b" * 64)):
        path = prepare_data(comparison, seed) / "data.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sources": {"data.path": value}}))
    with pytest.raises(
        CheckpointError, match=r"data\.path has changed: .*seed-0/data.* aaaaaaaaaaaa\.\.\., .*seed-1/data"
    ):
        compare(comparison)


def test_a_run_is_the_same_each_time(done, tmp_path) -> None:
    comparison = read_comparison(written(tmp_path))
    facts = train_arm(comparison, next(x for x in comparison.arms if x.name == "ours"), 0)
    before = next(run for run in done[1]["runs"] if run["arm"] == "ours")
    assert facts["curve"] == before["curve"]


def test_a_plan_says_what_would_run(done, tmp_path, capsys) -> None:
    path, _ = done
    text = describe_plan(read_comparison(path), ["standard", "twin"], [], 2)
    assert "standard: seeds [1], about" in text and "2 at a time" in text
    assert "twin: finished" in describe_plan(read_comparison(path), ["twin"], [0], 1)
    fresh = written(tmp_path)
    assert main(["compare", str(fresh), "--dry-run", "--arms", "goldfish"]) == 0
    assert "goldfish: seeds [0, 1], about" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_without_the_arms_that_have_a_role_nothing_is_audited(tmp_path) -> None:
    assert compare(read_comparison(written(tmp_path, seeds=[3])), arms=["goldfish"]) is None
    assert (tmp_path / "out" / "seed-3" / "goldfish" / "run.json").is_file()


@pytest.mark.long
def test_two_at_a_time_are_as_one_after_the_other(done, tmp_path) -> None:
    path = written(tmp_path)
    names = ["standard", "ours"]
    compare(read_comparison(path), arms=names, seeds=[0], jobs=2, command=[str(path)], audits=False)
    for name in names:
        facts = json.loads((tmp_path / "out" / "seed-0" / name / "run.json").read_text())
        assert facts["curve"] == next(run for run in done[1]["runs"] if run["arm"] == name)["curve"]


def test_spread() -> None:
    assert spread([0.5], ".1%") == "50.0%"
    assert spread([0.1, 0.3], "+.3f") == "+0.200 ± 0.100"
    assert spread([None, None], ".2f") == "-"
    assert spread([math.nan], ".0%") == "-" and spread([math.nan, 0.5], ".0%") == "50%"


@pytest.mark.parametrize(
    ("changes", "part"),
    [({"arms": {}}, "roles.audited names no arm"), ({"arms": None}, "needs a section arms"),
     ({"seeds": []}, "seeds must be a list of ints"), ({"roles": {"audited": "ours"}}, "roles.against is missing"),
     ({"roles": {"audited": "ours", "against": "standard", "twins": "twin"}}, "did you mean twin?"),
     ({"arms": SMALL["arms"] | {"x": {"rival": "goldfisch"}}}, "unknown rival goldfisch"),
     ({"arms": SMALL["arms"] | {"x": 3}}, "arms.x needs rival"),
     ({"arms": SMALL["arms"] | {"Ours!": {"rival": "twin"}, "ours": {"rival": "standard"}, "ours ?": {"rival": "twin"}}},
      "the same name but for signs"),
     ({"sinks": {"neurons": 64, "active": 8, "block_size": 8}}, "sinks belong to an arm"),
     ({"settle": {}}, "settle belongs to an arm (settle_lr)"),
     ({"arms": SMALL["arms"] | {"x": {"rival": "cap", "settle_lr": 1e-3}},
       "data": SMALL["data"] | {"background": {"path": "x", "tokens": 9}}},
      "arms.x: settling beside data.background needs data.unseen"),
     ({"data": {"synthetic": SMALL["data"]["synthetic"]}}, "data.repeat is missing"),
     ({"modle": {}}, "did you mean model?")],
)  # fmt: skip
def test_a_wrong_file_is_one_clear_error(tmp_path, changes, part, capsys) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        read_comparison(path)
    assert part in str(caught.value)


COMPARISONS = sorted(x for kind in ("compare", "regimes") for x in (ROOT / "recipes").glob(f"{kind}-*.yaml"))


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.name)
def test_the_comparisons_of_the_repository_are_valid(path) -> None:
    comparison = read_comparison(path)
    assert len(comparison.arms) > 5 and set(comparison.roles) == {"audited", "against", "twin", "seen_once"}


def test_unknown_arms_and_seeds(tmp_path) -> None:
    comparison = read_comparison(written(tmp_path))
    with pytest.raises(ConfigError, match="did you mean ours"):
        compare(comparison, arms=["our"])
    with pytest.raises(ConfigError, match="seed 9 is not among"):
        compare(comparison, seeds=[9])
    with pytest.raises(ConfigError, match="cannot read"):
        read_comparison(tmp_path / "none.yaml")
