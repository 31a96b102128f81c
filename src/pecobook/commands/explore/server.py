"""The page's HTTP server: whom it answers, and how much it reads."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

from pecobook.commands.explore.answers import Answer, Answers, Refused
from pecobook.errors import ConfigError, first_line
from pecobook.settings.explore import ExploreConfig

_DISCARDED = 2**26  # bytes of a refused upload that are still read, so that the browser shows the answer
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Server(ThreadingHTTPServer):
    """Serves the page. The port is bound immediately, and requests are answered once `serve` is called.

    Raises:
        ConfigError: the port is in use.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, config: ExploreConfig) -> None:
        self.config = config
        self.uploading = threading.Semaphore(4)  # uploads that are in memory at a time
        self.address_family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        self.names = {"localhost", "127.0.0.1", "::1", config.host, *config.allowed_hosts}
        if config.host in ("0.0.0.0", "::"):
            self.names |= {socket.gethostname(), socket.getfqdn(), *_addresses()}
        try:
            super().__init__((config.host, config.port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"Port {config.port} of {config.host} cannot be used ({error.strerror}). Another explorer may use it: "
                "give another --port."
            ) from None

    def serve(self, answers: Answers) -> None:
        """Answer requests until `close`, in a separate thread."""
        self.answers = answers
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop the server."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Print what is wrong, unless a visitor merely disconnected."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    def is_own(self, address: str) -> bool:
        """Return whether a host, perhaps with a port, is a name of this server.

        Otherwise a web site could point its own name at this machine, and read the page through the visitor's browser
        (DNS rebinding).
        """
        try:
            name = urlsplit(f"//{address}").hostname or ""
        except ValueError:
            return False
        return any(name == own.lower() or (own.startswith("*.") and name.endswith(own[1:])) for own in self.names)


def _addresses() -> set[str]:
    """Return the addresses of this machine."""
    try:
        return {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
    except OSError:
        return set()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds without a byte from a visitor

    def do_GET(self) -> None:
        self._reply(self._get)

    def do_POST(self) -> None:
        self._reply(self._post)

    def _get(self) -> Answer:
        parts = urlsplit(self.path)
        return self.server.answers.get(parts.path, dict(parse_qsl(parts.query)))

    def _post(self) -> Answer:
        self.close_connection = True  # the body may be unread
        if urlsplit(self.path).path != "/api/upload":
            raise Refused("There is no such page.", 404)
        text, limit = self.headers.get("Content-Length", ""), self.server.config.upload_mb
        if not (text.isascii() and text.isdecimal() and len(text) < 19):
            raise Refused("An upload needs a Content-Length.", 411)
        if int(text) > limit * 10**6:
            left = min(int(text), _DISCARDED)
            while left > 0 and (part := self.rfile.read(min(left, 2**16))):
                left -= len(part)
            raise Refused(f"This file has more than {limit} MB, the limit of --upload-mb.", 413)
        with self.server.uploading:
            return self.server.answers.upload(self.rfile.read(int(text)))

    def _check(self) -> None:
        """Raise Refused unless the request is to a name of this server, and from a page of this server."""
        if not self.server.is_own(self.headers.get("Host", "")):
            raise Refused("This server has another name; --allowed-hosts allows further ones.", 400)
        origin = self.headers.get("Origin")
        if origin is not None and not (
            origin.startswith(("http://", "https://")) and self.server.is_own(origin.partition("//")[2])
        ):
            text = f"Requests from the page {origin!r} are refused; --allowed-hosts allows another name of this server."
            raise Refused(text, 403)
        # A page of another site could ask for pictures without an Origin; it may only link to this page.
        if self.headers.get("Sec-Fetch-Site") == "cross-site" and urlsplit(self.path).path != "/":
            raise Refused("Requests from pages of other sites are refused.", 403)

    def _reply(self, answer_of: Callable[[], Answer]) -> None:
        status = 200
        try:
            self._check()
            answer = answer_of()
        except Refused as error:
            status, answer = error.status, Answer(json.dumps({"error": str(error)}).encode())
            self.close_connection |= self.command != "GET"
        except (RuntimeError, ValueError) as error:  # from a network, such as a lack of memory
            status, answer = 500, Answer(json.dumps({"error": f"This failed: {first_line(error)}"}).encode())
        self.send_response(status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "private, max-age=3600" if answer.lasting else "no-store")
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, *args: object) -> None:
        """Do not log requests."""
