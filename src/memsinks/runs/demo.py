"""The whole journey in a few minutes: an ordinary model and the same model with sinks, before and after removal."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from memsinks.auditing.audit import audit
from memsinks.auditing.extraction import generate_continuation
from memsinks.auditing.model_result import AuditLine
from memsinks.auditing.pictures import require_matplotlib
from memsinks.auditing.result import verdict
from memsinks.auditing.settings import AuditSettings
from memsinks.auditing.subjects import Subject
from memsinks.batch import NO_SINKS
from memsinks.data.documents import Document, load_documents
from memsinks.data.identity import document_id
from memsinks.data.packing import pack
from memsinks.data.synthetic import private_start
from memsinks.data.tokens import encode, load_tokenizer
from memsinks.errors import CheckpointError
from memsinks.files import read_json, write_json
from memsinks.removal.export import export
from memsinks.runs.side_by_side import train_side_by_side
from memsinks.sinks.checkpoint import load
from memsinks.training.evaluate import losses

logger = logging.getLogger(__name__)

RECIPE: Mapping[str, Any] = {
    "data": {
        "synthetic": {
            "stories": 2000,
            "people_per_level": 8,
            "people_once": 300,
            "people_held_out": 100,
            "near_copies": 0,
            "canaries_per_level": 0,
        }
    },
    "tokenizer": {"vocab_size": 1024},
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        }
    },
    "training": {"length": 320, "batch_rows": 3, "lr": 3e-3, "log_every": 50},
}
WITH_SINKS: Mapping[str, Any] = {"sinks": {"neurons": 2048, "active": 128}}
"""What the second model has in its recipe beside the first's."""
GENERATED = 4
"""Records that each model is made to write, beside the teacher-forced figure: less than an audit's, to save time."""
AFTER = 0.6
"""How long what comes after training takes, in times of it."""
MARK = "demo.json"
NAMES = {"ordinary": "ordinary model", "open": "with sinks, open", "removed": "sinks removed"}


