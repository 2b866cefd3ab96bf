"""The server of the page: this machine alone, a token in every request, no other page of the browser let in.

Bound to 127.0.0.1. A request is answered if its Host is this server's own (against DNS rebinding), its Origin, if it has
one, too, and it carries the token that only the printed address holds (against other pages and other users of the machine).
Scripts, styles and data come from here alone; the page's policy forbids all else.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from memsinks.errors import CheckpointError, ConfigError, MemsinksError
from memsinks.viewer.answers import ANSWERS, STREAMS
from memsinks.viewer.takedowns import record_file
from memsinks.viewer.view import View

logger = logging.getLogger(__name__)

MOST_BYTES = 2**20
"""Of a question."""
MOST_READ = 2**25
"""Bytes of a question that is too long, which are read and thrown away."""
TOKEN = "X-Memsinks-Token"
HOSTS = ("127.0.0.1", "localhost")
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
RECORD_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox; frame-ancestors 'none'"
"""A record is a page without scripts, with its styles inside."""


class ViewServer(ThreadingHTTPServer):
    """Serves a view until it is shut down; a thread a request."""

    daemon_threads = True

    def __init__(self, view: View, port: int = 0) -> None:
        """`port`: 0 = any that is free. CheckpointError if it cannot be had."""
        self.view, self.token = view, secrets.token_urlsafe(24)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise CheckpointError(
                f"cannot listen on 127.0.0.1:{port}: {error}; choose another --port, or leave it out"
            ) from error

    @property
    def address(self) -> str:
        """Where the page is, with its token."""
        return f"http://127.0.0.1:{self.server_port}/?token={self.token}"


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer  # type: ignore[assignment]
    timeout = 60
    server_version, sys_version = "memsinks", ""

    def do_GET(self) -> None:
        """The page and its parts, and the pages of records."""
        path, given = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query).get("token", [""])[0]
        if not self._from_here():
            return
        if path.startswith("/page/"):  # scripts and styles hold no secret
            self._send_part(path.removeprefix("/page/"))
        elif not self._same_token(given):
            self._refuse(403, "open the address that memsinks view has printed, with its token")
        elif path == "/":
            self._send_part("page.html")
        elif path.startswith("/record/"):
            self._send_record(path.removeprefix("/record/"))
        else:
            self._refuse(404, "there is no such page")

    def do_POST(self) -> None:
        """A question of the page."""
        name = urlsplit(self.path).path.removeprefix("/api/")
        body = self._body()
        if body is None or not self._from_here():
            return
        if not self._same_token(self.headers.get(TOKEN, "")):
            self._refuse(403, "the page is of an earlier start of memsinks view; open the address it has printed")
        elif name in STREAMS:
            self._send_lines(STREAMS[name](self.server.view, body))
        elif name in ANSWERS:
            self._answer(name, body)
        else:
            self._refuse(404, "there is no such question")

    def _from_here(self) -> bool:
        """Whether the request was made to this server by its own page; it is refused otherwise."""
        port = self.server.server_port
        own = {f"{host}:{port}" for host in HOSTS}
        if port == 80:  # which browsers leave out
            own |= {*HOSTS}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in own and (origin is None or origin.removeprefix("http://") in own):
            return True
        self._refuse(403, "requests of other pages and under other names are refused")
        return False

    def _same_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.server.token.encode())

    def _body(self) -> Mapping[str, Any] | None:
        """The question, a JSON object; None, refused, where it is none."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self._refuse(411, "a question says how long it is")
            return None
        if int(length) > MOST_BYTES:
            self.rfile.read(min(int(length), MOST_READ))  # else the page sees a broken connection, not the answer
            self._refuse(413, f"this is longer than {MOST_BYTES >> 20} MiB; no model here reads so much, shorten it")
            return None
        try:
            body = json.loads(self.rfile.read(int(length)))
            if not isinstance(body, dict):
                raise ValueError("no object")
        except (ValueError, RecursionError):
            self._refuse(400, "a question is a JSON object")
            return None
        return body

    def _answer(self, name: str, body: Mapping[str, Any]) -> None:
        try:
            answer, status = ANSWERS[name](self.server.view, body), 200
        except Exception as error:  # the page says what was wrong, whatever it was
            answer, status = {"error": said(error)}, 400
        self._send(status, "application/json", json.dumps(answer).encode())

    def _send_lines(self, events: Iterator[dict[str, Any]]) -> None:
        """A JSON object a line, as they come; ends early when nobody reads any more."""
        try:
            self._head(200, "application/x-ndjson", None)
            try:
                for event in events:
                    self.wfile.write(json.dumps(event).encode() + b"\n")
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:  # see _answer
                self.wfile.write(json.dumps({"kind": "error", "error": said(error)}).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            logger.debug("the page has stopped reading")

    def _send_part(self, name: str) -> None:
        part = files("memsinks.viewer") / "page" / name
        kind = KINDS.get(name[name.rfind(".") :] if "." in name else "")
        if kind is None or "/" in name or "\\" in name or not part.is_file():
            self._refuse(404, "there is no such page")
            return
        self._send(200, f"{kind}; charset=utf-8", part.read_bytes())

    def _send_record(self, name: str) -> None:
        try:
            page = record_file(self.server.view, name).read_bytes()
        except (ConfigError, OSError) as error:
            self._refuse(404, str(error))
            return
        self._send(200, "text/html; charset=utf-8", page, RECORD_POLICY)

    def _refuse(self, status: int, why: str) -> None:
        self._send(status, "application/json", json.dumps({"error": why}).encode())

    def _send(self, status: int, kind: str, content: bytes, policy: str = POLICY) -> None:
        try:
            self._head(status, kind, len(content), policy)
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            logger.debug("the page has stopped reading")

    def _head(self, status: int, kind: str, length: int | None, policy: str = POLICY) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in {
            "Content-Security-Policy": policy,
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
            "Connection": "close",
        }.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are for --debug alone; their address holds the token."""
        logger.debug("%s %s", self.command, urlsplit(self.path).path)


def said(error: Exception) -> str:
    """An error for the page; one that is no MemsinksError is a fault of ours and goes to the log in full."""
    if isinstance(error, MemsinksError):
        return str(error)
    logger.exception("a fault while a page was answered")
    return f"a fault of memsinks ({type(error).__name__}: {str(error)[:200]}); the terminal has the whole of it"
