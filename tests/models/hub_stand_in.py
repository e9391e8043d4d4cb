"""A stand-in for a hub's HTTP API on loopback: model info, tree, and files with ranges, cuts and refusals."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the hub holds and how it behaves; `asked` are the requests that it got, (method, path, range)."""

    files: dict[str, bytes]
    repository: str = "someone/model"
    token: str | None = None
    gated: bool = False
    cut: dict[str, int] = field(default_factory=dict)
    """File -> how many of its next transfers break off half way."""
    status: int | None = None
    """Answer everything with this status."""
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def fetched(self) -> set[str]:
        """The files of which any part was sent."""
        return {path.partition(f"/resolve/{COMMIT}/")[2] for method, path, _ in self.asked if method == "GET"} - {""}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` at its `url` until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: a test reads `asked`."""

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            hub.asked.append((self.command, self.path, self.headers.get("Range")))
            path, name = self.path.partition("?")[0], hub.repository
            if hub.status is not None:
                return self._refuse(hub.status, "")
            if not path.startswith((f"/api/models/{name}", f"/{name}/")):
                return self._refuse(404, "RepoNotFound")
            if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._refuse(*((403, "GatedRepo") if hub.gated else (401, "RepoNotFound")))
            if path.startswith("/api/"):
                return self._api(path)
            file = path.partition(f"/resolve/{COMMIT}/")[2]
            if file not in hub.files:
                return self._refuse(404, "EntryNotFound")
            return self._file(file, with_body=with_body)

        def _api(self, path: str) -> None:
            rest = path.removeprefix(f"/api/models/{hub.repository}").strip("/")
            if rest.startswith("tree/"):
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in hub.files.items()
                ]
                return self._send(json.dumps(entries).encode(), "application/json")
            if rest not in ("", "revision/main", f"revision/{COMMIT}"):
                return self._refuse(404, "RevisionNotFound")
            siblings = [{"rfilename": name} for name in hub.files]
            info = {"id": hub.repository, "modelId": hub.repository, "sha": COMMIT, "siblings": siblings}
            return self._send(json.dumps(info).encode(), "application/json")

        def _file(self, name: str, *, with_body: bool) -> None:
            data, begin = hub.files[name], 0
            asked = self.headers.get("Range")
            if asked is not None:
                begin = int(asked.removeprefix("bytes=").partition("-")[0])
            body = data[begin:]
            self.send_response(206 if asked else 200)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            if asked:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if not with_body:
                return
            if hub.cut.get(name, 0):
                hub.cut[name] -= 1
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(body)

        def _send(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
