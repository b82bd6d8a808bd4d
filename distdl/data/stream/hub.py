"""Whether the Hugging Face hub can be reached, known within seconds. Imports none of its libraries.

Without this they would wait and try again for minutes on a node without internet.
"""

from __future__ import annotations

import os
import socket
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

PROBE_S = 5.0
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def refusal(environ: Mapping[str, str] = os.environ) -> str:
    """Why the hub is not to be asked, for a person; "" where a connection to it is made within `PROBE_S`.

    Behind a proxy it is the proxy that has to answer.
    """
    for name in _OFFLINE:
        if environ.get(name, "").strip().upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name} is set"
    hub = urlsplit(environ.get("HF_ENDPOINT") or "https://huggingface.co")
    host = hub.hostname or "huggingface.co"
    proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(hub.scheme)
    at = urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else hub
    host, port = at.hostname or host, at.port or (80 if at.scheme == "http" else 443)
    reason = _connect(host, port)
    return f"{host}:{port} cannot be reached from this machine: {reason}" if reason else ""


def _connect(host: str, port: int) -> str:
    outcome = [f"no answer within {PROBE_S:g} s"]

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=PROBE_S).close()
            outcome[0] = ""
        except OSError as error:
            outcome[0] = error.strerror or str(error) or type(error).__name__

    # In a thread, because looking up a name has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PROBE_S)
    return outcome[0]


@contextmanager
def cache_only(*modules: Any) -> Iterator[None]:
    """Have libraries of the hub look in their caches only; `modules` are those with their HF_HUB_OFFLINE."""
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True  # the variable of this name is read once, at import
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
