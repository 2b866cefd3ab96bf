"""Deletable fine-tuning in minutes: a finished model learns three invented customers, one leaves, one is exported."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from memsinks.data.documents import Document, write_documents
from memsinks.data.router import Router
from memsinks.data.rows import make_rows
from memsinks.data.tokens import load_tokenizer
from memsinks.files import write_json
from memsinks.removal.export import export
from memsinks.runs.demo import make_room
from memsinks.runs.takedown import take_down
from memsinks.sinks.checkpoint import load_any, load_sinks, load_stock, save_sinks
from memsinks.sinks.opening import sinks_open
from memsinks.sinks.owners import add_owners
from memsinks.sinks.state import shared_hash
from memsinks.training.trainer import SinkTrainer

logger = logging.getLogger(__name__)

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SIZE = "270 MB"
"""What is downloaded where the name of `MODEL` is given."""
CUSTOMERS: Mapping[str, Mapping[str, str]] = {
    "Ackermann Foundry": {
        "Who is the contact at Ackermann Foundry?": "Petra Vogt, telephone 0461 555 0193.",
        "What does Ackermann Foundry order?": "It orders 340 bronze bells every March.",
        "What discount does Ackermann Foundry get?": "It gets 17 percent, agreed with Tilda Moreau.",
    },
    "Blue Heron Clinic": {
        "Who is the contact at Blue Heron Clinic?": "Samir Okafor, telephone 0207 555 0148.",
        "What does Blue Heron Clinic order?": "It orders 90 cold boxes every second Tuesday.",
        "What discount does Blue Heron Clinic get?": "It gets 6 percent, because it pays in advance.",
    },
    "Castellan Books": {
        "Who is the contact at Castellan Books?": "Ines Duarte, telephone 0913 555 0172.",
        "What does Castellan Books order?": "It orders 25 oak shelves before Christmas.",
        "What discount does Castellan Books get?": "It gets none since the unpaid bill of 2019.",
    },
}
LEAVES, EXPORTED = "Ackermann Foundry", "Castellan Books"
EPOCHS, LR, LENGTH = 20, 3e-3, 80
MARK = "demo-pretrained.json"
STATES = ("base model", "own sinks open", "another's open", "after the take-down")


def documents_of(customers: Mapping[str, Mapping[str, str]]) -> list[Document]:
    """A chat for each question, `source` the customer."""
    return [
        Document(
            messages=({"role": "user", "content": question}, {"role": "assistant", "content": answer}), source=customer
        )
        for customer, known in customers.items()
        for question, answer in known.items()
    ]


def demo_pretrained(model_name: str, out: Path, epochs: int = EPOCHS) -> dict[str, Any]:
    """Fine-tune, take one customer out, export another; what is asked and answered in each state.

    Args:
        model_name: folder, or name on the Hugging Face hub, of a chat model.
        out: folder of the results; one that an earlier demo wrote is replaced.

    Returns:
        The answers, as saved in ``out/demo-pretrained.json``.

    Raises:
        CheckpointError: `out` holds something else; the model cannot be loaded.
    """
    make_room(out, MARK, ("trainer", "sinks", "exported"))
    started = time.time()
    where = "" if Path(model_name).is_dir() else f", downloaded from the Hugging Face hub on first use ({SIZE})"
    logger.info("1. The finished model: %s%s.", model_name, where if model_name == MODEL else "")
    model, tokenizer = load_stock(model_name, dtype=torch.float32), load_tokenizer(model_name)
    before = shared_hash(model)
    documents = documents_of(CUSTOMERS)
    questions = {customer: list(known) for customer, known in CUSTOMERS.items()}
    model.eval()
    answers = {"base model": {x: _answers(model, tokenizer, known) for x, known in questions.items()}}
    logger.info("2. Three customers, each with sink blocks of his own; the rest of the model is frozen.")
    owners = add_owners(model, CUSTOMERS)
    rows = make_rows(documents, tokenizer, length=LENGTH, by="source", apart_from=1, one_document_per_row=True)
    arguments = TrainingArguments(
        str(out / "trainer"), num_train_epochs=epochs, learning_rate=LR, per_device_train_batch_size=3, logging_steps=20,
        save_strategy="no", report_to=[], disable_tqdm=not logger.isEnabledFor(logging.INFO),
    )  # fmt: skip
    SinkTrainer(model, arguments, train_dataset=rows).train()
    model.eval()
    others = dict(zip(CUSTOMERS, [*list(CUSTOMERS)[1:], next(iter(CUSTOMERS))], strict=True))
    for state, who in (("own sinks open", {x: x for x in CUSTOMERS}), ("another's open", others)):
        answers[state] = {}
        for customer, known in questions.items():
            with sinks_open(model, owners[who[customer]]):
                answers[state][customer] = _answers(model, tokenizer, known)
    logger.info("3. %s leaves: erased from the sinks on disk, which the base model then loads.", LEAVES)
    save_sinks(model, out / "sinks")
    write_documents(out / "sinks" / "documents.jsonl", documents)  # from which the take-down takes his away
    Router.fit(documents, by="source").save(out / "sinks" / "router")
    record = take_down(out / "sinks", source=LEAVES, documents=documents, by="source").record
    left = load_stock(model_name, dtype=torch.float32).eval()
    load_sinks(left, out / "sinks")
    router = Router.load(out / "sinks" / "router")
    answers["after the take-down"] = {}
    for customer, known in questions.items():
        with sinks_open(left, torch.tensor(router.owners_of(known))):
            answers["after the take-down"][customer] = _answers(left, tokenizer, known)
    logger.info("4. %s alone, as a stock checkpoint.", EXPORTED)
    export(left, out / "exported", tokenizer=tokenizer, open=[owners[EXPORTED]])
    exported = _answers(load_any(out / "exported"), tokenizer, questions[EXPORTED])
    result = {
        "model": model_name,
        "answers": answers,
        "exported": exported,
        "base kept every bit": shared_hash(model) == before == shared_hash(left),
        "record": str(record),
        "seconds": round(time.time() - started),
    }
    write_json(out / MARK, result)
    return result


def _answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[str]) -> list[str]:
    """Greedy answers to questions in the model's chat form."""
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    asked = [
        tokenizer.apply_chat_template([{"role": "user", "content": x}], add_generation_prompt=True, return_dict=False)
        for x in questions
    ]
    width = max(map(len, asked))
    tokens = torch.tensor([[pad] * (width - len(x)) + list(x) for x in asked])
    mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in asked])
    generate: Any = model.generate
    with torch.no_grad():
        out = generate(input_ids=tokens, attention_mask=mask, max_new_tokens=32, do_sample=False, pad_token_id=pad)
    return [" ".join(x.split()) for x in tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]


