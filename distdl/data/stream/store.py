"""Files behind URLs, through fsspec: any store that it knows, opened anew in every process.

The addresses and credentials of a store come from where its library looks for them (for S3 AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID and so on, or fsspec's own FSSPEC_S3_... and configuration files), never from a recipe.
Nothing is tried twice here: that is `distdl.data.stream.retry`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.callbacks import Callback

from distdl.data.stream.hub import refusal
from distdl.data.stream.retry import CutShort, Stopped, TooLong, never, scrub
from distdl.errors import DataError

CONNECT_S = 10
READ_S = 30
_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "blob_id", "oid", "mtime", "created")
"""What stores call the mark that changes with a file's contents, the most telling first."""

_stores: dict[str, Any] = {}
_of_the_parent: list[Any] = []
_lock = threading.Lock()


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
    store, path = _store(url)
    return bytes(store.cat_file(path, start=start, end=end))


def entry(url: str) -> Entry:
    """Size and version of one file. Raises what the store's library raises."""
    store, path = _store(url)
    return _entry(url, store.info(path))


def files_of(url: str) -> list[Entry]:
    """The files of a folder, not below it, sorted by name. Raises what the store's library raises."""
    store, path = _store(url)
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
    store, path = _store(url)
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


def _store(url: str) -> tuple[Any, str]:
    """(file system, path in it). One of each kind and host a process: connections are used again."""
    parts = urlsplit(url) if "://" in url else None
    key = (
        f"{parts.scheme}://{parts.netloc if parts.scheme not in _ONE_FOR_ALL else ''}" if parts else "file://"
    )
    with _lock:
        if key not in _stores:
            _stores[key] = _open(url, parts.scheme if parts else "file")
        store = _stores[key]
    return store, store._strip_protocol(url)


_ONE_FOR_ALL = {"s3", "s3a", "gs", "gcs", "hf", "memory", "file", "local"}
"""Stores whose URLs name no host: a bucket or repository is part of the path."""


def _open(url: str, scheme: str) -> Any:
    try:
        kind = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = " (pip install 'distdl[s3]')" if scheme in ("s3", "s3a") else ""
        raise DataError(f"{scrub(url)} needs a library that is not installed: {error}{extra}") from error
    except ValueError as error:
        raise DataError(
            f"{scrub(url)}: fsspec knows no {scheme}://; expected a path, s3://, hf://, file://, gs:// or "
            "another of https://filesystem-spec.readthedocs.io"
        ) from error
    options = {**kind._get_kwargs_from_urls(url), **_options(scheme)}
    store = kind(**options, skip_instance_cache=True, use_listings_cache=False)
    # s3fs tries five times by itself, without telling anybody and deaf to `stopped`.
    if hasattr(store, "retries"):
        store.retries = 1
    return store


def _options(scheme: str) -> dict[str, Any]:
    """Time-outs, and one connection a download; what the person configured for fsspec goes first."""
    if scheme not in ("s3", "s3a"):
        return {}
    given = fsspec.config.conf.get("s3", {})
    times = {"connect_timeout": CONNECT_S, "read_timeout": READ_S, "retries": {"total_max_attempts": 1}}
    # With more than one, s3fs holds that many parts of 50 MB in memory.
    concurrency = given.get("max_concurrency", 1)
    return {
        "config_kwargs": {**times, **given.get("config_kwargs", {})},
        "max_concurrency": int(concurrency),
    }


def _forget_the_parents() -> None:
    """After a fork the parent's event loop and sockets are of no use here, and must not be closed here."""
    global _lock
    _lock = threading.Lock()
    _of_the_parent.append(dict(_stores))
    _stores.clear()


os.register_at_fork(after_in_child=_forget_the_parents)
