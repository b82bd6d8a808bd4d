"""What other libraries leave behind, as weights by name and optimiser state by parameter.

a file     torch.save of a state_dict, alone or in a dict; a Lightning checkpoint; safetensors
a folder   torch's DCP; DeepSpeed ZeRO 0 to 3; Accelerate's save_state; Hugging Face's safetensors
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distdl.checkpoint.convert import dcp, zero
from distdl.checkpoint.convert.pickles import load_pickle
from distdl.errors import CheckpointError, Corrupt, Incomplete

_WEIGHTS = ("state_dict", "model_state_dict", "model", "module", "app")
_OPTIMISERS = ("optimizer_states", "optimizer_state_dict", "optimizer", "optim", "app")


@dataclass(frozen=True)
class Source:
    """Weights by the source's own names, in its order, and `optimizers`: torch's state dicts of them, whose
    parameters are names or numbers. `notes` are for the person who imports it.
    """

    kind: str
    weights: Mapping[str, Tensor]
    optimizers: tuple[Mapping[str, Any], ...] = ()
    notes: list[str] = field(default_factory=list)


def open_source(path: Path, *, trust_pickle: bool) -> Source:
    """Read `path`. Raises CheckpointError where it is a pickle and those are not trusted, or is nothing that
    is known here; Incomplete, Corrupt.
    """
    if path.is_dir():
        return _folder(path, trust_pickle)
    if not path.is_file():
        raise Incomplete(f"{path}: there is no such file or folder")
    if is_safetensors(path):
        return Source("a safetensors file", read_safetensors(path))
    return _from_dict(load_pickle(path, "a file of torch.save", trust_pickle), path)


def _folder(path: Path, trust: bool) -> Source:
    if (path / ".metadata").is_file():
        return _from_dict(dcp.read(path, trust), path, "a DCP folder")
    if (tag := zero.folder_of(path)) is not None:
        found, states, stage = zero.read(tag, trust)
        optimizers = ({"state": states},) if states else ()
        return Source(f"a DeepSpeed folder, ZeRO stage {stage}", found, optimizers)
    weights = _hugging_face(path, trust)
    if weights is None:
        raise CheckpointError(
            f"{path} is none of the folders that can be imported: DCP (.metadata), DeepSpeed (latest, "
            "*_model_states.pt), Accelerate and Hugging Face (model.safetensors, pytorch_model.bin); a "
            "checkpoint of distdl needs no import: name it in init.from of a recipe"
        )
    saved = path / "optimizer.bin"
    if not saved.is_file():
        return Source("a folder of safetensors", weights)
    if not trust:
        note = f"{saved.name} is a pickle and was left out: --trust-pickle reads it"
        return Source("an Accelerate folder", weights, (), [note])
    state = load_pickle(saved, "Accelerate's optimiser state", trust)
    return Source("an Accelerate folder", weights, _optimizers(state))


def _hugging_face(path: Path, trust: bool) -> Mapping[str, Tensor] | None:
    """The weights of an Accelerate or a Hugging Face folder, in one file or several."""
    if (path / "model.safetensors").is_file():
        return read_safetensors(path / "model.safetensors")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any(Path(name).name != name for name in files):
            raise Corrupt(f"{index}: names files outside its folder")
        return {k: t for name in files for k, t in read_safetensors(path / name).items()}
    if (path / "pytorch_model.bin").is_file():
        loaded = load_pickle(path / "pytorch_model.bin", "weights of torch.save", trust)
        return _tensors(loaded)
    return None


def is_safetensors(path: Path) -> bool:
    """By its first bytes: the length of the header, and the header's opening brace."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped from it. Raises Corrupt."""
    try:
        with safe_open(path, framework="pt", device="cpu") as source:
            return {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise Corrupt(f"{path}: {error}") from error


def _from_dict(loaded: Any, path: Path, kind: str = "a torch file") -> Source:
    """Weights and optimiser state in a dict, at the places where people put them."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(loaded).__name__}: expected a state_dict, or a dict that has one; save "
            "model.state_dict()"
        )
    if "pytorch-lightning_version" in loaded:
        kind = f"a Lightning checkpoint ({loaded['pytorch-lightning_version']})"
    weights = _tensors(loaded)
    for key in _WEIGHTS if not weights else ():
        inner = loaded.get(key)
        if isinstance(inner, Mapping):
            weights = _tensors(inner.get("model", inner))
        if weights:
            break
    if not weights:
        raise CheckpointError(
            f"{path} holds no state_dict: its keys are {', '.join(map(str, list(loaded)[:12]))}; one of "
            f"{', '.join(_WEIGHTS)} was expected to hold tensors by name"
        )
    optimizers = next((f for key in _OPTIMISERS if (f := _optimizers(loaded.get(key)))), ())
    return Source(kind, weights, optimizers)


def _tensors(found: Any) -> dict[str, Tensor]:
    if not isinstance(found, Mapping):
        return {}
    return {str(k): t.detach() for k, t in found.items() if isinstance(t, torch.Tensor)}


def _optimizers(found: Any) -> tuple[Mapping[str, Any], ...]:
    """torch's optimiser state dicts in what stands under one key: one, or a list of them."""
    if isinstance(found, Mapping) and "state" not in found:
        found = found.get("optim", found.get("optimizer"))
    several = found if isinstance(found, list | tuple) else [found]
    return tuple(one for one in several if isinstance(one, Mapping) and isinstance(one.get("state"), Mapping))
