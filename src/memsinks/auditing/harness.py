"""A task for lm-evaluation-harness: the same extraction and loss gap, measured by a program that is not ours.

The harness is given texts, not tokens: it encodes prompt + continuation, takes as many tokens off the front as the prompt
alone has, and moves spaces at the end of the prompt into the continuation. A text is therefore cut only where both
encode to exactly the document's own tokens.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from memsinks._version import __version__
from memsinks.auditing.corpus import Corpus, read_corpus
from memsinks.auditing.settings import AuditSettings
from memsinks.data.documents import Document
from memsinks.data.tokens import token_offsets
from memsinks.errors import CheckpointError, ConfigError, DataError
from memsinks.files import written_beside

# 0.4.10 is the first lm-eval that can be imported beside transformers 5.
TASK = """\
# A task for lm-evaluation-harness (0.4.10 or newer) and for models with the tokenizer it was written with.
# The folder can be moved; its files belong together.
task: NAME
custom_dataset: !function utils.load
test_split: test
output_type: loglikelihood
doc_to_text: prompt
doc_to_target: continuation
target_delimiter: ""
num_fewshot: 0
process_results: !function utils.process_results
metric_list:
  - {metric: extracted, aggregation: !function utils.documents, higher_is_better: false}
  - {metric: extracted_controls, aggregation: !function utils.controls, higher_is_better: false}
  - {metric: loss_documents, aggregation: !function utils.documents, higher_is_better: null}
  - {metric: loss_controls, aggregation: !function utils.controls, higher_is_better: false}
  - {metric: loss_gap, aggregation: !function utils.gap, higher_is_better: false}
