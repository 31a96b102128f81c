"""A Hugging Face hub in miniature on this machine: repositories, branches, commits, downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """What the hub holds.

    Attributes:
        files: (repository, branch) -> name -> content.
        private: names of private repositories.
        messages: messages of all commits.
        token: the only token that may write.
        url: its address.
        closed: whether it fails on every request, after one to /close.
        requests: methods and paths of all requests.
    """

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.messages: list[str] = []
        self.token = "hf_test"
        self.url = ""
        self.closed = False
        self.requests: list[str] = []

    def commit_of(self, repo: str, revision: str) -> str:
        """Return the hash of a branch's last commit."""
        content = self.files[repo, revision]
        return hashlib.sha1(repr(sorted(content.items())).encode()).hexdigest()

    def branch(self, repo: str, revision: str) -> str:
        """Return the name of the branch with this name or this last commit; empty if there is none."""
        names = [name for owner, name in self.files if owner == repo]
        return next((name for name in names if revision in (name, self.commit_of(repo, name))), "")


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str) -> None:
        self._answer({"error": "not found"}, 404, X_Error_Code=code)

    def _handle(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        writes = self.command == "POST"
        hub.closed |= path == "/close"
        if hub.closed:
            self._answer({"error": "closed"}, 503)
        elif writes and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._answer({"error": "Invalid user token"}, 401)
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/").split("/"), body)
        else:
            self._file(path)

    do_GET = do_POST = do_HEAD = _handle  # noqa: N815

    def _create(self, wanted: dict[str, Any]) -> None:
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if repo.startswith("others/"):
            self._answer({"error": "You don't have the rights"}, 403)
            return
        status = 409 if (repo, "main") in self.hub.files else 200
        if status == 200:
            self.hub.files[repo, "main"] = {}
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.hub.private.add(repo)
        self._answer({"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo}, status)

    def _api(self, parts: list[str], body: bytes) -> None:
        hub, repo, action = self.hub, "/".join(parts[:2]), parts[2:3]
        revision = "/".join(parts[3:]) or "main"
        if action == ["tree"]:
            revision = parts[3]
        branch = hub.branch(repo, revision)
        if (repo, "main") not in hub.files:
            self._missing("RepoNotFound")
        elif action == ["branch"]:
            exists = bool(branch)
            if not exists:
                hub.files[repo, revision] = dict(hub.files[repo, "main"])
            self._answer({}, 409 if exists else 200)
        elif not branch:
            self._missing("RevisionNotFound")
        elif action == ["preupload"]:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self._answer({"files": modes})
        elif action == ["commit"]:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    hub.messages.append(line["value"]["summary"])
                else:
                    hub.files[repo, branch][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = hub.commit_of(repo, branch)
            self._answer({"commitUrl": f"{hub.url}/{repo}/commit/{commit}", "commitOid": commit})
        elif action == ["tree"]:
            content = hub.files[repo, branch].items()
            self._answer(
                [{"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in content]
            )
        else:
            self._answer(
                {
                    "id": repo,
                    "modelId": repo,
                    "sha": hub.commit_of(repo, branch),
                    "private": repo in hub.private,
                    "siblings": [{"rfilename": name} for name in hub.files[repo, branch]],
                }
            )

    def _file(self, path: str) -> None:
        owner, name, resolve, revision, *file = path.strip("/").split("/")
        repo = f"{owner}/{name}"
        branch = self.hub.branch(repo, revision) if resolve == "resolve" else ""
        data = self.hub.files.get((repo, branch), {}).get("/".join(file))
        if data is None:
            self._missing("EntryNotFound")
            return
        tag = hashlib.sha1(data).hexdigest()
        self._answer(data, X_Repo_Commit=self.hub.commit_of(repo, branch), ETag=f'"{tag}"')


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve an empty hub at its `url`, for HF_ENDPOINT."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