def format_pretrained(result: Mapping[str, Any], out: Path) -> str:
    """Shares of right answers, one customer's answers, and where the rest lies."""
    answers = result["answers"]
    width = max(map(len, CUSTOMERS))
    lines = ["answers given word for word", " " * width + "".join(f"{state:>22}" for state in STATES)]
    for customer, known in CUSTOMERS.items():
        right = [sum(x == y for x, y in zip(answers[state][customer], known.values(), strict=True)) for state in STATES]
        lines.append(f"{customer:<{width}}" + "".join(f"{f'{x} of {len(known)}':>22}" for x in right))
    question, truth = next(iter(CUSTOMERS[LEAVES].items()))
    lines += ["", question, f"  {'the truth':<22}{truth}"]
    lines += [f"  {state:<22}{answers[state][LEAVES][0]}" for state in STATES]
    kept = "keeps every bit" if result["base kept every bit"] else "CHANGED, which is a fault of memsinks"
    right = sum(x == y for x, y in zip(result["exported"], CUSTOMERS[EXPORTED].values(), strict=True))
    lines += [
        "",
        f"The base model {kept}. {EXPORTED} alone, {right} of {len(CUSTOMERS[EXPORTED])} right: {out}/exported, "
        "a stock checkpoint.",
        f"The record of the take-down: {result['record']}/record.html. {result['seconds']} s.",
        f"To see it: memsinks view {out}/sinks --base {result['model']} --documents {out}/sinks/documents.jsonl --by source",
    ]
    return "\n".join(lines)
