"""One run of the study: a model trained with evaluations on the way, kept as one JSON, its weights beside it where asked."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from memsinks._version import versions
from memsinks.data.packing import Rows
from memsinks.files import read_json, write_json, written_beside
from memsinks.provenance import refuse_other_settings
from memsinks.research.reproduce.corpus import Canaries, Kind, StoryCorpus, make_corpus
from memsinks.research.reproduce.setting import AFTERWARDS, Setting
from memsinks.research.rivals.gradient_masking import masked_step
from memsinks.research.rivals.method import TrainingMethod
from memsinks.research.rivals.pruning import last_neurons, neuron_masks, neurons_off
from memsinks.research.rivals.registry import training_method
from memsinks.runs.run import micro_batches
from memsinks.sinks.attach import add_sinks
from memsinks.sinks.state import has_sinks
from memsinks.training.config import TrainingConfig
from memsinks.training.evaluate import losses
from memsinks.training.loop import Batch, Training, steps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A model of the study.

    Args:
        name: what it is called in files.
        rival, settings: the method of `rivals`.
        neurons: general neurons of each MLP.
        seed: start values, choice and order of the stories.
        corpus: which one.
        size: (hidden_size, layers, heads).
        keep: keep the final weights.
    """

    name: str
    rival: str
    settings: Mapping[str, Any]
    neurons: int
    seed: int
    size: tuple[int, int, int]
    corpus: Kind = "repetition"
    keep: bool = False

    @property
    def file(self) -> str:
        return f"{self.name}-seed{self.seed}"


class NothingToDraw(Exception):
    """A run that a picture cannot do without is missing, and nothing is to be trained."""


@dataclass
class Study:
    """Where the runs of one setting live; a run that is there is not made again.

    Args:
        out: folder; runs/NAME.json and models/NAME/ are written below it.
        data: the stories; None = the built-in ones.
        training: False draws what is there and makes nothing new.
    """

    setting: Setting
    out: Path
    data: Path | None = None
    training: bool = True
    corpora: dict[tuple[str, int], StoryCorpus] = field(default_factory=dict)

    def corpus(self, kind: Kind, seed: int) -> StoryCorpus:
        if (kind, seed) not in self.corpora:
            self.corpora[kind, seed] = make_corpus(self.setting, seed, self.data, kind)
        return self.corpora[kind, seed]

    def found(self, name: str, ignored: Sequence[str] = AFTERWARDS) -> dict[str, Any] | None:
        """The result of a name, None if it is not there; CheckpointError if it was made with another setting or data.

        Args:
            ignored: fields of the setting that do not matter for it.
        """
        path = self.out / "runs" / f"{name}.json"
        if not path.is_file():
            return None
        result = read_json(path)
        refuse_other_settings(
            {"setting": result["setting"], "data": result["data"]},
            {"setting": self.setting.to_dict(), "data": self.data_name},
            path,
            kinds={"setting": Setting},
            ignored=[f"setting.{name}" for name in ignored],
            remedy="choose another folder with --out",
        )
        return result

    @property
    def data_name(self) -> str:
        return self.data.name if self.data else "built-in stories"

    def write(self, name: str, result: dict[str, Any], folder: Path | None = None) -> dict[str, Any]:
        """Keep a result, in runs/ or another folder, written beside and renamed; returns it with setting, data, versions."""
        result = result | {
            "setting": self.setting.to_dict(),
            "data": self.data_name,
            "versions": versions("torch", "transformers", "numpy"),
        }
        write_json((folder or self.out / "runs") / f"{name}.json", result, indent=None)
        return result

    def run(self, run: Run) -> dict[str, Any]:
        """The result of a run, trained now if it is not there yet."""
        found = self.found(run.file)
        if found is None and not self.training:
            raise NothingToDraw(f"{run.file} is not there")
        return found or train(self, run)

    def weights(self, run: Run) -> Path:
        """The folder of a run's final model, trained now if it is not there (its result may be)."""
        if not self.model_folder(run).is_dir():
            train(self, replace(run, keep=True))
        return self.model_folder(run)

    def model_folder(self, run: Run) -> Path:
        return self.out / "models" / run.file

    def ready(self, runs: Iterable[Run]) -> bool:
        """Whether runs can be asked for: they are there, or may be trained."""
        return self.training or not self.missing(runs)

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """The runs that have no result yet."""
        return [run for run in runs if self.found(run.file) is None]


