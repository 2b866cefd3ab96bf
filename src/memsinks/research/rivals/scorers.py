"""Which neurons hold some documents: a score for each MLP neuron of a trained model, float64 [layers, neurons], higher = more.

Each takes batches of `collate` (one or several documents a row) in which the targets say what is asked about: labels other
than -100; DataError where there is none. Sources: Chang, Thomason, Jia, "Do localization methods actually localize memorized
data in LLMs?", NAACL 2024; for integrated gradients also Dai et al., "Knowledge neurons", ACL 2022. Hard concrete, which is
learned, is in `hard_concrete`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from memsinks.batch import IGNORED
from memsinks.errors import DataError
from memsinks.research.rivals.method import Batch
from memsinks.research.rivals.pruning import down_projections, neuron_vectors, neurons_changed
from memsinks.sinks.gradient import frozen


def predicting(batch: Batch) -> Tensor:
    """Positions whose next token is a target, bool [rows, length]."""
    return torch.nn.functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))


def token_log_probabilities(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Log-probability of each next token, [rows, length]: 0 where `predicting` is False."""
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    gold = batch["input_ids"].roll(-1, 1)[..., None]
    each = logits.gather(2, gold)[..., 0] - logits.logsumexp(2)
    return each.where(predicting(batch), 0.0)


@torch.no_grad()
def activations(model: PreTrainedModel, rows: Sequence[Batch]) -> Tensor:
    """Mean over the predicting positions of abs(a_i) x norm of the vector that neuron i writes."""
    count = require_targets(rows)
    norms = torch.stack([neuron_vectors(down).double().norm(dim=1) for down in down_projections(model)]).cpu()
    total = torch.zeros_like(norms)
    for batch in rows:
        asked = predicting(batch)

        def look(layer: int, neurons: Tensor, asked: Tensor = asked) -> Tensor:
            total[layer] += neurons[asked].abs().double().sum(0).cpu()
            return neurons

        with neurons_changed(model, look):
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    return norms * total / count


@torch.no_grad()
def zero_out(model: PreTrainedModel, rows: Sequence[Batch], together: int = 8) -> Tensor:
    """How much the mean loss of the targets rises when neuron i alone is zeroed; exact, a forward pass for each neuron.

    Args:
        together: neurons tried in one forward pass; changes the speed, not the result.
    """
    targets, downs = require_targets(rows), down_projections(model)
    scores = torch.zeros(len(downs), len(neuron_vectors(downs[0])), dtype=torch.float64)
    places = [(x, y) for x in range(scores.shape[0]) for y in range(0, scores.shape[1], together)]
    for batch in rows:
        before = token_log_probabilities(model, batch).double().sum().item()
        for layer, neuron in tqdm(places, "zero-out", disable=None, leave=False):
            count = min(together, scores.shape[1] - neuron)
            copies = {name: batch[name].repeat(count, 1) for name in ("input_ids", "position_ids", "labels")}

            def zero(at: int, neurons: Tensor, layer: int = layer, first: int = neuron, count: int = count) -> Tensor:
                if at != layer:
                    return neurons
                apart = neurons.view(count, -1, *neurons.shape[1:]).clone()
                for place in range(count):
                    apart[place, ..., first + place] = 0.0
                return apart.view_as(neurons)

            with neurons_changed(model, zero):
                after = token_log_probabilities(model, copies).double().view(count, -1).sum(1)
            scores[layer, neuron : neuron + count] += before - after.cpu()
    return scores / targets


def integrated_gradients(model: PreTrainedModel, rows: Sequence[Batch], steps: int = 16) -> Tensor:
    """Mean over targets of a_i x mean over k = 1..steps of dP/da_i at (k / steps) a, P the probability of the gold token.

    One layer at a time, from the baseline 0. All positions of the layer are scaled at once, so a neuron is also credited
    for what it does through attention to later tokens; Dai et al. scale the predicting position alone.
    """
    targets, downs = require_targets(rows), down_projections(model)
    scores = torch.zeros(len(downs), len(neuron_vectors(downs[0])), dtype=torch.float64)
    with frozen(model.parameters()):
        for batch in rows:
            found = _hidden(model, batch)
            asked = predicting(batch)
            for layer, neurons in enumerate(found):
                total = torch.zeros_like(neurons)
                for step in range(1, steps + 1):
                    scaled = (neurons * (step / steps)).requires_grad_()
                    with neurons_changed(model, lambda at, x, layer=layer, y=scaled: y if at == layer else x):
                        probabilities = token_log_probabilities(model, batch).exp()[asked].sum()
                    total += torch.autograd.grad(probabilities, scaled)[0]
                scores[layer] += (neurons * total / steps).double().sum((0, 1)).cpu()
    return scores / targets


def random_scores(model: PreTrainedModel, seed: int) -> Tensor:
    """Scores that mean nothing, the same for every forget set: the control."""
    downs = down_projections(model)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(downs), len(neuron_vectors(downs[0])), dtype=torch.float64, generator=generator)


@torch.no_grad()
def _hidden(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []

    def look(_: int, neurons: Tensor) -> Tensor:
        found.append(neurons)
        return neurons

    with neurons_changed(model, look):
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    return found


def require_targets(rows: Sequence[Batch], what: str = "forgotten") -> int:
    """The number of targets of `rows`; DataError if there is none, which would score or train on nothing."""
    count = sum(int(predicting(batch).sum()) for batch in rows)
    if not count:
        raise DataError(f"no document to be {what} has a target, so there is nothing to do; leave this method out")
    return count
