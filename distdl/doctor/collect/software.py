"""Versions, and hashes of code."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import distdl
from distdl.doctor.collect.recipe import Asked
from distdl.doctor.collect.torch_probe import ask_torch
from distdl.doctor.facts import STALE_LOCK_S, Software

COMPARED = ("numpy", "safetensors", "pydantic", "pyarrow", "datasets", "deepspeed", "accelerate")
HERE = Path(distdl.__file__).resolve().parent


def software_here(env: Mapping[str, str], asked: Asked | None, *, fix: bool) -> Software:
    """The software of this process. `fix`: locks of builds that were killed are removed."""
    locks = {path: time.time() - path.stat().st_mtime for path in build_locks(env)}
    removed = [path for path, age in locks.items() if fix and age > STALE_LOCK_S]
    for path in removed:
        path.unlink(missing_ok=True)
    return Software(
        python=platform.python_version(),
        executable=sys.executable,
        distdl_path=str(HERE),
        distdl_hash=hash_of(HERE.rglob("*.py"), HERE),
        copies=tuple(map(str, other_copies(sys.path))),
        packages=_versions(),
        user_code={name: hash_of(*files) for name, files in (asked.code_files if asked else {}).items()},
        torch=ask_torch(env),
        compiler=any(shutil.which(name) for name in (env.get("CXX", "c++"), "g++", "clang++")),
        cxx=env["CXX"] if env.get("CXX") and shutil.which(env["CXX"]) is None else None,
        ninja=shutil.which("ninja") is not None or (Path(sys.executable).parent / "ninja").exists(),
        build_locks={str(path): age for path, age in locks.items() if path not in removed},
        removed=tuple(map(str, removed)),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in COMPARED:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def hash_of(files: Iterable[Path], base: Path) -> str:
    """One hash of the contents of files, and of their names below `base`."""
    whole = hashlib.sha256()
    for path in sorted(files):
        whole.update(f"{path.relative_to(base)}\0".encode())
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:16]


def other_copies(search: Iterable[str]) -> list[Path]:
    """Folders with a distdl that is not the one that was imported, in the order of the import path."""
    found = [Path(entry or ".").resolve() / "distdl" for entry in search]
    return list(dict.fromkeys(p for p in found if p != HERE and (p / "__init__.py").is_file()))


def build_locks(env: Mapping[str, str]) -> list[Path]:
    """Lock files where torch builds C++ code. distdl's own folder is left out: distdl clears that itself."""
    given = env.get("TORCH_EXTENSIONS_DIR")
    return sorted(Path(given).glob("**/lock")) if given else []
