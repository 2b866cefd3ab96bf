"""takedown: take one owner out of a run."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from memsinks.cli.options import Commands, add_command
from memsinks.errors import DataError


def add_takedown(commands: Commands) -> None:
    parser = add_command(
        commands,
        "takedown",
        run_takedown,
        "take one document, person, customer or source out of a run",
        "Find the owner, show what would happen, erase his sinks everywhere in the run folder, audit before and after, and write "
        "a record that memsinks verify checks. All of it happens or nothing does.",
        again=lambda _: "the same command finishes it",
    )
    parser.add_argument("folder", metavar="RUN", help="folder that memsinks train wrote")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--key", help="the key of the documents")
    who.add_argument("--id", type=int, help="a document id, as memsinks.document_id gives it")
    who.add_argument("--source", help="the source of the documents")
    who.add_argument("--text", metavar="FILE", help="a file that holds the text")
    parser.add_argument("--dry-run", action="store_true", help="show what would happen, change nothing")
    parser.add_argument("--copies", action="store_true", help="take out those too who have copies of the texts")
    parser.add_argument(
        "--collateral",
        type=float,
        default=None,
        metavar="SHARE",
        help="largest share of somebody else's sink blocks that may be erased (0.05; own blocks: 0)",
    )
    parser.add_argument(
        "--repair",
        type=int,
        default=0,
        metavar="PASSES",
        help="passes over the texts of others who lose blocks, which these blocks alone learn anew (0 = no repair)",
    )
    parser.add_argument("--also", nargs="+", default=[], metavar="FOLDER", help="exports and copies to look through")
    parser.add_argument("--signing-key", metavar="FILE", help="private key (PEM) that signs the record")


def _text(path: Path) -> str:
    """A text as it stands in a file, line ends too."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); give the text as the run has it, in UTF-8") from error


def run_takedown(arguments: Namespace) -> None:
    from memsinks.runs.takedown import MOST_COLLATERAL, TakedownFinished, take_down
    from memsinks.runs.takedown_table import format_takedown

    asked: dict[str, Any] = {name: getattr(arguments, name) for name in ("key", "id", "source")}
    if arguments.text is not None:
        asked["text"] = _text(Path(arguments.text))
    try:
        done = take_down(
            arguments.folder,
            **asked,
            dry_run=arguments.dry_run,
            copies=arguments.copies,
            most_collateral=MOST_COLLATERAL if arguments.collateral is None else arguments.collateral,
            repair_passes=arguments.repair,
            also=arguments.also,
            signing_key=arguments.signing_key,
        )
    except TakedownFinished as finished:
        print(finished)
        return
    print(format_takedown(done))
