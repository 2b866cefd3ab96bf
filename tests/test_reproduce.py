"""The paper's study at the tiny scale: figures and pictures, resuming, corpora as described, theory against closed forms."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from memsinks.batch import IGNORED
from memsinks.cli import main
from memsinks.errors import CheckpointError, ConfigError, DataError
from memsinks.research.reproduce import arms, fig2, fig4, fig7, study, theory
from memsinks.research.reproduce.corpus import TRACKED, make_corpus
from memsinks.research.reproduce.reproduce import FIGURES, describe_study, reproduce
from memsinks.research.reproduce.setting import SETTINGS, setting_of
from memsinks.research.reproduce.study import Study
from memsinks.research.rivals.registry import method

TINY = dataclasses.replace(setting_of("tiny"), seeds=(0,))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(study, results) of all figures, one seed, the built-in stories."""
    made = Study(TINY, tmp_path_factory.mktemp("paper"))
    return made, reproduce(["all"], made)


# Figures


def test_every_figure_has_its_numbers_and_its_picture(done) -> None:
    made, results = done
    for name in FIGURES:
        found = json.loads((made.out / f"{name}.json").read_text())
        assert found["setting"] == TINY.to_dict() and found["versions"]["torch"] and found["data"] == "built-in stories"
        assert {key: found[key] for key in results[name]} == json.loads(json.dumps(results[name]))
        assert (made.out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    runs = [json.loads(path.read_text()) for path in (made.out / "runs").glob("*.json")]
    assert all("seed" in run and "seconds" in run for run in runs)


def test_curves_have_the_points_that_were_asked_for(done) -> None:
    made, _ = done
    found = made.run(arms.published(TINY, 0))
    assert found["curves"]["steps"][-1] == TINY.steps and len(found["curves"]["steps"]) == TINY.points
    for name in ("validation", "repeated", "opened"):
        assert len(found["curves"][name]) == TINY.points
    masking = made.run(arms.gradient_masking(TINY, 0))["curves"]
    assert masking["validation"] != masking["validation_dropped"]


def test_forgetting_and_degradation_are_differences_to_the_standard_model(done) -> None:
    made, results = done
    standard, sinks = (made.run(run)["curves"] for run in (arms.standard(TINY, 0), arms.published(TINY, 0)))
    final = results["fig4"]["arms"]["MemSinks"]["final"]
    assert final["forgetting"][0] == pytest.approx(sinks["repeated"][-1] - standard["repeated"][-1], abs=1e-4)
    assert final["degradation"][0] == pytest.approx(standard["validation"][-1] - sinks["validation"][-1], abs=1e-4)
    own = results["fig4"]["arms"]["standard"]["final"]
    assert own["gap_closed"] == [0.0] and own["forgetting"] == [0.0]


def test_sweeps_start_from_the_standard_model(done) -> None:
    made, results = done
    standard = made.run(arms.standard(TINY, 0))["curves"]
    for name in fig2.METHODS:
        found = fig2.sweep(made, arms.standard(TINY, 0, keep=True), name)
        assert found["before"]["repeated"] == standard["repeated"][-1] == found["before"]["forgotten"]
        assert len(found["points"]) == 2
        assert results["fig2"]["stories"][name]["curves"][0][0] == [0.0, 0.0]
    canary = fig2.sweep(made, arms.standard(TINY, 0, corpus="canary", keep=True), "activations")
    assert canary["before"]["forgotten"] != canary["before"]["repeated"]


def test_the_same_run_gives_the_same_numbers(done, tmp_path) -> None:
    made, _ = done
    run = arms.ours(TINY, 0)
    again = Study(TINY, tmp_path).run(run)
    assert again["curves"] == made.run(run)["curves"] and again["corpus_hash"] == made.run(run)["corpus_hash"]


# Resuming


def test_finished_runs_are_kept_and_interrupted_ones_made_again(done, tmp_path, monkeypatch) -> None:
    made, _ = done
    out = tmp_path / "copy"
    (out / "runs").mkdir(parents=True)
    for path in (made.out / "runs").glob("*.json"):
        (out / "runs" / path.name).write_text(path.read_text())
    (out / "runs" / "memsinks-seed0.json").rename(out / "runs" / "memsinks-seed0.part")  # cut off while writing
    asked = []
    monkeypatch.setattr(study, "train", lambda one, run: asked.append(run.file) or made.run(run))
    again = Study(TINY, out)
    again.run(arms.published(TINY, 0))
    again.run(arms.ours(TINY, 0))
    again.run(arms.standard(TINY, 0))
    assert asked == ["memsinks-seed0"]
    again.run(arms.standard(TINY, 0, keep=True))  # what is drawn needs no weights
    assert asked == ["memsinks-seed0"]
    again.weights(arms.standard(TINY, 0))
    assert asked == ["memsinks-seed0", "standard-seed0"]


def test_results_from_before_settings_were_renamed_are_taken(done, tmp_path, monkeypatch) -> None:
    made, _ = done
    monkeypatch.setattr(study, "train", lambda *_: pytest.fail("a run was made again"))
    (tmp_path / "runs").mkdir()
    result = json.loads((made.out / "runs" / "ours-seed0.json").read_text())
    old = {"hidden_size": "width", "intermediate_size": "neurons", "general_share": "general", "active_share": "active",
           "active_shares": "actives"}  # fmt: skip
    result["setting"] = {old.get(name, name): value for name, value in result["setting"].items() if name != "precision"}
    (tmp_path / "runs" / "ours-seed0.json").write_text(json.dumps(result))
    assert Study(TINY, tmp_path).run(arms.ours(TINY, 0))["curves"] == result["curves"]
    other = Study(dataclasses.replace(TINY, hidden_size=32), tmp_path)
    with pytest.raises(CheckpointError, match=r"setting\.hidden_size 16 \(now 32\); choose another folder with --out"):
        other.run(arms.ours(TINY, 0))


def test_pictures_are_drawn_from_results_alone(done, tmp_path, monkeypatch) -> None:
    made, results = done
    (tmp_path / "runs").mkdir()
    for path in (made.out / "runs").glob("*.json"):
        (tmp_path / "runs" / path.name).write_text(path.read_text())
    monkeypatch.setattr(study, "train", lambda *_: pytest.fail("a run was made again"))
    assert reproduce(["fig2", "fig4"], Study(TINY, tmp_path))["fig4"] == results["fig4"]


def test_an_interruption_leaves_no_half_result(tmp_path, monkeypatch) -> None:
    made = Study(TINY, tmp_path)
    monkeypatch.setattr(study, "mean_loss", lambda *args, **more: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        made.run(arms.standard(TINY, 0))
    assert made.found("standard-seed0") is None and not list(tmp_path.glob("runs/*.json"))


def test_a_plan_counts_what_is_left(done, tmp_path) -> None:
    made, _ = done
    assert "to do" not in describe_study(["all"], made) and "the rest takes about 0 minutes" in describe_study(
        ["all"], made
    )
    text = describe_study(["fig3"], Study(TINY, tmp_path))
    assert "to do: gradient-masking-seed0, about" in text and "0 of 2 runs are there" in text


def test_what_is_there_is_drawn_without_training(done, tmp_path, capsys, monkeypatch) -> None:
    made, results = done
    monkeypatch.setattr(study, "train", lambda *_: pytest.fail("a run was made"))
    monkeypatch.delenv("MEMSINKS_DATA", raising=False)
    (tmp_path / "runs").mkdir()
    command = ["reproduce", "fig2", "fig4", "fig5", "--size", "tiny", "--out", str(tmp_path), "--finished"]
    assert main(command[:2] + command[4:]) == 0  # nothing to take out of anything: an empty picture
    assert main(["reproduce", "fig4", *command[4:]]) == 2
    assert "no seed of which all runs are there; leave --finished out" in capsys.readouterr().err
    for path in (made.out / "runs").glob("*.json"):
        if "-d0.5" not in path.name and "zero-out" not in path.name:
            (tmp_path / "runs" / path.name).write_text(path.read_text())
    assert main(command) == 0
    assert "1 runs are missing and left out: memsinks-d0.5-seed0" in capsys.readouterr().err
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("fig2", "fig4", "fig5")}
    assert list(found["fig5"]["noise"]) == ["0.1"] and found["fig4"]["seeds"] == [0]
    assert set(results["fig2"]["stories"]) - set(found["fig2"]["stories"]) == {"zero-out"}


# Corpora


def test_stories_are_repeated_as_often_as_asked() -> None:
    corpus = make_corpus(TINY, 0, None)
    ids, counts = np.unique(corpus.training.document_ids[:, 0], return_counts=True)
    often = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    repeated = corpus.repeated.document_ids[:, 0].tolist()
    assert [often[x] for x in repeated] == [TINY.copies] * TINY.repeated
    assert sorted(counts.tolist())[: TINY.once] == [1] * TINY.once
    assert not set(corpus.validation.document_ids[:, 0].tolist()) & set(often)
    assert set(corpus.once.document_ids[:, 0].tolist()) <= set(often) - set(repeated)
    assert corpus.training.exposures.max() == TINY.copies
    assert make_corpus(TINY, 0, None).hash == corpus.hash != make_corpus(TINY, 1, None).hash


def test_canaries_are_random_tokens_at_the_end() -> None:
    corpus = make_corpus(TINY, 0, None, "canary")
    assert corpus.canaries is not None
    labels = np.stack([corpus.canaries[index]["labels"] for index in range(len(corpus.canaries))])
    assert (labels != IGNORED).sum(1).tolist() == [TINY.canary] * TINY.repeated
    drawn = labels[labels != IGNORED]
    assert len(set(drawn.tolist())) > 0.7 * len(drawn)
    plain = make_corpus(TINY, 0, None)
    assert np.array_equal(plain.validation.input_ids, corpus.validation.input_ids)


def test_tracked_stories_are_met_at_a_fixed_distance() -> None:
    corpus = make_corpus(TINY, 0, None, "spaced")
    assert corpus.tracked is not None and len(corpus.tracked) == TRACKED
    rows = corpus.training.document_ids[:, 0].reshape(-1, TINY.batch)
    for story, phase in zip(corpus.tracked.document_ids[:, 0], corpus.phases, strict=True):
        met = np.flatnonzero((rows == story).any(1))
        assert met[0] == phase and set(np.diff(met)) <= {TINY.every}


def test_the_published_split_and_ours_have_the_width_they_say() -> None:
    small = setting_of("small")
    standard, published, ours = (arm(small, 0) for arm in (arms.standard, arms.published, arms.ours))
    assert published.neurons + published.settings["neurons"] == standard.neurons
    assert published.neurons == round(0.7 * standard.neurons)
    assert ours.neurons + ours.settings["active"] == standard.neurons
    paper = arms.published(setting_of("paper"), 0)
    assert (paper.neurons, paper.settings) == (2867, {"neurons": 1229, "active": 369})
    assert setting_of("paper").steps == 1025
    for run in (published, ours):
        method(run.rival, run.settings)


def test_aligned_curves_meet_where_the_stories_are_met() -> None:
    every, phases = 10, [1, 4, 7]
    steps = list(range(1, 120, 2))
    tooth = [[((step - phase) % every) / every for phase in phases] for step in steps]
    times, values = fig7.aligned({"steps": steps, "phases": phases, "closed": tooth}, "closed", every)
    assert times[0] == -5 and len(times) == len(values)
    found = fig7.teeth(times, values, every)
    assert all(low < high for low, high in found)


def test_price_of_half() -> None:
    curve = [(0.0, 0.0), (-0.1, 1.0), (-0.3, 2.0)]
    assert fig2.price_of_half(curve, 3.0) == pytest.approx(0.2)
    assert fig2.price_of_half(curve, 2.0) == pytest.approx(0.1)
    assert fig2.price_of_half(curve, 5.0) is None
    result = {"before": {"validation": 3.0}}
    assert fig2.unseen_loss(result, "stories", 64) == 3.0
    assert fig2.unseen_loss(result, "canaries", 64) == pytest.approx(math.log(64))


# Theory


def test_gradient_descent_ends_at_the_least_norm_and_not_at_the_disentangled_solution() -> None:
    found = theory.entanglement(examples=6, semantic=8, outputs=4, steps=800)
    assert found["loss"][-1] < 1e-12 and found["to_least_norm"][-1] < 1e-6
    assert found["to_disentangled"][-1] > 0.3
    assert found["norms"]["least"] < found["norms"]["disentangled"]
    assert found["removed"][-1] == pytest.approx(1 - found["entangled_share"], abs=1e-6)


def test_co_adaptation_grows_to_the_whole_memory_and_stays_above_the_bound() -> None:
    found = theory.co_adaptation(rate=0.1, steps=600)
    measured, bound = np.array(found["measured"]), np.array(found["bound"])
    assert measured[0] == 0 and measured[-1] == pytest.approx(1.0, abs=0.1)
    assert (measured[1:] >= bound[1:]).all()
    assert abs(int(bound.argmax()) - 1 / 0.1) <= 1  # N (1 - gamma)^N is greatest at N = 1 / gamma


def test_sinks_lose_more_the_more_often_others_open_them() -> None:
    found = theory.separation(shares=[0.0, 0.5, 1.0])
    assert found["sink"][0] > found["sink"][1] > found["sink"][2]
    assert found["sink"][2] == pytest.approx(found["shared"][2], abs=1e-9)  # always open: no different from shared
    assert found["sink"][0] > 0 and 0 <= found["derived"] <= 1


# The command


def test_the_command(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("MEMSINKS_DATA", raising=False)
    out = str(tmp_path / "out")
    assert main(["reproduce", "fig3", "--size", "tiny", "--out", out, "--dry-run"]) == 0
    assert "0 of 2 runs are there" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert main(["reproduce", "fig3", "--size", "tiny", "--out", out]) == 0
    said = capsys.readouterr()
    assert "gradient-masking-seed0: step" in said.err and "fig3.png" in said.out
    assert main(["reproduce", "fig3", "--scale", "small", "--out", out]) == 2  # what --size was called before
    (line,) = capsys.readouterr().err.splitlines()
    assert "was made with other settings: setting.batch 8 (now 16)" in line and "--out" in line


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(["fig9"], "unknown figure fig9"), (["fig22"], "did you mean fig2?"), (["fig2", "--size", "smal"], "did you mean small?"),
     (["fig2", "--data", "none.jsonl"], "none.jsonl does not exist")],
)  # fmt: skip
def test_wrong_arguments_are_one_clear_error(tmp_path, capsys, arguments, part) -> None:
    assert main(["reproduce", *arguments, "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line


def test_too_few_stories(tmp_path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text('{"text": "Once there was a fox."}\n')
    with pytest.raises(DataError, match="holds 1 different texts, this setting needs 50"):
        make_corpus(TINY, 0, path)


def test_sizes_and_arms_are_whole() -> None:
    with pytest.raises(ConfigError, match="unknown size huge"):
        setting_of("huge")
    for setting in SETTINGS.values():
        files = [run.file for name in FIGURES for run in FIGURES[name].runs(setting)]
        assert len({*files}) >= len(setting.sizes) + len(setting.noises) + len(setting.active_shares) + 4
        assert setting.size in setting.sizes or setting.name == "paper"
    assert set(fig4.ARMS) == {"standard", "without repeats", "MemSinks", "ours"}
