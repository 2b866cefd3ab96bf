"""export, info: a checkpoint."""

from __future__ import annotations

from argparse import Namespace

from memsinks.cli.options import Commands, add_command


def add_export(commands: Commands) -> None:
    parser = add_command(
        commands,
        "export",
        run_export,
        "write a plain checkpoint without sinks, or with those of chosen documents",
        "Write the model without its sinks into an empty folder, load it in a fresh process without memsinks, compare "
        "logits, and write a model card. With --open the sinks of those documents stay, as ordinary neurons of a wider MLP.",
    )
    parser.add_argument("checkpoint", help="a checkpoint folder with sinks")
    parser.add_argument("directory", help="an empty or new folder")
    parser.add_argument(
        "--open",
        nargs="+",
        metavar="ID",
        help="whose sinks stay: document ids, key:NAME or source:NAME; the model card names them",
    )
    parser.add_argument(
        "--rescale",
        choices=("none", "expected", "released"),
        default="none",
        help="factor of the general neurons, for the published method (%(default)s)",
    )
    parser.add_argument("--notes", default="", help="text for the model card")


def run_export(arguments: Namespace) -> None:
    from memsinks.data.tokens import has_tokenizer, load_tokenizer
    from memsinks.removal.export import export
    from memsinks.sinks.checkpoint import load

    documents = None if arguments.open is None else {text: document_to_open(text) for text in arguments.open}
    model = load(arguments.checkpoint)
    tokenizer = load_tokenizer(arguments.checkpoint) if has_tokenizer(arguments.checkpoint) else None
    if tokenizer is None:
        print("no tokenizer beside the checkpoint: none is exported")
    folder = export(
        model,
        arguments.directory,
        tokenizer=tokenizer,
        open=documents,
        rescale=arguments.rescale,
        notes=arguments.notes,
    )
    print(f'{folder}: checked in a fresh process; AutoModelForCausalLM.from_pretrained("{folder}") loads it')


def document_to_open(text: str) -> int:
    """The document id that an argument names: a number, key:NAME or source:NAME; ConfigError for anything else."""
    from memsinks.data.identity import document_id
    from memsinks.errors import ConfigError

    by, colon, name = text.partition(":")
    if colon and name and (by == "key" or by == "source"):
        return document_id(name, by=by)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--open takes document ids, key:NAME or source:NAME, got {text!r}") from None


def add_info(commands: Commands) -> None:
    parser = add_command(commands, "info", run_info, "what a checkpoint holds", "Print the sink settings and sizes.")
    parser.add_argument("checkpoint", help="a checkpoint folder with sinks")


def run_info(arguments: Namespace) -> None:
    from memsinks.sinks.checkpoint import describe

    print(describe(arguments.checkpoint))
