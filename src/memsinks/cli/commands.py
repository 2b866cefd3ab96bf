"""All commands, in the order of the help."""

from __future__ import annotations

import argparse

from memsinks._version import __version__
from memsinks.cli.audits import add_audit, add_lm_eval_task
from memsinks.cli.checkpoints import add_export, add_info
from memsinks.cli.comparisons import add_compare, add_reproduce
from memsinks.cli.corpora import add_prepare
from memsinks.cli.records import add_verify
from memsinks.cli.runs import add_demo, add_estimate, add_train
from memsinks.cli.takedowns import add_takedown
from memsinks.cli.viewing import add_view

DESCRIPTION = """\
Train language models whose memorization can be taken out again.

  memsinks demo                          the whole journey on the built-in corpus, in minutes
  memsinks demo --pretrained             owners in a finished model, one of whom leaves
  memsinks train recipes/tinystories.yaml
  memsinks estimate recipes/paper/smollm-360m-1b.yaml --gpu H100
  memsinks audit runs/NAME/model@closed --documents members.jsonl --controls heldout.jsonl --out report/
  memsinks lm-eval-task runs/NAME/model --documents members.jsonl --controls heldout.jsonl --out task/
  memsinks prepare texts/ --out corpus/ --tokenizer TOKENIZER --near-copies
  memsinks compare recipes/compare-tinystories.yaml
  memsinks reproduce fig4                the paper's controlled study, figure by figure
  memsinks export runs/NAME/model clean/ a plain checkpoint without sinks
  memsinks info runs/NAME/model          what a checkpoint holds
  memsinks takedown runs/NAME --key alice  one owner out of a run, in every file of it or in none
  memsinks view runs/demo                see what each model writes, in the browser
  memsinks verify RECORD --run RUN       check the record of a take-down
"""


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it gives has `run`, `again` and `quiet`, see `add_command`."""
    whole = argparse.ArgumentParser(
        prog="memsinks", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole.add_argument("--version", action="version", version=f"memsinks {__version__}")
    commands = whole.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        add_demo,
        add_train,
        add_estimate,
        add_audit,
        add_lm_eval_task,
        add_prepare,
        add_compare,
        add_reproduce,
        add_export,
        add_info,
        add_view,
        add_takedown,
        add_verify,
    ):
        add(commands)
    return whole
