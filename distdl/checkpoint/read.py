"""Find and verify checkpoints. No collective and no torch here: any one process may call any of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from distdl.checkpoint import manifest as m
from distdl.checkpoint.folders import (
    Folder,
    Place,
    child,
    folder_at,
    hash_file,
    name_of,
    read_manifest_bytes,
    shown,
)
from distdl.checkpoint.manifest import Manifest
from distdl.checkpoint.store import store_at
from distdl.errors import CheckpointError, Corrupt, Incomplete


@dataclass(frozen=True)
class Found:
    """The newest usable checkpoint, and the newer ones that had to be passed over, newest first."""

    path: Place | None = None
    manifest: Manifest | None = None
    damaged: list[tuple[Place, str]] = field(default_factory=list)


def step_directories(place: Place) -> list[Place]:
    """Everything in `place` named as a checkpoint, sound or not, newest (highest step) first."""
    store = store_at(place)
    return [child(store.place, m.step_name(step)) for step in store.steps()]


def find_latest(place: Place, *, verify: bool = True) -> Found:
    """The newest checkpoint in `place` that is whole, and a reason for each newer one that is not.

    With `verify` every byte is read and hashed; without, manifests and file sizes alone are looked at.
    `path` is None only if there is no checkpoint at all. Raises CheckpointError if there are some and none is
    whole, and Incompatible if the newest whole one was written by a newer distdl.
    """
    return first_whole(place, step_directories(place), lambda path: inspect(path, hashes=verify))


def first_whole(place: Place, paths: Iterable[Place], look: Callable[[Place], Manifest]) -> Found:
    """`find_latest` among `paths`; `look` raises Incomplete or Corrupt for one that is not whole."""
    damaged: list[tuple[Place, str]] = []
    for path in paths:
        try:
            return Found(path, look(path), damaged)
        except (Incomplete, Corrupt) as error:  # noqa: PERF203 (a directory takes far longer than a try)
            damaged.append((path, str(error)))
    if damaged:
        raise CheckpointError(_none_whole(place, damaged))
    return Found()


def _none_whole(place: Place, damaged: list[tuple[Place, str]]) -> str:
    listed = "\n".join(f"  {name_of(path)}: {reason}" for path, reason in damaged)
    return (
        f"no usable checkpoint among the {len(damaged)} in {shown(place)}:\n{listed}\n"
        "Training does not start afresh by itself. Bring one back from a copy; or, to begin again from "
        f"step 0, move {shown(place)} away."
    )


def read_manifest(place: Place) -> Manifest:
    """The manifest of the checkpoint at `place`; no other file is looked at.

    Raises Incomplete where there is none, Corrupt where it is damaged, Incompatible where it is too new.
    """
    with naming(place):
        return _manifest(folder_at(place))


def has_manifest(place: Place) -> bool:
    """Whether a manifest, sound or not, stands at `place`. Raises what an object store's library raises."""
    try:
        folder_at(place).open(m.MANIFEST).close()
    except CheckpointError:
        return False
    return True


def verify(place: Place) -> Manifest:
    """Read and hash every file of the checkpoint at `place`; returns its manifest.

    Raises Incomplete or Corrupt with every file that is missing or damaged; Incompatible as `read_manifest`.
    """
    with naming(place):
        return inspect(place, hashes=True)


@contextmanager
def naming(place: Place) -> Iterator[None]:
    """Put `place` in front of what a CheckpointError says; an OSError becomes Incomplete."""
    try:
        yield
    except CheckpointError as error:
        raise type(error)(f"{shown(place)}: {error}") from error
    except OSError as error:
        raise Incomplete(f"{shown(place)}: cannot be read ({error.strerror or error})") from error


def inspect(place: Place, *, hashes: bool) -> Manifest:
    """`verify`, with messages that leave `place` out, and with hashing optional."""
    folder = folder_at(place)
    manifest = _manifest(folder)
    wrong = together_wrong(lambda name: _wrong_size(folder, name, manifest.files[name].size), manifest.files)
    if wrong:
        kind = Incomplete if any("missing" in w for w in wrong.values()) else Corrupt
        raise kind(listed(wrong))
    if hashes and (wrong := wrong_hashes(folder, manifest, manifest.files)):
        raise Corrupt(listed(wrong))
    return manifest


def wrong_hashes(folder: Folder, manifest: Manifest, files: Iterable[str]) -> dict[str, str]:
    """Which of `files` have not the hash that the manifest says, and why; nothing for a sound checkpoint."""
    return together_wrong(lambda name: _wrong_hash(folder, name, manifest.files[name].xxh3_128), files)


def together_wrong(look: Callable[[str], str], files: Iterable[str]) -> dict[str, str]:
    """What `look` says about each file, where it says anything; a few at the same time."""
    names = list(files)
    # Reading is what takes time; a few threads keep a disk or a network file system busy.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        said = dict(zip(names, pool.map(look, names), strict=True))
    return {name: what for name, what in said.items() if what}


def _manifest(folder: Folder) -> Manifest:
    manifest = m.parse(read_manifest_bytes(folder))
    if m.step_of(folder.name) not in (None, manifest.step):
        raise Corrupt(f"{m.MANIFEST}: it is of step {manifest.step}, the directory is {folder.name}")
    return manifest


def _wrong_size(folder: Folder, file: str, size: int) -> str:
    try:
        source = folder.open(file)
    except CheckpointError as error:
        return str(error).removeprefix(f"{file}: ")
    source.close()
    return "" if source.size == size else f"size {source.size}, manifest says {size}"


def _wrong_hash(folder: Folder, file: str, expected: str) -> str:
    try:
        found = hash_file(folder, file)
    except CheckpointError as error:
        return str(error).removeprefix(f"{file}: ")
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if found == expected else f"xxh3-128 is {found}, manifest says {expected}"


def listed(wrong: dict[str, str]) -> str:
    """What is wrong with which files, in one line."""
    return "; ".join(f"{name}: {what}" for name, what in sorted(wrong.items()))
