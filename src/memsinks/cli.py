"""The command line: parses, calls, prints."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ._version import __version__
from .config import MemsinksError

DESCRIPTION = """\
Train language models whose memorization can be taken out again.

  memsinks demo                          the whole journey on the built-in corpus, in minutes
  memsinks train recipes/tinystories.yaml
  memsinks audit runs/NAME/model --state closed --documents members.jsonl --controls heldout.jsonl
  memsinks export runs/NAME/model clean/ a plain checkpoint without sinks
  memsinks info runs/NAME/model          what a checkpoint holds
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status. Errors made on purpose are one line on stderr and status 2."""
    arguments = _parser().parse_args(argv)
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
        "and show what each model recites. About two minutes on two idle cores."
    ))  # fmt: skip
    demo.add_argument("--out", default="runs/demo", help="folder for the runs, the table and the picture (%(default)s)")
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="run a recipe", description=(
        "Train as a YAML recipe says. The run folder holds the recipe, versions, metrics, checkpoints and the model."
    ))  # fmt: skip
    train.add_argument("recipe", help="YAML file; its keys are checked before anything starts")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting: training.lr=1e-3"
    )
    train.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint")
    train.set_defaults(run=_train)

    audit = commands.add_parser("audit", help="loss and verbatim extraction of documents", description=(
        "Score documents against controls the model never saw: mean loss per token, and the share whose continuation comes "
        "out verbatim, by number of copies."
    ))  # fmt: skip
    audit.add_argument("model", help="a checkpoint folder or name, with or without sinks")
    audit.add_argument(
        "--documents", required=True, help="documents the model may remember (jsonl, parquet, txt, folder)"
    )
    audit.add_argument("--controls", required=True, help="documents of the same kind that it never saw")
    audit.add_argument("--state", choices=("open", "closed"), help="of the sinks; required for a model that has them")
    audit.add_argument("--prefix", type=int, default=32, help="tokens given (%(default)s)")
    audit.add_argument("--continuation", type=int, default=32, help="tokens that must come out (%(default)s)")
    audit.add_argument(
        "--identity", choices=("content", "key", "source"), default="content", help="what ids were made of"
    )
    audit.add_argument("--text-field", default="text", help="field that holds the text (%(default)s)")
    audit.add_argument("--copies-field", help="field that says how often a document was trained on; 1 without it")
    audit.add_argument("--key-field", help="field that holds the key, for --identity key")
    audit.add_argument("--source-field", help="field that holds the source, for --identity source")
    audit.add_argument("--limit", type=_count, help="score at most so many documents of each side")
    audit.add_argument("--out", help="also write the result as JSON")
    audit.set_defaults(run=_audit)

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


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _demo(arguments: argparse.Namespace) -> None:
    from .demo import demo

    demo(Path(arguments.out))


def _train(arguments: argparse.Namespace) -> None:
    from .config import ConfigError
    from .recipe import read_recipe
    from .run import train

    changes = {}
    for text in arguments.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set needs KEY=VALUE, got {text!r}")
        changes[name] = value
    folder = train(read_recipe(arguments.recipe, changes), resume=arguments.resume)
    run = folder.parent
    print(
        f"\nmodel: {folder}\naudit: memsinks audit {folder} --documents {run}/members.jsonl --copies-field copies "
        f"--controls {run}/controls.jsonl --state closed"
    )


def _audit(arguments: argparse.Namespace) -> None:
    from itertools import islice

    from .audit import audit
    from .checkpoint import load_any
    from .documents import read_documents
    from .tokens import load_tokenizer

    fields = {name: getattr(arguments, name) for name in ("text_field", "key_field", "source_field")}
    documents = list(
        islice(read_documents(arguments.documents, copies_field=arguments.copies_field, **fields), arguments.limit)
    )
    controls = list(islice(read_documents(arguments.controls, **fields), arguments.limit))
    model, tokenizer = load_any(arguments.model), load_tokenizer(arguments.model)
    result = audit(
        model, documents, controls, tokenizer, state=arguments.state, identity=arguments.identity,
        prefix=arguments.prefix, continuation=arguments.continuation,
    )  # fmt: skip
    print(result)
    if arguments.out:
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.out).write_text(json.dumps(result.to_dict(), indent=2) + "\n")


def _export(arguments: argparse.Namespace) -> None:
    from .checkpoint import load
    from .config import ConfigError
    from .export import export
    from .tokens import load_tokenizer

    model = load(arguments.checkpoint)
    try:
        tokenizer = load_tokenizer(arguments.checkpoint)
    except ConfigError:
        tokenizer = None
        print("no tokenizer beside the checkpoint: none is exported")
    folder = export(model, arguments.directory, tokenizer=tokenizer, rescale=arguments.rescale, notes=arguments.notes)
    print(f'{folder}: checked in a fresh process; AutoModelForCausalLM.from_pretrained("{folder}") loads it')


def _info(arguments: argparse.Namespace) -> None:
    from .checkpoint import describe

    print(describe(arguments.checkpoint))


if __name__ == "__main__":
    sys.exit(main())
