"""verify: the record of a take-down."""

from __future__ import annotations

from argparse import Namespace

from memsinks.cli.options import Commands, add_command


def add_verify(commands: Commands) -> None:
    parser = add_command(
        commands,
        "verify",
        run_verify,
        "check the record of a take-down",
        "Check that the parts of a record fit together, that it was signed with a key, and that the files of the run are as it "
        "says. Prints a line for each check; needs no network. Ends with status 0 only if nothing fails. Without --public-key it "
        "does not show who wrote the record.",
    )
    parser.add_argument("record", help="the folder of a record")
    parser.add_argument("--run", metavar="RUN", dest="run_folder", help="the run folder that it is of")
    parser.add_argument(
        "--public-key", metavar="FILE", help="PEM, from whoever signs; a record without signature then fails"
    )


def run_verify(arguments: Namespace) -> None:
    from memsinks.errors import CheckpointError
    from memsinks.removal.record import verify_record

    checks = verify_record(arguments.record, run=arguments.run_folder, public_key=arguments.public_key)
    marks = {True: "ok", False: "FAILED", None: "not checked"}
    for check in checks:
        print(f"{marks[check.ok]:<12} {check.name}: {check.detail}")
    failed = [f"{check.name}: {check.detail}" for check in checks if check.ok is False]
    if failed:
        raise CheckpointError(f"{arguments.record} does not hold: {'; '.join(failed)}")