def build(run: Run, made: TrainingMethod, setting: Setting, vocabulary: int) -> PreTrainedModel:
    """A new model with the sinks of the method; start values follow from the seed."""
    hidden_size, layers, heads = run.size
    neurons = run.neurons + made.extra_neurons
    common = {"vocab_size": vocabulary, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None}
    if setting.architecture == "gpt2":
        config = AutoConfig.for_model(
            "gpt2",
            n_positions=setting.length,
            n_embd=hidden_size,
            n_layer=layers,
            n_head=heads,
            n_inner=neurons,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
    else:
        config = AutoConfig.for_model(
            "llama",
            max_position_embeddings=setting.length,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=neurons,
            **common,
        )
    torch.manual_seed(run.seed)
    model = AutoModelForCausalLM.from_config(config)
    if made.sinks is not None:
        add_sinks(model, replace(made.sinks, seed=run.seed))
    return model.to(device())


def device() -> str:
    """Where models run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def mean_loss(model: PreTrainedModel, rows: Rows | Canaries, *, opened: bool = False) -> float:
    """Mean over stories of their mean loss, nats."""
    return round(float(losses(model, rows, opened=opened).mean()), 5)


def train(study: Study, run: Run) -> dict[str, Any]:
    """Train a run, evaluate it `points` times, and keep the result.

    Returns:
        steps (of the evaluations) and, one number each, nats: validation, repeated; with sinks (closed in those) also
        opened, the repeated stories with their own sinks open; under gradient masking (all neurons kept in those) also
        validation_dropped and repeated_dropped; canaries, the random tokens alone. A spaced run also has tracked: the loss
        of its tracked stories at every second step, closed and open, [stories][times].
    """
    setting, made = study.setting, training_method(run.rival, run.settings)
    corpus = study.corpus(run.corpus, run.seed)
    random.seed(run.seed)
    training = _training(run, made, setting, corpus)
    model, batches = training.model, micro_batches(corpus.training, training.config)
    due = {round(training.total * (point + 1) / setting.points) for point in range(setting.points)}
    curves: dict[str, list[Any]] = {"steps": []}
    tracked: dict[str, list[Any]] = {"steps": [], "closed": [], "opened": []}
    started, evaluating = time.perf_counter(), 0.0
    for done in steps(training, batches):
        before = time.perf_counter()
        if done.step in due:
            for name, value in _evaluate(model, corpus, made.extra_neurons).items():
                curves.setdefault(name, []).append(value)
            curves["steps"].append(done.step)
            logger.info(
                "%s: step %d/%d  loss %.3f  validation %.3f  repeated %.3f  %.0f s",
                run.file,
                done.step,
                training.total,
                done.loss,
                curves["validation"][-1],
                curves["repeated"][-1],
                time.perf_counter() - started,
            )
        if corpus.tracked is not None and done.step % 2 == 1:
            tracked["steps"].append(done.step)
            tracked["closed"].append([round(float(x), 4) for x in losses(model, corpus.tracked)])
            if has_sinks(model):
                tracked["opened"].append([round(float(x), 4) for x in losses(model, corpus.tracked, opened=True)])
        evaluating += time.perf_counter() - before
    seconds = {"seconds": time.perf_counter() - started, "seconds_evaluating": evaluating}
    result = _facts(run, model) | {"corpus_hash": corpus.hash, "curves": curves}
    result |= {name: round(value, 1) for name, value in seconds.items()}
    if corpus.tracked is not None:
        result["tracked"] = tracked | {"phases": list(corpus.phases)}
    if run.keep:
        with written_beside(study.model_folder(run)) as part:
            model.save_pretrained(part)
    return study.write(run.file, result)


def _facts(run: Run, model: PreTrainedModel) -> dict[str, Any]:
    return {
        "name": run.name,
        "seed": run.seed,
        "rival": run.rival,
        "settings": dict(run.settings),
        "corpus": run.corpus,
        "size": list(run.size),
        "neurons": run.neurons,
        "parameters": sum(x.numel() for x in model.parameters()),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
    }


def _training(run: Run, made: TrainingMethod, setting: Setting, corpus: StoryCorpus) -> Training:
    """A new model of a run, and how it learns."""
    model = build(run, made, setting, corpus.vocabulary)
    config = TrainingConfig(
        length=setting.length,
        batch_rows=setting.batch,
        lr=setting.lr,
        min_lr_ratio=setting.min_lr_ratio,
        warmup=setting.warmup,
        weight_decay=setting.weight_decay,
        sink_lr_factor=made.sink_lr_factor,
        sinks_first=made.sinks_first,
        precision=setting.precision,
    )
    audited = torch.from_numpy(corpus.repeated.document_ids[:, 0]).to(model.device)

    def change(batch: Batch) -> Batch:
        mask = torch.isin(batch["document_ids"], audited)
        return made.change(batch | {"audited": mask, "repeated": mask})

    learn = _masking_step(model, made.extra_neurons) if run.rival == "gradient-masking" else made.step
    return Training(model, config, len(corpus.training) // setting.batch, learn=learn, change=change)


def _evaluate(model: PreTrainedModel, corpus: StoryCorpus, width: int) -> dict[str, float]:
    found = {"validation": mean_loss(model, corpus.validation), "repeated": mean_loss(model, corpus.repeated)}
    if corpus.canaries is not None:
        found["canaries"] = mean_loss(model, corpus.canaries)
    if has_sinks(model):
        found["opened"] = mean_loss(model, corpus.repeated, opened=True)
    if width:
        with neurons_off(model, last_neurons(model, width)):
            found["validation_dropped"] = mean_loss(model, corpus.validation)
            found["repeated_dropped"] = mean_loss(model, corpus.repeated)
    return found


def _masking_step(model: PreTrainedModel, width: int) -> Callable[[PreTrainedModel, Batch, Tensor], float]:
    masks = neuron_masks(model, last_neurons(model, width))
    return lambda model, batch, divisor: masked_step(model, batch, divisor, masks)
