"""A stand-in for the Hub and its storage on 127.0.0.1: what qconv asks of them, and what may go wrong on the way.

The Hub redirects to another server, its storage, which refuses a request that brings the token along.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + 34 * "0"
TOKEN = "hf_" + "secret" * 5
BLOCK = 1 << 16


class HubServer:
    """Serves a folder as ``owner/name``.

    Attributes:
        faults: How often yet, by kind and file: ``cut`` (closed in mid-body), ``flip`` (a bit), ``refuse`` (503),
            ``whole`` (the range ignored), ``elsewhere`` (another range than was asked for).
        pause: Seconds between blocks of 64 KiB.
        sent: Bytes of bodies by file.
        leaked: Whether the storage was ever shown the token.
    """

    def __init__(self, folder: Path, repository: str = "owner/name") -> None:
        self.folder, self.repository = folder, repository
        self.faults: Counter[tuple[str, str]] = Counter()
        self.pause = 0.0
        self.sent: Counter[str] = Counter()
        self.leaked = False
        self.lock = threading.Lock()
        self.sums = {file.name: _described(file) for file in sorted(folder.iterdir()) if file.is_file()}
        self._hub = self._server(_Hub)
        self._storage = self._server(_Storage)

    def _server(self, kind: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type(kind.__name__, (kind,), {"server_state": self}))
        server.daemon_threads = False  # closing it waits for those who are being answered
        return server

    @property
    def url(self) -> str:
        """The Hub's address."""
        return f"http://127.0.0.1:{self._hub.server_address[1]}"

    @property
    def storage(self) -> str:
        """The storage's address: another server for whoever compares host and port."""
        return f"http://127.0.0.1:{self._storage.server_address[1]}"

    def __enter__(self) -> Self:
        for server in (self._hub, self._storage):
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in (self._hub, self._storage):
            server.shutdown()
            server.server_close()

    def fails(self, kind: str, name: str) -> bool:
        """Whether a fault strikes now."""
        with self.lock:
            if self.faults[kind, name] <= 0:
                return False
            self.faults[kind, name] -= 1
            return True


def _described(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    found: dict[str, Any] = {"rfilename": file.name, "size": len(data), "blobId": blob}
    if file.suffix == ".safetensors":
        found["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return found


def _listed(described: dict[str, Any]) -> dict[str, Any]:
    """A file as the listing of a tree has it."""
    found = {"type": "file", "path": described["rfilename"], "size": described["size"], "oid": described["blobId"]}
    if "lfs" in described:
        lfs = dict(described["lfs"])
        found["lfs"] = {"oid": lfs.pop("sha256"), **lfs}
    return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: HubServer

    def end_headers(self) -> None:
        self.send_header("Connection", "close")
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Hub(_Handler):
    def do_GET(self) -> None:
        state, path = self.server_state, unquote(urlsplit(self.path).path)
        if path in (f"/api/models/{state.repository}", f"/api/models/{state.repository}/revision/main"):
            values = {"id": state.repository, "sha": COMMIT, "siblings": list(state.sums.values()), "tags": []}
            return self.answer(200, {"Content-Type": "application/json"}, json.dumps(values).encode())
        if path == f"/api/models/{state.repository}/tree/{COMMIT}":
            listed = [_listed(one) for one in state.sums.values()]
            return self.answer(200, {"Content-Type": "application/json"}, json.dumps(listed).encode())
        name = path.removeprefix(f"/{state.repository}/resolve/{COMMIT}/")
        if name not in state.sums:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        if state.fails("refuse", name):
            return self.answer(503, {})
        known = {"X-Repo-Commit": COMMIT, "ETag": f'"{state.sums[name]["blobId"]}"'}
        known |= {"X-Linked-Size": str(state.sums[name]["size"]), "X-Linked-ETag": known["ETag"]}
        return self.answer(302, {"Location": f"{state.storage}/{name}?X-Signature=signed", **known})

    do_HEAD = do_GET


class _Storage(_Handler):
    def do_GET(self) -> None:
        state, name = self.server_state, unquote(urlsplit(self.path).path)[1:]
        if "Authorization" in self.headers:
            state.leaked = True
            return self.answer(400, {})
        data = (state.folder / name).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop, status = 0, len(data), 200
        if asked and not state.fails("whole", name):
            start, stop, status = int(asked[1]), min(int(asked[2] or len(data) - 1) + 1, len(data)), 206
        if status == 206 and state.fails("elsewhere", name):
            start = 0
        body, long = bytearray(data[start:stop]), stop - start > 4 * BLOCK
        if long and state.fails("flip", name):
            body[len(body) // 2] ^= 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.end_headers()
        end = len(body) // 2 if long and state.fails("cut", name) else len(body)
        self._send(name, memoryview(body)[:end])

    def _send(self, name: str, body: memoryview) -> None:
        state = self.server_state
        for at in range(0, len(body), BLOCK):
            block = body[at : at + BLOCK]
            try:
                self.wfile.write(block)
            except OSError:
                return
            with state.lock:
                state.sent[name] += len(block)
            if state.pause:
                time.sleep(state.pause)
