"""Find, verify and load checkpoints. No collective here: any one process may call any of it.

Imports torch only where tensors are loaded, so that a login node can list and verify.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from distdl.checkpoint import manifest as m
from distdl.checkpoint.disk import hash_file
from distdl.checkpoint.manifest import Manifest
from distdl.errors import CheckpointError, Corrupt, Incomplete

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Found:
    """The newest usable checkpoint, and the newer ones that had to be passed over, newest first."""

    path: Path | None = None
    manifest: Manifest | None = None
    damaged: list[tuple[Path, str]] = field(default_factory=list)


def step_directories(directory: Path) -> list[Path]:
    """Everything in `directory` named as a checkpoint, sound or not, newest (highest step) first."""
    if not directory.is_dir():
        return []
    steps = {p: step for p in directory.iterdir() if (step := m.step_of(p.name)) is not None}
    return sorted(steps, key=lambda p: steps[p], reverse=True)


def find_latest(directory: Path, *, verify: bool = True) -> Found:
    """The newest checkpoint in `directory` that is whole, and a reason for each newer one that is not.

    With `verify` every byte is read and hashed; without, manifests and file sizes alone are looked at.
    `path` is None only if there is no checkpoint at all. Raises CheckpointError if there are some and none is
    whole, and Incompatible if the newest whole one was written by a newer distdl.
    """
    damaged: list[tuple[Path, str]] = []
    for path in step_directories(directory):
        try:
            return Found(path, inspect(path, hashes=verify), damaged)
        except (Incomplete, Corrupt) as error:  # noqa: PERF203 (a directory takes far longer than a try)
            damaged.append((path, str(error)))
    if damaged:
        raise CheckpointError(_none_whole(directory, damaged))
    return Found()


def _none_whole(directory: Path, damaged: list[tuple[Path, str]]) -> str:
    listed = "\n".join(f"  {path.name}: {reason}" for path, reason in damaged)
    return (
        f"no usable checkpoint among the {len(damaged)} in {directory}:\n{listed}\n"
        "Training does not start afresh by itself. Bring one back from a copy; or, to begin again from "
        f"step 0, move {directory} away."
    )


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`; no other file is looked at.

    Raises Incomplete where there is none, Corrupt where it is damaged, Incompatible where it is too new.
    """
    with _naming(path):
        return _manifest(path)


def verify(path: Path) -> Manifest:
    """Read and hash every file of the checkpoint at `path`; returns its manifest.

    Raises Incomplete or Corrupt with every file that is missing or damaged; Incompatible as `read_manifest`.
    """
    with _naming(path):
        return inspect(path, hashes=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error


def inspect(path: Path, *, hashes: bool) -> Manifest:
    """`verify`, with messages that leave `path` out, and with hashing optional."""
    manifest = _manifest(path)
    if m.step_of(path.name) not in (None, manifest.step):
        raise Corrupt(f"{m.MANIFEST}: it is of step {manifest.step}, the directory is {path.name}")
    wrong = {name: _wrong_size(path / name, entry.size) for name, entry in manifest.files.items()}
    if any(wrong.values()):
        kind = Incomplete if any("missing" in w for w in wrong.values()) else Corrupt
        raise kind(_listed(wrong))
    if hashes:
        # Reading is what takes time; a few threads keep a disk or a network file system busy.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            entries = manifest.files.items()
            found = pool.map(lambda item: _wrong_hash(path / item[0], item[1].xxh3_128), entries)
            wrong = dict(zip(manifest.files, found, strict=True))
        if any(wrong.values()):
            raise Corrupt(_listed(wrong))
    return manifest


def _manifest(path: Path) -> Manifest:
    if not path.is_dir():
        raise Incomplete("not a directory" if path.exists() else "there is no such directory")
    try:
        data = (path / m.MANIFEST).read_bytes()
    except FileNotFoundError:
        raise Incomplete(f"no {m.MANIFEST}: the save was not finished") from None
    except OSError as error:
        raise Incomplete(f"{m.MANIFEST}: cannot be read ({error.strerror})") from error
    return m.parse(data)


def _wrong_size(path: Path, size: int) -> str:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if found == size else f"size {found}, manifest says {size}"


def _wrong_hash(path: Path, expected: str) -> str:
    try:
        found = hash_file(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if found == expected else f"xxh3-128 is {found}, manifest says {expected}"


def _listed(wrong: dict[str, str]) -> str:
    return "; ".join(f"{name}: {what}" for name, what in sorted(wrong.items()) if what)


def everything(name: str) -> bool:
    """The default of `load_tensors`: every name."""
    return True


def load_tensors(
    path: Path, manifest: Manifest, names: Callable[[str], bool] = everything
) -> dict[str, torch.Tensor]:
    """The tensors whose name `names` accepts, on CPU, in memory of their own, from a verified checkpoint.

    Raises Incomplete where a file is missing, Corrupt where one lacks a tensor or has it with a shape or
    dtype that is not the manifest's.
    """
    by_file: dict[str, list[str]] = {}
    for name, entry in manifest.tensors.items():
        if names(name):
            by_file.setdefault(entry.file, []).append(name)
    loaded: dict[str, torch.Tensor] = {}
    for file, wanted in by_file.items():
        loaded |= _load_file(path, file, wanted)
    for name, tensor in loaded.items():
        _check_tensor(path, name, tensor, manifest.tensors[name])
    return {name: loaded[name] for name in manifest.tensors if name in loaded}


def _load_file(path: Path, file: str, names: list[str]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path / file, framework="pt", device="cpu") as source:
            # Clones, because safetensors may lend memory mapped from the file, which may be removed.
            return {name: source.get_tensor(name).clone() for name in names}
    except FileNotFoundError:
        raise Incomplete(f"{path}: {file}: missing") from None
    except (SafetensorError, OSError) as error:
        raise Corrupt(f"{path}: {file}: {error}") from error


def _check_tensor(path: Path, name: str, tensor: torch.Tensor, entry: m.TensorEntry) -> None:
    found = f"{dtype_name(tensor)} {list(tensor.shape)}"
    expected = f"{entry.dtype} {entry.shape}"
    if found != expected:
        raise Corrupt(f"{path}: {entry.file}: {name} is {found}, manifest says {expected}")


def dtype_name(tensor: torch.Tensor) -> str:
    """A tensor's dtype as the manifest writes it: "float32"."""
    return str(tensor.dtype).removeprefix("torch.")
