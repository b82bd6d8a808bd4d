"""Files behind URLs, in any store that `distdl.stores` opens.

Nothing is tried twice here: that is `distdl.data.stream.retry`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback

from distdl.data.stream.hub import refusal
from distdl.data.stream.retry import CutShort, Stopped, TooLong, never, scrub
from distdl.errors import DataError
from distdl.stores import open_store

_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "blob_id", "oid", "mtime", "created")
"""What stores call the mark that changes with a file's contents, the most telling first."""


@dataclass(frozen=True)
class Entry:
    """One file of a listing: URL, name in the folder, size, and a mark of its contents ("" for none)."""

    url: str
    name: str
    bytes: int
    version: str


def absolute(url: str) -> str:
    """A URL without a slash at its end; plain local paths become absolute. Raises DataError."""
    if "::" in url:
        raise DataError(f"{scrub(url)} chains several stores ('::'), which cannot be streamed; give one URL")
    if "://" not in url:
        return os.path.abspath(os.path.expanduser(url))
    return url.rstrip("/")


def read_bytes(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """Bytes [start, end) of a file, or all of it. Raises what the store's library raises."""
    store, path = open_store(url)
    return bytes(store.cat_file(path, start=start, end=end))


def entry(url: str) -> Entry:
    """Size and version of one file. Raises what the store's library raises."""
    store, path = open_store(url)
    return _entry(url, store.info(path))


def files_of(url: str) -> list[Entry]:
    """The files of a folder, not below it, sorted by name. Raises what the store's library raises."""
    store, path = open_store(url)
    found = [e for e in store.ls(path, detail=True) if e["type"] == "file"]
    # A store answers a file's own name with that file, and may list the folder's empty marker object.
    names = {
        str(e["name"]).rstrip("/").rpartition("/")[2]: e
        for e in found
        if e["name"].strip("/") != path.strip("/")
    }
    return [_entry(f"{url}/{name}", names[name]) for name in sorted(names)]


def download(url: str, target: Path, limit: int | None = None, stopped: Callable[[], bool] = never) -> None:
    """Copy a file to `target` in one pass, and check that it came whole.

    Raises Stopped soon after `stopped()` turns true, TooLong when more than `limit` bytes come, CutShort, and
    what the store's library raises.
    """
    store, path = open_store(url)
    watch = _Watch(stopped, limit)
    store.get_file(path, str(target), callback=watch)
    # Of stores that say nothing of the length while they send, TooLong or a wrong hash tell as much.
    size = target.stat().st_size
    if watch.size is not None and size < watch.size:
        raise CutShort(f"{size} of {watch.size} bytes came")


def require_reachable(url: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raises DataError within seconds where `url` is on the Hugging Face hub, which cannot be reached."""
    if url.startswith("hf://") and (problem := refusal(environ)):
        raise DataError(
            f"{scrub(url)} is on the Hugging Face hub, and {problem}. Prepare it where there is a network "
            "(`distdl data prepare`), copy that folder to a place this machine reaches, and give it here."
        )


class _Watch(Callback):  # type: ignore[misc]
    """Ends a download that nobody waits for any more, or that brings more than it should."""

    def __init__(self, stopped: Callable[[], bool], limit: int | None) -> None:
        super().__init__()
        self._stopped = stopped
        self._limit = limit

    def call(self, *args: Any, **kwargs: Any) -> None:
        """Called by fsspec after every piece; `value` is the bytes so far."""
        if self._stopped():
            raise Stopped
        if self._limit is not None and self.value > self._limit:
            raise TooLong(f"more than {self._limit} bytes came")


def _entry(url: str, found: Mapping[str, Any]) -> Entry:
    version = next((str(found[key]) for key in _VERSIONS if found.get(key)), "")
    return Entry(url, url.rpartition("/")[2], int(found["size"] or 0), version.strip('"'))
