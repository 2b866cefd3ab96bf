"""view: a local page on a run."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from memsinks.cli.options import Commands, add_command


def add_view(commands: Commands) -> None:
    parser = add_command(
        commands,
        "view",
        run_view,
        "see what a model remembers, in the browser",
        "Serve a page on this machine alone: what the ordinary model, the model with chosen sinks open and the model without "
        "sinks write after a prompt, how surely they knew each token, and taking one owner out. "
        "Ctrl-C ends it; a take-down that has begun is finished first.",
    )
    parser.add_argument("folder", metavar="RUN", help="folder of a run or of the demo, of a model, or of sinks alone")
    parser.add_argument("--ordinary", metavar="MODEL", help="the ordinary model, beside it (the demo's is found)")
    parser.add_argument("--base", metavar="MODEL", help="the model that sinks alone were trained beside")
    parser.add_argument("--documents", metavar="FILE", help="documents, where RUN is no run of a recipe")
    parser.add_argument(
        "--by", choices=("content", "key", "source"), default="content", help="what their ids were made of"
    )
    parser.add_argument("--tokenizer", metavar="FOLDER", help="folder or name; default: beside the model")
    parser.add_argument("--port", type=_port, default=0, help="0 = any that is free (%(default)s)")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**16:
        raise argparse.ArgumentTypeError(f"must be 0 to 65535, got {text}")
    return number


def run_view(arguments: Namespace) -> None:
    from memsinks.viewer.server import ViewServer
    from memsinks.viewer.view import open_view

    names = ("base", "ordinary", "documents", "by", "tokenizer")
    view = open_view(arguments.folder, **{name: getattr(arguments, name) for name in names})
    with ViewServer(view, arguments.port) as server:
        print(f"{server.address}\nfor this machine alone; Ctrl-C ends it", flush=True)
        with nullcontext() if arguments.no_browser else _browser_opened(server.address):
            try:
                server.serve_forever()
            finally:
                if view.takedowns.locked():
                    print("a take-down has begun and is finished first", file=sys.stderr)
                view.end()


@contextmanager
def _browser_opened(address: str) -> Iterator[None]:
    """A browser is shown a file that leads to the address, while the server answers.

    Other users of the machine see what a browser is started with, and the address holds the token; the file is this user's alone.
    It lies in the home folder because browsers in a sandbox see no other.
    """
    import tempfile
    import threading
    import webbrowser

    try:
        descriptor, name = tempfile.mkstemp(prefix="memsinks-view-", suffix=".html", dir=Path.home())
    except (OSError, RuntimeError) as error:  # no home folder, or none that can be written
        print(f"no browser is opened ({error}); open the address above", file=sys.stderr)
        yield
        return
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(f'<!doctype html><title>memsinks</title><meta http-equiv="refresh" content="0; url={address}">')
        threading.Thread(target=webbrowser.open, args=(Path(name).as_uri(),), daemon=True).start()
        yield
    finally:
        Path(name).unlink(missing_ok=True)