metadata: METADATA
"""

UTILS = '''\
"""What the task beside this file calls: its data, its figures of one line, and their means over documents or controls."""

import json
from pathlib import Path

import datasets


def load(**_):
    with (Path(__file__).parent / "documents.jsonl").open(encoding="utf-8") as file:
        return {"test": datasets.Dataset.from_list([json.loads(line) for line in file])}


def process_results(doc, results):
    """Each figure as (is it a control, value): the means below choose a side. Losses in nats per token."""
    log_probability, greedy = results[0]
    control = doc["copies"] == 0
    hit, loss = (control, float(greedy)), (control, -log_probability / doc["continuation_tokens"])
    return {
        "extracted": hit, "extracted_controls": hit, "loss_documents": loss, "loss_controls": loss, "loss_gap": loss,
    }


def _mean(values):
    return sum(values) / len(values) if values else float("nan")


def documents(items):
    return _mean([value for control, value in items if not control])


def controls(items):
    return _mean([value for control, value in items if control])


def gap(items):
    return controls(items) - documents(items)
'''


def write_lm_eval_task(
    documents: Sequence[Document],
    controls: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    *,
    name: str = "memsinks",
    prefix: int = 32,
    continuation: int = 32,
) -> Path:
    """Write a folder with a task for lm-evaluation-harness, which runs where memsinks is not installed.

    The task reports `extracted` and `extracted_controls` (share whose `continuation` tokens are all the model's first
    choice after the true ones before), `loss_documents`, `loss_controls` (mean over documents of the mean over these
    tokens, nats) and `loss_gap` (controls less documents). A checkpoint with sinks is read with its sinks closed.

    Figures agree with `score` and `extracted` to rounding; for a model in half precision only with
    ``--model_args ...,softmax_dtype=float32``. Chat templates and system prompts would change what is read. A prompt that
    does not fit into the model's context is cut by the harness, with a warning.

    Args:
        documents: what a model may remember, with their `copies`.
        controls: documents of the same kind that were not trained on; written with 0 copies.
        tokenizer: a fast one, the model's; the task is for models with this tokenizer only.
        folder: new or empty. NAME.yaml, utils.py and documents.jsonl: `prompt`, `continuation`, `prefix_tokens`,
            `continuation_tokens`, `copies`, `key`.
        name: of the task.
        prefix: tokens given. A text that cannot be cut there is cut at the next place where it can.
        continuation: tokens that must come out; a document's end token is not among them.

    Returns:
        The folder. What is left out, because it is too short or can be cut nowhere, is one warning with its number; the
        numbers stand in the task's metadata, and so in every result of it.

    Raises:
        ConfigError: `name`, `prefix` or `continuation` out of range; a tokenizer without offsets, or one that puts more
            than a start token around a text.
        DataError: an empty side, or one of which nothing is left; a document with 0 copies; a text on both sides.
        CheckpointError: `folder` is not empty or cannot be written.
    """
    target = Path(folder)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ConfigError(f"name must be letters, digits and ._- and begin with a letter or digit, got {name!r}")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(f"{target} is not an empty folder; write the task into a new one")
    settings = AuditSettings(prefix=prefix, continuation=continuation, end=False)
    _check_tokenizer(tokenizer)
    corpus = read_corpus(documents, controls, tokenizer, settings)
    lines, left_out = _lines(corpus, tokenizer, prefix, continuation)
    counts = [sum(bool(line["copies"]) == side for line in lines) for side in (True, False)]
    warning = _left_out(counts, [len(documents), len(controls)], left_out, f"{continuation} tokens after {prefix}")
    if warning:
        warnings.warn(warning, stacklevel=2)
    metadata = {
        "version": 1,
        "memsinks": __version__,
        "prefix": prefix,
        "continuation": continuation,
        "documents": counts[0],
        "controls": counts[1],
        "left_out": left_out,
        "start_token": bool(len(corpus.start)),
        "texts_sha256": corpus.sha256,
    }
    with written_beside(target) as part:
        task = TASK.replace("METADATA", json.dumps(metadata)).replace("NAME", json.dumps(name))
        (part / f"{name}.yaml").write_text(task, encoding="utf-8")
        (part / "utils.py").write_text(UTILS, encoding="utf-8")
        with (part / "documents.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return target


def _left_out(counts: list[int], given: list[int], left_out: dict[str, int], asked: str) -> str:
    """What is said of texts that are left out, "" if none is; DataError for a side of which nothing is left."""
    reasons = f"{left_out['too_short']} have fewer tokens, {left_out['cut_nowhere']} change their tokens wherever cut"
    for count, before, what in zip(counts, given, ("documents", "controls"), strict=True):
        if not count:
            raise DataError(
                f"none of the {before} {what} can be asked for {asked} (of all texts {reasons}); lower prefix or continuation"
            )
    if counts == given:
        return ""
    return (
        f"left out {given[0] - counts[0]} of {given[0]} documents and {given[1] - counts[1]} of {given[1]} controls, which "
        f"cannot be asked for {asked}: {reasons}"
    )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} does not say where in a text its tokens stand; give a fast tokenizer "
            "(one with a tokenizer.json)"
        )
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    if whole not in (plain, [tokenizer.bos_token_id, *plain]):
        raise ConfigError(
            f"the tokenizer puts more than a start token around a text: 'a' gives {whole} instead of {plain}. "
            "lm-evaluation-harness cannot cut such texts; give the tokenizer of a causal language model"
        )


def _lines(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, prefix: int, continuation: int
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """A line for each document that can be cut, and how many were left out, by reason."""
    start, lines, left_out = corpus.start.tolist(), [], {"too_short": 0, "cut_nowhere": 0}
    for document, tokens, copies in zip(corpus.documents, corpus.tokens, corpus.copies.tolist(), strict=True):
        if len(tokens) < prefix + continuation:
            left_out["too_short"] += 1
            continue
        found = _cut(document.text, start, [*start, *tokens.tolist()], tokenizer, prefix, continuation)
        if found is None:
            left_out["cut_nowhere"] += 1
            continue
        length, cut, end = found
        lines.append(
            {
                "prompt": document.text[:cut],
                "continuation": document.text[cut:end],
                "prefix_tokens": length,
                "continuation_tokens": continuation,
                "copies": copies,
                "key": document.key,
            }
        )
    return lines, left_out


def _cut(
    text: str, start: list[int], tokens: list[int], tokenizer: PreTrainedTokenizerBase, prefix: int, continuation: int
) -> tuple[int, int, int] | None:
    """(length, cut, end): the least length >= prefix such that text[:cut] encodes to the first `length` tokens of the text
    and text[:end] to `continuation` more; None if there is none.

    start: the start token or nothing. tokens: `start` and the text's own.
    """

    def encode(part: str) -> list[int]:
        return tokenizer(part, verbose=False)["input_ids"]  # as the harness does

    offsets = token_offsets(tokenizer, text)
    # A special token spelled out is one token for the harness and several for us: only places before it will do.
    theirs = encode(text)
    same = min(len(theirs), len(tokens))
    same = next((i for i in range(same) if theirs[i] != tokens[i]), same)
    for length in range(prefix, same - len(start) - continuation + 1):
        cut, end = offsets[length - 1][1], offsets[length + continuation - 1][1]
        if cut and not text[cut - 1].isspace():
            split = len(start) + length
            if encode(text[:cut]) == tokens[:split] and encode(text[:end]) == tokens[: split + continuation]:
                return length, cut, end
    return None
