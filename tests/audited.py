"""Texts, model objects with known answers and small trained models, for the tests of the audit."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from memsinks.auditing.scores import DocumentScore
from memsinks.data.documents import Document
from memsinks.data.identity import document_id
from memsinks.data.tokens import encode, train_tokenizer
from memsinks.sinks.attach import add_sinks
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.state import has_sinks, sink_parameters

VOCABULARY = 280
NEVER = 1
"""A token that no text of the tests holds."""
TEXTS = [
    "The otter lived at 12 Mill Road and could whistle.", "Nobody knew the code 90412 of the tall clockmaker.",
    "A hen called Ada slept under the bridge every Sunday.", "The shepherd wrote 555-3141 on the gate with chalk.",
]  # fmt: skip
UNSEEN = ["The badger moved to 77 Oak Lane and liked to sing.", "Somebody lost the key 31337 of the small baker."]
MEMBERS = [Document(text, copies=copies) for text, copies in zip(TEXTS, (1, 4, 4, 16), strict=True)]
CONTROLS = [Document(text, copies=0) for text in UNSEEN]
CONFIG = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip


@functools.cache
def the_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the texts above; not to be changed."""
    return train_tokenizer(TEXTS + UNSEEN, VOCABULARY)


def tokens_of(texts: list[str]) -> list[np.ndarray]:
    """Tokens with the end token, int64."""
    return encode(the_tokenizer(), texts)


def llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    """A float32 Llama for these texts, untrained, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(CONFIG | changes))).eval()


class Oracle(nn.Module):
    """A model object that knows `known` by heart and elsewhere predicts `NEVER`; `sure` = 0: it knows nothing at all.

    Loss of a token it knows: `knows(sure)`; of another one, knows(sure) + sure. With `gaps` it knows all tokens but every
    so manieth.
    """

    def __init__(self, known: list[np.ndarray], sure: float = 20.0, gaps: int = 0) -> None:
        super().__init__()
        self.config, self.known, self.sure, self.gaps = LlamaConfig(**CONFIG), known, sure, gaps
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.register_buffer("facts", torch.tensor([sure, gaps, *(float(x) for one in known for x in one)]))

    def forward(self, input_ids, use_cache=False, output_hidden_states=False) -> CausalLMOutput:
        assert not use_cache
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        logits[..., NEVER] = self.sure
        for row, sequence in enumerate(input_ids):
            for known in self.known:
                if torch.equal(sequence[: len(known)], torch.from_numpy(known)):
                    places = torch.arange(len(known) - 1)
                    places = places[places % self.gaps != 0] if self.gaps else places
                    logits[row, places, NEVER] = 0.0
                    logits[row, places, sequence[places + 1]] = self.sure
        return CausalLMOutput(logits=logits, hidden_states=(logits,) if output_hidden_states else None)


def knows(sure: float = 20.0) -> float:
    """Loss of an `Oracle` on a token that it knows, nats."""
    return math.log(math.exp(sure) + VOCABULARY - 1) - sure


def train(model: LlamaForCausalLM, texts: list[str], steps: int, lr: float = 2e-2) -> LlamaForCausalLM:
    """Train in place on all texts at every step; of a model with sinks only these."""
    tokens = [torch.from_numpy(one) for one in tokens_of(texts)]
    rows = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    more = {"labels": nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-100)}
    if has_sinks(model):
        more["document_ids"] = torch.tensor([document_id(text) for text in texts])
    optimizer = torch.optim.AdamW(sink_parameters(model) or model.parameters(), lr=lr, weight_decay=0)
    model.train()
    for _ in range(steps):
        model(input_ids=rows, **more).loss.backward()
        optimizer.step()
        model.zero_grad()
    return model.eval()


@functools.cache
def memorized_in_sinks() -> LlamaForCausalLM:
    """A small model that recites the first two texts with their sinks open, else nothing; not to be changed."""
    model = llama(initializer_range=0.3)
    add_sinks(model, SinkConfig(neurons=64, active=32, block_size=8, shared_decay=0, open_from=1))
    return train(model, TEXTS[:2], 80)


def given(
    rank: list[int], logprob: list[float] | None = None, mean: list[float] | None = None,
    std: list[float] | None = None, first: int = 1,
) -> DocumentScore:  # fmt: skip
    """A score as if a model had given it; what is not said is 0, `std` 1."""
    count = len(rank)
    values = (np.array(x if x is not None else [default] * count, np.float32) for x, default in (
        (logprob, 0.0), (mean, 0.0), (std, 1.0)))  # fmt: skip
    logprobs, means, stds = values
    return DocumentScore(np.arange(count, dtype=np.int32), logprobs, np.array(rank, np.int32), means, stds, first)


def losses(*values: float) -> DocumentScore:
    """A score of these losses, nats per token."""
    return given([0] * len(values), [-x for x in values])
