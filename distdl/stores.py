"""Object stores and other file systems behind URLs, through fsspec, opened anew in every process.

The addresses and credentials of a store come from where its library looks for them (for S3 AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID and so on, or fsspec's own FSSPEC_S3_... and configuration files), never from a recipe.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from distdl.errors import DataError, DistdlError

CONNECT_S = 10
READ_S = 30
_ONE_FOR_ALL = {"s3", "s3a", "gs", "gcs", "hf", "memory", "file", "local"}
"""Stores whose URLs name no host: a bucket or repository is part of the path."""
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "HF_TOKEN")
_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(r"(?<=[\w/.])\?[^\s'\"]*=[^\s'\"]*")

_stores: dict[tuple[str, int], Any] = {}
_of_the_parent: list[Any] = []
_lock = threading.Lock()


def open_store(url: str, *, tries: int = 1, error: type[DistdlError] = DataError) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a URL or a local path. Connections are kept and used again.

    One file system of each kind and host a process. `tries`: how often the library itself asks (s3fs alone
    heeds it). Raises `error` where a library is missing or the URL names no store.
    """
    parts = urlsplit(url) if "://" in url else None
    host = (
        f"{parts.scheme}://{parts.netloc if parts.scheme not in _ONE_FOR_ALL else ''}" if parts else "file://"
    )
    key = (host, tries)
    with _lock:
        if key not in _stores:
            _stores[key] = _open(url, parts.scheme if parts else "file", tries, error)
        store = _stores[key]
    return store, str(store._strip_protocol(url))


def scrub(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """`text` without user names and passwords in URLs, signed queries, and the secrets of the environment."""
    text = _QUERY.sub("", _USERINFO.sub("", text))
    for name in _SECRETS:
        if len(secret := environ.get(name, "")) >= 8:
            text = text.replace(secret, "***")
    return text


def _open(url: str, scheme: str, tries: int, raised: type[DistdlError]) -> Any:
    import fsspec

    try:
        kind = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = " (pip install 'distdl[s3]')" if scheme in ("s3", "s3a") else ""
        raise raised(f"{scrub(url)} needs a library that is not installed: {error}{extra}") from error
    except ValueError as error:
        raise raised(
            f"{scrub(url)}: fsspec knows no {scheme}://; expected a path, s3://, hf://, file://, gs:// or "
            "another of https://filesystem-spec.readthedocs.io"
        ) from error
    options = {**kind._get_kwargs_from_urls(url), **_options(scheme, tries)}
    store = kind(**options, skip_instance_cache=True, use_listings_cache=False)
    # s3fs tries five times by itself, without telling anybody and deaf to a request to stop.
    if hasattr(store, "retries"):
        store.retries = tries
    return store


def _options(scheme: str, tries: int) -> dict[str, Any]:
    """Time-outs, tries, and one connection a transfer; what the person configured for fsspec goes first."""
    if scheme not in ("s3", "s3a"):
        return {}
    import fsspec

    given = fsspec.config.conf.get("s3", {})
    # s3fs does not ask again where the server says InternalError (500), the library below it does.
    attempts = {"total_max_attempts": min(tries, 3), "mode": "standard"}
    times = {"connect_timeout": CONNECT_S, "read_timeout": READ_S, "retries": attempts}
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
