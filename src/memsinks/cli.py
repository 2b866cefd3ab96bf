"""The command line: parses, calls, prints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from memsinks._version import __version__
from memsinks.errors import MemsinksError

DESCRIPTION = """\
Train language models whose memorization can be taken out again.

  memsinks demo                          the whole journey on the built-in corpus, in minutes
  memsinks train recipes/tinystories.yaml
  memsinks estimate recipes/paper/smollm-360m-1b.yaml --gpu H100
  memsinks audit runs/NAME/model@closed --documents members.jsonl --controls heldout.jsonl --out report/
  memsinks lm-eval-task runs/NAME/model --documents members.jsonl --controls heldout.jsonl --out task/
  memsinks prepare recipes/compare-tinystories.yaml
  memsinks compare recipes/compare-tinystories.yaml
  memsinks reproduce fig4                the paper's controlled study, figure by figure
  memsinks export runs/NAME/model clean/ a plain checkpoint without sinks
  memsinks info runs/NAME/model          what a checkpoint holds
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status. Errors made on purpose are one line on stderr and status 2."""
    arguments = _parser().parse_args(argv)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for each of a dozen small loads and saves; ours stay
    try:
        arguments.run(arguments)
    except MemsinksError as error:
        print("memsinks:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = (
            "; the same command with --resume continues from the last checkpoint"
            if hasattr(arguments, "recipe")
            else ""
        )
        print(f"memsinks: interrupted{again}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memsinks", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"memsinks {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    demo = commands.add_parser("demo", help="train, remove and show, on the built-in corpus", description=(
        "Train an ordinary model and the same model with sinks on invented stories and personal records, remove the sinks, "
        "and show what each model recites. Three to six minutes on two cores."
    ))  # fmt: skip
    demo.add_argument("--out", default="runs/demo", help="folder for the runs, the table and the picture (%(default)s)")
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="run a recipe", description=(
        "Train as a YAML recipe says. The run folder holds the recipe, versions, metrics, checkpoints and the model."
    ))  # fmt: skip
    train.add_argument("recipe", help="YAML file; its keys are checked before anything starts")
    _ask_for_changes(train)
    train.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint")
    train.set_defaults(run=_train)

    estimated = commands.add_parser("estimate", help="what a recipe needs, before it runs", description=(
        "Print parameters, tokens, FLOPs, memory by part, time and checkpoint sizes of a recipe or of each arm of a comparison, "
        "what does not fit, and widths that serving tools dislike. Nothing is allocated."
    ))  # fmt: skip
    estimated.add_argument("recipe", help="YAML file: a recipe or a comparison")
    estimated.add_argument("--gpu", default="H100", help="A100, H100 or H200 (%(default)s)")
    estimated.add_argument("--gpus", type=_count, default=1, help="arms run one a GPU (%(default)s)")
    estimated.add_argument("--mfu", type=float, default=0.4, help="share of the GPU's peak (%(default)s)")
    _ask_for_changes(estimated)
    estimated.set_defaults(run=_estimate)

    prepared = commands.add_parser("prepare", help="make the data of a comparison", description=(
        "Make the folder of tokens, documents and tokenizer that all arms of a seed train on, as `compare` would; it may be "
        "copied to a machine that has no network."
    ))  # fmt: skip
    prepared.add_argument("comparison", help="YAML file: a recipe with arms, seeds and roles")
    prepared.add_argument("--seeds", nargs="+", type=int, default=[], metavar="SEED", help="only these")
    _ask_for_changes(prepared)
    prepared.set_defaults(run=_prepare)

    audit = commands.add_parser("audit", help="what a model remembers of documents", description=(
        "Score documents against controls the model never saw: loss, verbatim extraction, membership, by number of copies. "
        "A model is [NAME=]PATH[@open|@closed]; the state of its sinks is required where it has them."
    ))  # fmt: skip
    audit.add_argument("model", help="a checkpoint folder or name, with or without sinks")
    _ask_for_documents(audit)
    audit.add_argument(
        "--out", help="folder for report.html, audit.json, documents.jsonl; continues an interrupted audit"
    )
    audit.add_argument("--state", choices=("open", "closed"), help="of MODEL's sinks, instead of @open or @closed")
    compared = audit.add_argument_group("other models")
    compared.add_argument("--against", metavar="MODEL", help="the ordinary model, or the one before removal")
    compared.add_argument("--twin", metavar="MODEL", help="a model trained without the documents")
    compared.add_argument("--seen-once", metavar="MODEL", help="a model that saw each document once")
    compared.add_argument(
        "--also", metavar="MODEL", action="append", default=[], help="one more, for table and pictures"
    )
    asked = audit.add_argument_group("what is asked")
    asked.add_argument("--prefixes", type=int, nargs="+", default=[8, 16, 32, 64], help="also these (%(default)s)")
    asked.add_argument("--offsets", type=int, nargs="+", default=[0], help="from these tokens on (%(default)s)")
    asked.add_argument("--no-end", action="store_true", help="documents were trained on without an end token")
    asked.add_argument("--generate", type=int, default=16, help="documents also generated, as a check (%(default)s)")
    asked.add_argument("--shown", type=int, default=6, help="documents whose text is in the report (%(default)s)")
    asked.add_argument("--relearn", type=int, default=0, metavar="STEPS", help="fine-tune copies for so many steps")
    asked.add_argument("--relearn-lr", type=float, default=3e-4, help="(%(default)s)")
    asked.add_argument("--margin-loss", type=float, default=0.03, help="of equivalence, nats per token (%(default)s)")
    asked.add_argument("--margin-auc", type=float, default=0.03, help="of equivalence, AUC (%(default)s)")
    read = audit.add_argument_group("how files are read")
    read.add_argument(
        "--by", "--identity", choices=("content", "key", "source"), default="content", help="what ids were made of"
    )
    read.add_argument("--key-field", help="field that holds the key")
    read.add_argument("--source-field", help="field that holds the source")
    read.add_argument("--tokenizer", help="folder, file or name; default: beside MODEL")
    read.add_argument("--limit", type=_count, help="score at most so many documents of each side")
    audit.set_defaults(run=_audit)

    task = commands.add_parser("lm-eval-task", help="write a task for lm-evaluation-harness", description=(
        "Write a folder with a task for lm-evaluation-harness that measures verbatim extraction and loss gap, and print the "
        "command that runs it. It needs no memsinks and reads a checkpoint with its sinks closed."
    ))  # fmt: skip
    task.add_argument("model", help="the model, or its tokenizer alone: texts are cut at its tokens")
    _ask_for_documents(task)
    task.add_argument("--out", required=True, help="an empty or new folder")
    task.set_defaults(run=_lm_eval_task)

    compare = commands.add_parser("compare", help="arms x seeds -> one table", description=(
        "Train every arm of a comparison with every seed (finished runs are kept), audit each seed, and write one table, one "
        "JSON and the picture of forgetting against price."
    ))  # fmt: skip
    compare.add_argument("comparison", help="YAML file: a recipe with arms, seeds and roles")
    compare.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="only these")
    compare.add_argument("--seeds", nargs="+", type=int, default=[], metavar="SEED", help="only these")
    compare.add_argument("--jobs", type=_count, default=1, help="runs at a time, one a GPU (%(default)s)")
    _ask_for_changes(compare)
    compare.add_argument("--dry-run", action="store_true", help="say what would run and for how long")
    compare.add_argument("--train-only", action="store_true", help="train, and leave the audits for later")
    compare.add_argument(
        "--step-times", action="store_true", help="time a step of every arm, in turns, and add it to the table"
    )
    compare.set_defaults(run=_compare)

    again = commands.add_parser("reproduce", help="the paper's controlled study, figure by figure", description=(
        "Train what a published figure needs (finished runs are kept), and write FIGURE.json and FIGURE.png. "
        "--scale small is made for a CPU core, --scale paper is the published size and wants a GPU."
    ))  # fmt: skip
    again.add_argument("figures", nargs="+", metavar="FIGURE", help="fig2, fig3, fig4, fig5, fig7, theory or all")
    again.add_argument("--scale", default="small", help="small, paper or tiny (%(default)s)")
    again.add_argument(
        "--data", help="file of stories; default: $MEMSINKS_DATA/tinystories.jsonl.zst, without it the built-in stories"
    )
    again.add_argument("--out", help="folder for runs, figures and pictures (runs/paper-SCALE)")
    again.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: those of the scale")
    again.add_argument("--threads", type=_count, help="CPU threads; default: torch's choice")
    again.add_argument("--dry-run", action="store_true", help="say what would run and for how long")
    again.add_argument("--finished", action="store_true", help="draw what is there and train nothing")
    again.set_defaults(run=_reproduce)

    export = commands.add_parser("export", help="write a plain checkpoint without sinks", description=(
        "Write the model without its sinks into an empty folder, load it in a fresh process without memsinks, compare "
        "logits, and write a model card."
    ))  # fmt: skip
    export.add_argument("checkpoint", help="a checkpoint folder with sinks")
    export.add_argument("directory", help="an empty or new folder")
    export.add_argument("--rescale", choices=("none", "expected", "released"), default="none",
                        help="factor of the general neurons, for the published method (%(default)s)")  # fmt: skip
    export.add_argument("--notes", default="", help="text for the model card")
    export.set_defaults(run=_export)

    info = commands.add_parser("info", help="what a checkpoint holds", description="Print the sink settings and sizes.")
    info.add_argument("checkpoint", help="a checkpoint folder with sinks")
    info.set_defaults(run=_info)
    return parser


def _ask_for_changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting: training.lr=1e-3"
    )
    parser.add_argument("--scale", help="make everything smaller first: 1/64 is a try-out in minutes")


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """`changes` and `scale` of a recipe that is read."""
    from memsinks.errors import ConfigError
    from memsinks.runs.shrink import parse_scale

    changes = {}
    for text in arguments.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set needs KEY=VALUE, got {text!r}")
        changes[name] = value
    return {"changes": changes, "scale": parse_scale(arguments.scale) if arguments.scale else None}


def _ask_for_documents(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--documents", required=True, help="documents the model may remember (jsonl, parquet, txt, folder)"
    )
    parser.add_argument("--controls", required=True, help="documents of the same kind that it never saw")
    parser.add_argument("--text-field", default="text", help="field that holds the text (%(default)s)")
    parser.add_argument("--copies-field", help="field that says how often a document was trained on; 1 without it")
    parser.add_argument("--prefix", type=int, default=32, help="tokens given (%(default)s)")
    parser.add_argument("--continuation", type=int, default=32, help="tokens that must come out (%(default)s)")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _demo(arguments: argparse.Namespace) -> None:
    from memsinks.runs.demo import demo

    demo(Path(arguments.out))


def _train(arguments: argparse.Namespace) -> None:
    from memsinks.runs.recipe import read_recipe
    from memsinks.runs.run import train

    folder = train(read_recipe(arguments.recipe, **_changes(arguments)), resume=arguments.resume)
    run = folder.parent
    print(
        f"\nmodel: {folder}\naudit: memsinks audit {folder} --documents {run}/members.jsonl --copies-field copies "
        f"--controls {run}/controls.jsonl --state closed"
    )


def _estimate(arguments: argparse.Namespace) -> None:
    from memsinks.research.compare.arm import recipe_of_arm
    from memsinks.research.compare.comparison import read_comparison
    from memsinks.runs.estimate_table import report
    from memsinks.runs.recipe import read_recipe, read_sections

    path, changes = Path(arguments.recipe), _changes(arguments)
    card = {name: getattr(arguments, name) for name in ("gpu", "gpus", "mfu")}
    if "arms" in read_sections(path):
        comparison = read_comparison(path, **changes)
        arms = {arm.name: recipe_of_arm(comparison.recipe, arm) for arm in comparison.arms}
        print(report(comparison.recipe, arms, len(comparison.seeds), **card))
    else:
        print(report(read_recipe(path, **changes), **card))


def _prepare(arguments: argparse.Namespace) -> None:
    from memsinks.research.compare.compare import prepare_data
    from memsinks.research.compare.comparison import read_comparison

    comparison = read_comparison(Path(arguments.comparison), **_changes(arguments))
    for seed in arguments.seeds or comparison.seeds:
        print(prepare_data(comparison, seed))


def _audit(arguments: argparse.Namespace) -> None:
    from itertools import islice

    from memsinks.auditing.audit import audit
    from memsinks.auditing.measure import AuditSettings
    from memsinks.auditing.subjects import Subject
    from memsinks.data.readers import read_documents
    from memsinks.data.tokens import load_tokenizer

    settings = AuditSettings(
        prefix=arguments.prefix, continuation=arguments.continuation, prefixes=tuple(arguments.prefixes),
        offsets=tuple(arguments.offsets), by=arguments.by, end=not arguments.no_end, shown=arguments.shown,
        generate=arguments.generate, margin_loss=arguments.margin_loss, margin_auc=arguments.margin_auc,
    )  # fmt: skip
    fields = {name: getattr(arguments, name) for name in ("text_field", "key_field", "source_field")}
    documents = list(
        islice(read_documents(arguments.documents, copies_field=arguments.copies_field, **fields), arguments.limit)
    )
    controls = list(islice(read_documents(arguments.controls, **fields), arguments.limit))
    against, twin, seen_once = (
        Subject.parse(text) if text else None for text in (arguments.against, arguments.twin, arguments.seen_once)
    )
    result = audit(
        Subject.parse(arguments.model), documents, controls,
        load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None, state=arguments.state, against=against,
        twin=twin, seen_once=seen_once, others=[Subject.parse(text) for text in arguments.also], settings=settings,
        relearn_steps=arguments.relearn, relearn_lr=arguments.relearn_lr, out=arguments.out,
    )  # fmt: skip
    print(result)
    if arguments.out:
        print(f"\n{arguments.out}/report.html")


def _compare(arguments: argparse.Namespace) -> None:
    from memsinks.research.compare.compare import compare, plan, time_steps
    from memsinks.research.compare.comparison import read_comparison

    comparison = read_comparison(Path(arguments.comparison), **_changes(arguments))
    if arguments.dry_run:
        print(plan(comparison, arguments.arms, arguments.seeds, arguments.jobs))
        return
    if arguments.step_times:
        time_steps(comparison)
        return
    command = [arguments.comparison, *(x for text in arguments.set for x in ("--set", text))]
    command += ["--scale", arguments.scale] if arguments.scale else []
    result = compare(
        comparison, arms=arguments.arms, seeds=arguments.seeds, jobs=arguments.jobs, command=command,
        audits=not arguments.train_only,
    )  # fmt: skip
    if result is not None:
        print(f"\n{comparison.recipe.output}: table.md, compare.json, pareto.png, a report a seed")


def _reproduce(arguments: argparse.Namespace) -> None:
    import dataclasses
    import os

    import torch

    from memsinks.research.reproduce.reproduce import open_study, plan, reproduce

    folder = os.environ.get("MEMSINKS_DATA")
    default = Path(folder) / "tinystories.jsonl.zst" if folder else None
    data = Path(arguments.data) if arguments.data else default
    study = open_study(Path(arguments.out or f"runs/paper-{arguments.scale}"), arguments.scale, data)
    study.training = not arguments.finished
    if arguments.seeds:
        study.setting = dataclasses.replace(study.setting, seeds=tuple(arguments.seeds))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.dry_run:
        print(plan(arguments.figures, study))
    else:
        reproduce(arguments.figures, study)


def _lm_eval_task(arguments: argparse.Namespace) -> None:
    from shlex import join

    from memsinks.auditing.harness import write_lm_eval_task
    from memsinks.data.readers import read_documents
    from memsinks.data.tokens import load_tokenizer

    field = arguments.text_field
    folder = write_lm_eval_task(
        list(read_documents(arguments.documents, text_field=field, copies_field=arguments.copies_field)),
        list(read_documents(arguments.controls, text_field=field)), load_tokenizer(arguments.model), arguments.out,
        prefix=arguments.prefix, continuation=arguments.continuation,
    )  # fmt: skip
    model = "MODEL" if Path(arguments.model).is_file() else arguments.model
    print(join([
        "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},softmax_dtype=float32", "--include_path",
        str(folder), "--tasks", "memsinks",
    ]))  # fmt: skip


def _export(arguments: argparse.Namespace) -> None:
    from memsinks.data.tokens import load_tokenizer
    from memsinks.errors import ConfigError
    from memsinks.removal.export import export
    from memsinks.sinks.checkpoint import load

    model = load(arguments.checkpoint)
    try:
        tokenizer = load_tokenizer(arguments.checkpoint)
    except ConfigError:
        tokenizer = None
        print("no tokenizer beside the checkpoint: none is exported")
    folder = export(model, arguments.directory, tokenizer=tokenizer, rescale=arguments.rescale, notes=arguments.notes)
    print(f'{folder}: checked in a fresh process; AutoModelForCausalLM.from_pretrained("{folder}") loads it')


def _info(arguments: argparse.Namespace) -> None:
    from memsinks.sinks.checkpoint import describe

    print(describe(arguments.checkpoint))


if __name__ == "__main__":
    sys.exit(main())
