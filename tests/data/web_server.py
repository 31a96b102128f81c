"""Servers of files on loopback: a web server, which has troubles when a test says so, and one that speaks S3."""

from __future__ import annotations

import contextlib
import socketserver
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from pecobook.data import remote
from tests.data.sources import make_tar, samples


class Files(BaseHTTPRequestHandler):
    """Serves the files of a folder by ranges; `trouble` decides what happens to a request."""

    root: Path
    requests: list[tuple[str, str]]
    trouble: dict[str, Any]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        file, span = self.root / urlsplit(self.path).path.lstrip("/"), self.headers.get("Range", "")
        self.requests.append((self.path, span))
        if self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/moved"))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path.startswith("/loop/"):
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
            return
        answers = self.trouble.get("first", [])
        if not span and (answer := answers.pop(0) if answers else self.trouble.get("HEAD")):
            self.send_error(answer)
            return
        if not file.is_file():
            self.send_error(404)
            return
        data, whole = file.read_bytes(), file.stat().st_size
        trouble = self.trouble["next"].pop(0) if body and span and self.trouble["next"] else ""
        if trouble == "closed":
            self.close_connection = True
            return
        if trouble == "slow":
            time.sleep(2)
        if trouble.isdecimal():
            self.send_error(int(trouble))
            return
        if trouble.startswith("wait "):
            self.send_response(429)
            self.send_header("Retry-After", trouble.removeprefix("wait "))
            self.end_headers()
            return
        first, last = 0, whole - 1
        if span and not self.trouble.get("no ranges"):
            first, last = (int(text) for text in span.removeprefix("bytes=").split("-"))
            data = data[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{min(last, whole - 1)}/{whole}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        if self.trouble.get("no ETag"):
            self.send_header("Last-Modified", self.date_time_string(file.stat().st_mtime))
        else:
            self.send_header("ETag", f'"{whole}-{file.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if trouble == "cut" else data)
            if trouble == "cut":
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.close()

    def log_message(self, *_: object) -> None:
        pass


class Server:
    def __init__(self, root: Path) -> None:
        handler = type("Handler", (Files,), {"root": root, "requests": [], "trouble": {"next": []}})
        self.requests: list[tuple[str, str]] = handler.requests  # type: ignore[attr-defined]
        self.trouble: dict[str, Any] = handler.trouble  # type: ignore[attr-defined]
        socketserver.TCPServer.allow_reuse_address = True
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a broken pipe is what is tested
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def count(self) -> int:
        """Return the number of requests for ranges so far."""
        return sum(bool(span) for _, span in self.requests)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PECOBOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(remote, "PATIENCE", 20.0)
    monkeypatch.setattr(remote, "BLOCK", 5000)
    monkeypatch.setattr(remote, "_infos", {})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    served = Server(tmp_path / "served")
    (tmp_path / "served").mkdir()
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    moto_server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    import boto3

    served = moto_server.ThreadedMotoServer(port=0, verbose=False)
    served.start()
    _, port = served.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}"),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "_systems", {})
    client = boto3.client("s3")
    client.create_bucket(Bucket="images")
    yield client
    served.stop()


def make_shards(folder: Path) -> None:
    for number in range(3):
        make_tar(folder / f"train-{number:03}.tar", samples(range(20 * number, 20 * number + 20)))
    make_tar(folder / "val-000.tar", samples(range(60, 66)))
