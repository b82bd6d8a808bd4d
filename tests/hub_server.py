"""A stand-in for the Hugging Face hub, on loopback: datasets of a folder, by id, read only.

It answers what `datasets` and `huggingface_hub` ask to load a repository of data files: what is in it, and
the files.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef" * 2 + "01234567"


@contextmanager
def hub_of(folder: Path) -> Iterator[str]:
    """Serve folder/OWNER/NAME/* as datasets; gives the address, for HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(root: Path) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            match unquote(urlsplit(self.path).path).strip("/").split("/"):
                case ["api", "datasets", owner, name, "tree", _, *below]:
                    self._tree(root / owner / name, root.joinpath(owner, name, *below))
                case ["api", "datasets", owner, name, *_] if (root / owner / name).is_dir():
                    self._json({"id": f"{owner}/{name}", "sha": COMMIT, "private": False, "gated": False})
                case ["datasets", owner, name, "resolve", _, *file]:
                    self._file(root.joinpath(owner, name, *file))
                case _:
                    self._missing()

        do_HEAD = do_GET

        def _tree(self, repository: Path, folder: Path) -> None:
            if not folder.is_dir():
                return self._missing()
            entries = []
            for path in sorted(folder.iterdir()):
                entry: dict[str, Any] = {"type": "directory", "oid": COMMIT, "size": 0}
                if path.is_file():
                    entry = {"type": "file", "oid": _digest(path), "size": path.stat().st_size}
                entries.append(entry | {"path": path.relative_to(repository).as_posix()})
            self._json(entries)

        def _file(self, path: Path) -> None:
            if not path.is_file():
                return self._missing("EntryNotFound")
            self._send(200, path.read_bytes(), {"ETag": f'"{_digest(path)}"', "X-Repo-Commit": COMMIT})

        def _json(self, what: Any) -> None:
            self._send(200, json.dumps(what).encode(), {"Content-Type": "application/json"})

        def _missing(self, code: str = "RepoNotFound") -> None:
            self._send(404, b"", {"X-Error-Code": code})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()
