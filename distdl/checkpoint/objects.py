"""`ObjectStore`: checkpoints below a URL, through fsspec. See `distdl.checkpoint.store.Store`.

There is no rename, so every attempt has file names of its own, in the step's folder from the start; what
makes them a checkpoint is the manifest, put in one request, which takes effect whole or not at all. A folder
without a manifest is what an unfinished save or removal left, and is no checkpoint.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import Any

from distdl.checkpoint.folders import TRIES, Folder, ObjectFolder, Place, read_manifest_bytes
from distdl.checkpoint.manifest import MANIFEST, parse, step_name, step_of
from distdl.errors import CheckpointError
from distdl.stores import open_store, scrub
from distdl.testing import faults

PART = 16 << 20
"""Bytes of one part of an upload, which is what a writer holds in memory; more where a file is very large."""
_PARTS = 9_000
"""S3 takes 10,000 parts of a file."""


class ObjectStore:
    """One folder a step. Nobody else may save below the same URL: `sweep` takes what no manifest names."""

    def __init__(self, url: str) -> None:
        self.place: Place = url.rstrip("/")
        self._url = url.rstrip("/")

    def __str__(self) -> str:
        return scrub(self._url)

    def steps(self) -> list[int]:
        """See `Store`."""
        found = {step_of(folder) for folder, file in self._files() if file == MANIFEST}
        return sorted((step for step in found if step is not None), reverse=True)

    def begin(self, step: int, needed: int) -> str:
        """See `Store`. An object store does not say what room it has."""
        return secrets.token_hex(4)

    def mark(self, attempt: str) -> str:
        """See `Store`."""
        return attempt

    def create(self, attempt: str, step: int, file: str, nbytes: int) -> ObjectSink:
        """See `Store`."""
        store, path = self._open(f"{step_name(step)}/{file}")
        return ObjectSink(store.open(path, "wb", block_size=max(PART, nbytes // _PARTS + 1)))

    def written(self, attempt: str, step: int) -> Folder:
        """See `Store`."""
        return ObjectFolder(f"{self._url}/{step_name(step)}")

    def commit(self, attempt: str, step: int, manifest: bytes, kept_as: str | None) -> None:
        """See `Store`. The manifest of a checkpoint that is in the way stays, under another name."""
        store, path = self._open(f"{step_name(step)}/{MANIFEST}")
        if kept_as is not None:
            store.pipe_file(f"{path.removesuffix('.json')}.{kept_as}-{attempt}.json", store.cat_file(path))
        store.pipe_file(path, manifest)
        faults.point("save.manifest_written", step)

    def stands(self, step: int) -> bool:
        """See `Store`."""
        store, path = self._open(f"{step_name(step)}/{MANIFEST}")
        return bool(store.exists(path))

    def is_committed(self, attempt: str, step: int) -> bool:
        """See `Store`."""
        try:
            manifest = parse(read_manifest_bytes(self.written(attempt, step)))
        except CheckpointError:
            return False
        return any(file.endswith(f"-{attempt}.safetensors") for file in manifest.files)

    def discard(self, attempt: str, step: int) -> None:
        """See `Store`."""
        if not self.is_committed(attempt, step):
            here = [f"{d}/{f}" for d, f in self._files(step_name(step)) if f"-{attempt}." in f]
            self._delete(here)

    def remove(self, step: int) -> None:
        """See `Store`. The manifest goes first: what is left is then no checkpoint."""
        folder = step_name(step)
        here = [f"{d}/{f}" for d, f in self._files(folder)]
        first = f"{folder}/{MANIFEST}"
        self._delete([first] if first in here else [])
        self._delete([name for name in here if name != first])

    def sweep(self) -> list[str]:
        """See `Store`."""
        by_folder: dict[str, list[str]] = {}
        for folder, file in self._files():
            if step_of(folder) is not None:
                by_folder.setdefault(folder, []).append(file)
        left = []
        for folder, files in by_folder.items():
            named = self._named(folder, files)
            if named is not None:
                left += [f"{folder}/{file}" for file in files if file not in named]
        self._delete(left)
        return left

    def _named(self, folder: str, files: list[str]) -> set[str] | None:
        """The files that belong to a manifest of this folder; None where one cannot be read."""
        named: set[str] = set()
        for file in files:
            if file.startswith("manifest.") and file.endswith(".json"):
                store, path = self._open(f"{folder}/{file}")
                try:
                    named |= {file, *parse(store.cat_file(path)).files}
                except CheckpointError:
                    return None  # damaged, or of a newer distdl: somebody may want to look at it
        return named

    def _files(self, folder: str = "") -> list[tuple[str, str]]:
        """(folder of the step, file) of everything below `folder`."""
        store, path = self._open(folder)
        root = self._open("")[1].strip("/")
        try:
            found = store.find(path)
        except FileNotFoundError:
            return []
        inside = [str(name).strip("/").removeprefix(root).strip("/") for name in found]
        split = [name.partition("/") for name in inside]
        return [(head, tail) for head, _, tail in split if tail]

    def _delete(self, names: list[str]) -> None:
        if names:
            store = self._open("")[0]
            store.rm([self._open(name)[1] for name in names])

    def _open(self, name: str) -> tuple[Any, str]:
        url = f"{self._url}/{name}" if name else self._url
        return open_store(url, tries=TRIES, error=CheckpointError)


class ObjectSink:
    """An upload, in parts where it is large. The object appears when it is finished, or not at all."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: memoryview) -> None:
        """See `Sink`."""
        self._file.write(data)

    def finish(self) -> None:
        """See `FileSink`."""
        self._file.close()

    def abandon(self) -> None:
        """See `FileSink`."""
        self._file.discard()
        with contextlib.suppress(AttributeError):
            self._file.closed = True  # or its destructor would send what is left
