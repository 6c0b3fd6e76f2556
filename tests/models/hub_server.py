"""A Hugging Face hub on this machine, for the hub's real client: files of one repository, range requests, and a record of both."""
from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants as hub_constants

COMMIT = "c" * 40


class HubServer:
    """files: name -> content, of every repository. sent: (file, bytes) of each answer to a GET."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files
        self.sent: list[tuple[str, int]] = []

    def bytes_sent(self, suffix: str) -> int:
        """Of files whose names end so."""
        return sum(size for file, size in self.sent if file.endswith(suffix))


@contextmanager
def serve_hub(files: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[HubServer]:
    """Point the hub's client to a server with these files, and its cache to a folder."""
    hub = HubServer(files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, body: bytes, headers: Mapping[str, str] = {}) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def answer_json(self, value: Any) -> None:
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def tree(self) -> list[dict[str, Any]]:
            return [{"type": "file", "path": name, "size": len(content), "oid": "0"} for name, content in hub.files.items()]

        def do_GET(self) -> None:
            match = re.search(r"/resolve/[^/]+/(.+)", self.path)
            if match is None and "/tree/" in self.path:
                return self.answer_json(self.tree())
            if match is None:
                names = [{"rfilename": name} for name in hub.files]
                return self.answer_json({"id": "owner/name", "sha": COMMIT, "siblings": names})
            if match[1] not in hub.files:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            content = hub.files[match[1]]
            headers, status, part = {"ETag": f'"{abs(hash(content)):064x}"', "X-Repo-Commit": COMMIT}, 200, content
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
                status, part = 206, content[first : last + 1]
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            if self.command == "GET":
                hub.sent.append((match[1], len(part)))
            return self.answer(status, part, headers)

        do_HEAD = do_GET

        def do_POST(self) -> None:  # sizes of files
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer_json(self.tree())

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    constants = hub_constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    try:
        yield hub
    finally:
        huggingface_hub.close_session()  # its connections
        server.shutdown()
        server.server_close()
        thread.join()
