"""Hard concrete: a gate on each neuron is learned, most are pushed shut, and what must stay open holds the documents.

Sources: Louizos, Welling, Kingma, "Learning sparse neural networks through L0 regularization", ICLR 2018, equations 10 to 12;
used to locate memorized text by Chang, Thomason, Jia, NAACL 2024.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from memsinks.research.rivals.method import Batch
from memsinks.research.rivals.pruning import down_projections, neuron_vectors, neurons_changed
from memsinks.research.rivals.scorers import predicting, require_targets, token_log_probabilities
from memsinks.sinks.gradient import frozen

LOW, HIGH = -0.1, 1.1
"""The interval (gamma, zeta) to which the concrete distribution is stretched before it is clipped to [0, 1]."""


def gates(log_alpha: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Gates in [0, 1] for uniform noise in (0, 1): sigmoid((logit(u) + log_alpha) / temperature), stretched and clipped."""
    s = torch.sigmoid((uniform.log() - (1 - uniform).log() + log_alpha) / temperature)
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(log_alpha: Tensor, temperature: float) -> Tensor:
    """Probability that a gate is not 0: sigmoid(log_alpha - temperature * log(-LOW / HIGH)); their mean is the expected L0."""
    return torch.sigmoid(log_alpha - temperature * math.log(-LOW / HIGH))


def hard_concrete(
    model: PreTrainedModel,
    rows: Sequence[Batch],
    *,
    iterations: int,
    lr: float = 0.1,
    penalty: float = 8.0,
    start: float = 0.9,
    temperature: float = 2 / 3,
    seed: int = 0,
) -> Tensor:
    """Learn gates that keep the documents with few neurons: loss + penalty x mean over neurons of `open_probability`.

    One set of gates for all rows; Adam; a batch an iteration, in turn, with fresh noise.

    Args:
        penalty: lambda, nats per token.
        start: sigmoid(log_alpha) at the start.

    Returns:
        sigmoid(log_alpha), float64 [layers, neurons].

    Raises:
        DataError: no row has a target.
    """
    require_targets(rows)
    rows = [batch for batch in rows if predicting(batch).any()]
    downs = down_projections(model)
    device = downs[0].weight.device
    first = math.log(start / (1 - start))
    log_alpha = torch.full((len(downs), len(neuron_vectors(downs[0]))), first, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([log_alpha], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    with frozen(model.parameters()):
        batches = itertools.islice(itertools.cycle(rows), iterations)
        for batch in tqdm(batches, "hard concrete", iterations, disable=None, leave=False):
            uniform = torch.rand(log_alpha.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(device)
            gate = gates(log_alpha, uniform, temperature)
            with neurons_changed(model, lambda layer, neurons, gate=gate: neurons * gate[layer].to(neurons.dtype)):
                loss = -token_log_probabilities(model, batch).sum() / predicting(batch).sum()
            loss = loss + penalty * open_probability(log_alpha, temperature).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return log_alpha.detach().double().sigmoid().cpu()
