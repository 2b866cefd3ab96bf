"""The command line: parses, calls, prints.

A command is two functions that stand together: one adds its parser, the other runs it. Results go to stdout; progress and
errors go to stderr. What a command needs is imported when it runs, so that every import can be interrupted.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from io import TextIOWrapper

from memsinks.errors import MemsinksError


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for an error that is explained in one line, 130 after Ctrl-C.

    A programming error keeps its traceback.
    """
    arguments = Namespace()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names are of any alphabet, a terminal need not be
    try:
        from memsinks.cli.commands import parser
        from memsinks.cli.messages import messages_on_stderr

        arguments = parser().parse_args(argv)
        with messages_on_stderr(arguments.quiet):
            arguments.run(arguments)
            sys.stdout.flush()
    except KeyboardInterrupt:
        again = arguments.again(arguments) if hasattr(arguments, "again") else ""
        print(f"memsinks: interrupted{again and f'; {again}'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return _reader_gone()
    except MemsinksError as error:
        return _failed(str(error))
    except OSError as error:
        from memsinks.cli.messages import explained

        return _failed(explained(error))
    return 0


def _failed(text: str) -> int:
    print("memsinks:", " ".join(text.split()), file=sys.stderr)
    return 2


def _reader_gone() -> int:
    """What read our stdout, such as `head`, has enough; nothing may be written to it at exit."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
