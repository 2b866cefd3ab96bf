"""What comes out verbatim: teacher-forced and generated extraction, the longest run, (n, p)-extraction, canaries."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from memsinks.auditing.scores import DocumentScore
from memsinks.errors import DataError
from memsinks.sinks.opening import own_sinks_open
from memsinks.sinks.state import has_sinks


def extracted(one: DocumentScore, start: int, length: int | None = None) -> bool | None:
    """Whether tokens [start, start + length) come out verbatim by greedy decoding from the tokens before them.

    Teacher-forced: all of them are the model's first choice given the true tokens before, which is the same thing.
    Source: Carlini et al., "Quantifying memorization across neural language models", ICLR 2023.

    Args:
        one: the document's score.
        start: first token of the continuation.
        length: tokens of the continuation; None = to the end.

    Returns:
        None if the document is too short.
    """
    part = one.between(start, length)
    return None if part is None else not one.rank[part].any()


def longest_run(one: DocumentScore) -> int:
    """The longest run of tokens that are each the model's first choice, anywhere in the document; 0 = none.

    Greedy decoding from the true tokens before the run recites it.
    """
    wrong = np.flatnonzero(one.rank)
    edges = np.concatenate([[-1], wrong, [len(one.rank)]])
    return int(np.diff(edges).max()) - 1


def log_probability(one: DocumentScore, start: int, length: int | None = None) -> float | None:
    """log p_z, nats: the log-probability that sampling at temperature 1 recites tokens [start, start + length).

    Source: Hayes et al., "Measuring memorization through probabilistic extraction", arXiv 2410.19482, section 3.

    Returns:
        None if the document is too short.
    """
    part = one.between(start, length)
    return None if part is None else float(one.logprob[part].sum(dtype=np.float64))


def log10_queries(log_p: float, p: float = 0.5) -> float:
    """log10 of the least n for which n samples recite the text at least once with probability `p`.

    The least integer n with 1 - (1 - p_z)^n >= p, that is ceil(log(1 - p) / log(1 - p_z)). Source: arXiv 2410.19482,
    eq. 3.

    Args:
        log_p: log p_z in nats, at most 0.
        p: in (0, 1).

    Returns:
        0 for a text that comes out at the first try; any size, also where n itself would overflow.
    """
    if log_p >= math.log(p):
        return 0.0
    if log_p < -30:  # log(1 - p_z) = -p_z to within 1e-13
        return (math.log(-math.log1p(-p)) - log_p) / math.log(10)
    n = math.log1p(-p) / math.log1p(-math.exp(log_p))
    return math.log10(max(1.0, math.ceil(n - 1e-9 * n)))


def canary_exposure(loss: float, candidates: np.ndarray) -> float:
    """Exposure of a canary in bits: log2 |R| - log2 rank, with R the canary and the candidates it is ranked among.

    0 = the least likely of all; log2 |R| = the likeliest. A canary that was not inserted has about 1.44 bits on average.
    Source: Carlini et al., "The secret sharer", USENIX Security 2019, definition 5.

    Args:
        loss: of the canary, nats.
        candidates: losses of texts of the same form that were never inserted, at least 1; a tie ranks before the canary.

    Raises:
        DataError: no candidates.
    """
    if not len(candidates):
        raise DataError("canary_exposure needs candidates: canaries of the same form that were never trained on")
    rank = 1 + int((np.asarray(candidates) <= loss).sum())
    return math.log2(len(candidates) + 1) - math.log2(rank)


def generate_continuation(model: Any, tokens: np.ndarray, length: int, open_id: int | None = None) -> np.ndarray:
    """Greedy continuation of `tokens`, int64, up to `length` tokens, with a document's sinks open or not.

    Plain greedy decoding: what the checkpoint's generation settings say beyond the end token (beams, a penalty for
    repetition) is left out, as it is in the teacher-forced figure.
    """
    if open_id is not None and not has_sinks(model):
        raise DataError("open_id was given for a model without sinks")
    training, settings = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig(
        eos_token_id=settings.eos_token_id, pad_token_id=settings.pad_token_id, bos_token_id=settings.bos_token_id
    )
    prompt = torch.from_numpy(np.asarray(tokens, np.int64))[None].to(model.device)
    try:
        with nullcontext() if open_id is None else own_sinks_open(model, int(open_id)):
            out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length, do_sample=False)
    finally:
        model.generation_config = settings
        model.train(training)
    return out[0, prompt.shape[1] :].cpu().numpy()