def demo(out: Path, recipe: Mapping[str, Any] = RECIPE) -> dict[str, Any]:
    """Train both models, remove the sinks, and save table, picture and one record.

    Args:
        out: folder of the results; one that an earlier demo wrote is replaced.
        recipe: the recipe without output and sinks.

    Returns:
        The figures, as saved in ``out/demo.json``.

    Raises:
        CheckpointError: `out` holds something else, or cannot be written.
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    make_room(out, MARK, ("ordinary", "sinks", "clean", "report"))
    started = time.time()
    logger.info(
        "1. Two models, trained side by side on stories and on records of invented people, some of them repeated:"
    )
    logger.info("   an ordinary one, and the same with memorization sinks. Same data, same order.")
    plain = {**recipe, "output": str(out / "ordinary")}
    with_them = {**recipe, "output": str(out / "sinks"), **WITH_SINKS}
    ordinary, with_sinks = train_side_by_side({"   ordinary    ": plain, "   with sinks  ": with_them}, after=AFTER)
    logger.info("2. Removal: the stock part alone is written as a plain checkpoint and loaded in a fresh process.")
    sink_model, tokenizer = load(with_sinks), load_tokenizer(with_sinks)
    clean = export(sink_model, out / "clean", tokenizer=tokenizer, notes="Trained by `memsinks demo` on invented text.")
    models = {
        "ordinary": AutoModelForCausalLM.from_pretrained(ordinary).eval(),
        "open": sink_model,
        "removed": AutoModelForCausalLM.from_pretrained(clean).eval(),
    }
    logger.info("3. What does each model remember?")
    members, controls = (load_documents(out / "ordinary" / f"{name}.jsonl") for name in ("members", "controls"))
    result = measure_models(models, members, controls, tokenizer, out / "report")
    result["record"] = one_record(models, members, tokenizer)
    result["with_sinks"] = dict(WITH_SINKS)
    result["repeats"] = round(1 - len(members) / sum(x.copies for x in members), 3)
    result["runs"] = {name: read_json(out / name / "run.json") for name in ("ordinary", "sinks")}
    result["seconds"] = round(time.time() - started)
    write_json(out / MARK, result)
    (out / "table.md").write_text(format_table(result) + "\n")
    draw(result, out / "extraction.png")
    return result


def make_room(out: Path, mark: str, folders: Sequence[str]) -> None:
    """An empty folder for a demo whose record is `mark`; of an earlier one its `folders` are removed, and nothing else."""
    if out.exists() and any(out.iterdir()):
        if not (out / mark).is_file():
            raise CheckpointError(f"{out} is not empty and not an earlier demo; choose another folder with --out")
        for name in folders:
            shutil.rmtree(out / name, ignore_errors=True)
    write_json(out / mark, {})


def measure_models(
    models: Mapping[str, PreTrainedModel],
    members: list[Document],
    controls: list[Document],
    tokenizer: PreTrainedTokenizerBase,
    report: Path,
) -> dict[str, Any]:
    """Held-out loss of the stories; loss and extraction of the records' private parts, by number of copies.

    Args:
        report: folder for the report on the records.
    """
    records, unseen = ([x for x in side if x.kind == "record"] for side in (members, controls))
    new_stories = [x for x in controls if x.kind == "story"]
    subjects = {name: Subject(model, "open" if name == "open" else None, NAMES[name]) for name, model in models.items()}
    found = audit(
        subjects["removed"],
        records,
        unseen,
        tokenizer,
        against=subjects["ordinary"],
        others=[subjects["open"]],
        settings=AuditSettings(generate=GENERATED),
        private_start=private_start,
        out=report,
    )
    # A story's sinks never opened in training: it was met once. Its text is scored as the model is used, closed.
    tokens = encode(tokenizer, [x.text for x in new_stories])
    ids, once = np.full(len(tokens), NO_SINKS), np.ones(len(tokens), np.int64)
    rows = pack(tokens, ids, once, length=max(map(len, tokens)), pad_id=0, one_document_per_row=True)
    return {
        "held_out": {
            name: {"documents": len(rows), "loss": float(losses(model, rows).mean())} for name, model in models.items()
        },
        "records": {
            name: [_figures(line) for line in next(x for x in found.models if x.name == label).lines]
            for name, label in NAMES.items()
        },
        "verdict": verdict(found),
    }


def _figures(line: AuditLine) -> dict[str, Any]:
    return {
        "copies": line.copies,
        "documents": line.documents,
        "loss": line.loss.value,
        "extracted": line.extracted.value,
    }


def one_record(
    models: Mapping[str, PreTrainedModel], members: list[Document], tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    """What each model writes after the name of one of the most repeated persons."""
    records = [x for x in members if x.kind == "record"]
    most = max(x.copies for x in records)
    continuations: dict[str, str] = {}
    for record in (x for x in records if x.copies == most):
        start = private_start(record)
        prompt = encode(tokenizer, [record.text[:start]], end=False)[0]
        length = len(encode(tokenizer, [record.text[start:]])[0])
        continuations = {"prompt": record.text[:start], "truth": record.text[start:], "copies": str(record.copies)}
        for name, model in models.items():
            open_id = document_id(record.text) if name == "open" else None
            tokens = generate_continuation(model, prompt, length, open_id)
            continuations[name] = str(tokenizer.decode(tokens, skip_special_tokens=True))
        if continuations["ordinary"] == continuations["open"] == continuations["truth"]:
            break
    return continuations


def format_result(result: Mapping[str, Any], out: Path) -> str:
    """Table, record and verdict as text, and where the rest lies."""
    return "\n".join(
        [
            format_table(result),
            "",
            format_record(result["record"]),
            "",
            *result["verdict"],
            f"{result['repeats']:.0%} of the documents met in training were repeats; the price is that of such a corpus.",
            "",
            f"{result['seconds']} s. The report: {out}/report/report.html; the picture: {out}/extraction.png",
            f"To see it: memsinks view {out}",
        ]
    )


def format_table(result: Mapping[str, Any]) -> str:
    """The figures as a Markdown table."""
    records, held_out = result["records"], result["held_out"]
    rows = [["records, copies in training", "number", *(f"{label}: loss, recited" for label in NAMES.values())]]
    for place, line in enumerate(records["ordinary"]):
        copies = "never seen" if line["copies"] == 0 else str(line["copies"])
        rows.append([copies, str(line["documents"]), *(_cell(name, records[name][place]) for name in NAMES)])
    stories = ["(sinks closed)" if name == "open" else f"{held_out[name]['loss']:.3f}" for name in NAMES]
    rows.append(["held-out stories, loss", str(held_out["ordinary"]["documents"]), *stories])
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cell(name: str, line: Mapping[str, Any]) -> str:
    """Loss and share recited, "-" where no record was long enough to ask."""
    if name == "open" and line["copies"] <= 1:
        return "(no sinks of its own)"
    recited = "-" if math.isnan(line["extracted"]) else f"{line['extracted']:.0%}"
    return f"{line['loss']:.2f}, {recited}"


def format_record(record: Mapping[str, str]) -> str:
    """One record as text."""
    lines = [f'A record that was trained on {record["copies"]} times. Prompt: "{record["prompt"]}"']
    lines.append(f"  the record        {record['truth'].strip()}")
    lines += [f"  {label:<18}{' '.join(record[name].split())}" for name, label in NAMES.items()]
    return "\n".join(lines)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Extraction against copies, one line a model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    styles = {"ordinary": ("#D55E00", "o", "-"), "open": ("#0072B2", "s", "--"), "removed": ("#009E73", "D", "-")}
    for name, label in NAMES.items():
        lines = result["records"][name]
        color, marker, dash = styles[name]
        axes.plot(
            range(len(lines)),
            [100 * line["extracted"] for line in lines],
            dash,
            color=color,
            marker=marker,
            markersize=7,
            linewidth=2,
            label=label,
            clip_on=False,
            zorder=3,
        )
    levels = [line["copies"] for line in result["records"]["ordinary"]]
    axes.set_xticks(range(len(levels)), ["never\nseen" if level == 0 else str(level) for level in levels])
    axes.set(xlabel="copies of the record in the training text", ylabel="records recited in full (%)", ylim=(0, 100))
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=160)
