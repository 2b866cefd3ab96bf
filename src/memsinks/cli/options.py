"""What several commands share: how a command is added, and options that mean the same everywhere."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from memsinks.errors import ConfigError

Commands = Any  # argparse's name for what add_subparsers gives is private
Run = Callable[[argparse.Namespace], None]

SAME_AGAIN = "the same command goes on where it stopped"


def add_command(
    commands: Commands, name: str, run: Run, help: str, description: str, again: Callable[[Any], str] = lambda _: ""
) -> argparse.ArgumentParser:
    """A command with its function.

    Args:
        again: arguments -> how to go on after Ctrl-C, "" where there is nothing to go on with.
    """
    parser = commands.add_parser(name, help=help, description=description)
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress; results, warnings and errors alone")
    parser.set_defaults(run=run, again=again)
    return parser


def add_changes(parser: argparse.ArgumentParser) -> None:
    """Options that change what a YAML file says."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting: training.lr=1e-3"
    )
    parser.add_argument("--scale", help="make everything smaller first: 1/64 is a try-out in minutes")


def changes_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """`changes` and `scale` of a YAML file that is read."""
    from memsinks.runs.shrink import parse_scale

    changes = {}
    for text in arguments.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set needs KEY=VALUE, got {text!r}")
        changes[name] = value
    return {"changes": changes, "scale": parse_scale(arguments.scale) if arguments.scale else None}


def add_documents(parser: argparse.ArgumentParser) -> None:
    """Options for the documents of an audit, and what is asked of them."""
    parser.add_argument(
        "--documents", required=True, help="documents the model may remember (jsonl, parquet, txt, folder)"
    )
    parser.add_argument("--controls", required=True, help="documents of the same kind that it never saw")
    parser.add_argument("--text-field", default="text", help="field that holds the text (%(default)s)")
    parser.add_argument("--copies-field", help="field that says how often a document was trained on; 1 without it")
    parser.add_argument("--prefix", type=int, default=32, help="tokens given (%(default)s)")
    parser.add_argument("--continuation", type=int, default=32, help="tokens that must come out (%(default)s)")


def count(text: str) -> int:
    """An argument that is an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number
