"""A Hugging Face hub on this machine: what huggingface_hub asks of one, and no more."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Hub:
    """Repositories by ``models/OWNER/NAME``; ``asked`` is every request so far.

    Example:
        hub.commit("models/me/janus", directory, "main", "v1")
    """

    address: str = ""
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[tuple[str, str], str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def commit(self, repository: str, directory: Path, *names: str) -> str:
        """A commit with a directory's files, under the names of branches and tags; its hash."""
        files = {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.files[repository, commit] = files
        self.revisions |= {(repository, name): commit for name in (*names, commit)}
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        api, file = API.fullmatch(path), FILE.fullmatch(path)
        found = api or file
        if found is None:
            return 404, {}, b""
        kind, name = found[1] or "models", found[2]
        repository, revision = f"{kind}/{name}", (api[4] or "main") if api else file[3]
        if repository in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if not any(known == repository for known, _ in self.revisions):
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commit = self.revisions.get((repository, unquote(revision)))
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self.files[repository, commit]
        if api and api[3] == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return 200, {}, json.dumps(entries).encode()
        if api:
            return 200, {}, json.dumps({"id": name, "sha": commit}).encode()
        data = files.get(file[4])
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data


@contextmanager
def served() -> Iterator[Hub]:
    """A hub on a free port."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            hub.asked.append(f"{self.command} {path}")
            status, headers, body = hub.answer(path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield hub
        server.shutdown()
