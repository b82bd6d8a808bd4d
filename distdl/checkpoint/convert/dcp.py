"""Folders that torch.distributed.checkpoint wrote: `.metadata`, a pickle, and `*.distcp`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from distdl.checkpoint.convert.pickles import require_trust
from distdl.errors import Corrupt


def read(path: Path, trusted: bool) -> dict[str, Any]:
    """The tensors of a DCP folder, whole, in the nested dicts that were saved; what is no tensor is left out.

    DCP reads tensors with weights_only; of its other entries, pickles as well, none is read. Raises
    CheckpointError where pickles are not trusted, Corrupt.
    """
    require_trust(path / ".metadata", "what DCP keeps its index in", trusted)
    # Here, since every process of every run would pay three quarters of a second for them.
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        reader = FileSystemReader(path)
        metadata = reader.read_metadata()
        entries = metadata.state_dict_metadata
        flat = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group: none is wanted
            load(flat, storage_reader=reader)
    except Exception as error:  # a pickle, and what it leads to, may raise anything
        raise Corrupt(f"{path}: cannot be read as DCP: {type(error).__name__}: {error}") from error
    places = metadata.planner_data or {}
    nested: dict[Any, Any] = {}
    for name, tensor in flat.items():
        *above, last = places.get(name, (name,))
        inside = nested
        for key in above:
            inside = inside.setdefault(key, {})
        inside[last] = tensor
    return nested
