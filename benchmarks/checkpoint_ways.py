"""The ways of saving and loading a state that `checkpoints.py` measures."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from distdl.checkpoint.image import memory_of
from distdl.checkpoint.manifest import Facts
from distdl.checkpoint.open import open_checkpoint
from distdl.checkpoint.read import verify
from distdl.checkpoint.retention import Keep
from distdl.checkpoint.store import store_at
from distdl.checkpoint.write import Saver
from distdl.comm import World
from distdl.engines.shards import fill
from distdl.pieces import Piece

ROWS, COLUMNS = 4096, 1024
CHUNK = 8 << 20

State = dict[str, Tensor]
Wait = Callable[[], object]
Save = Callable[[State, Path, World], Wait]
"""Begins to save in an empty folder, on all ranks; returns when training may go on what waits for it."""


def make_state(millions: float, seed: int = 0) -> State:
    """Matrices of 4096 x 1024 with a bias each, and AdamW's two moments of all, fp32."""
    made = torch.Generator().manual_seed(seed)
    count = max(1, round(millions * 1e6 / (ROWS * COLUMNS + ROWS)))
    state: State = {}
    for kind in ("model", "optim/exp_avg", "optim/exp_avg_sq"):
        for layer in range(count):
            state[f"{kind}/layers.{layer}.weight"] = torch.rand(ROWS, COLUMNS, generator=made)
            state[f"{kind}/layers.{layer}.bias"] = torch.rand(ROWS, generator=made)
    return state


def size_of(state: State) -> int:
    return sum(t.nbytes for t in state.values())


def done() -> None:
    """Nothing to wait for."""


# --- the ways of saving ---


def raw(state: State, folder: Path, world: World) -> Wait:
    """A share of the tensors' bytes from each rank, as they lie in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"raw-{world.rank}", "wb", buffering=0) as file:
        for tensor in list(state.values())[world.rank :: world.size]:
            view = memory_of(tensor)
            while view:
                view = view[file.write(view[:CHUNK]) :]
        os.fsync(file.fileno())
    return done


def torch_save(state: State, folder: Path, world: World) -> Wait:
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    return done


def dcp(state: State, folder: Path, world: World) -> Wait:
    dcp_save(state, checkpoint_id=folder, no_dist=world.size == 1)
    return done


class DcpAsync:
    """`async_save`; `kept`: one stager for all saves, whose copies are made once and used again."""

    def __init__(self, kept: bool) -> None:
        # The options are those of the stager that async_save makes, so that keeping it is all that differs.
        self._stager = DefaultStager(StagingOptions(False, False, False, False)) if kept else None

    def __call__(self, state: State, folder: Path, world: World) -> Wait:
        given: dict[str, Any] = {} if self._stager is None else {"async_stager": self._stager}
        future: Any = async_save(state, checkpoint_id=folder, no_dist=world.size == 1, **given)
        return lambda: getattr(future, "upload_completion", future).result()


class Ours:
    """`Saver` as training uses it; one for all saves."""

    def __init__(self, asynchronous: bool) -> None:
        self._asynchronous = asynchronous
        self._saver: Saver | None = None
        self._step = 0

    def __call__(self, state: State, folder: Path, world: World) -> Wait:
        if self._saver is None:
            self._saver = Saver(store_at(folder), world, Keep(1), asynchronous=self._asynchronous)
        self._step += 1
        held = {name: Piece(tensor, tuple(tensor.shape)) for name, tensor in state.items()}
        self._saver.save(held, Facts(self._step, "0", {}, "0", {"step": self._step}, "ddp"))
        return self._saver.settle if self._asynchronous else done


RAW, SYNCHRONOUS, ASYNCHRONOUS = "raw write", "distdl", "distdl asynchronous"
DCP, DCP_ASYNC, DCP_KEPT = "DCP save", "DCP async_save", "DCP async_save, kept stager"
WAYS: dict[str, Callable[[], Save]] = {
    RAW: lambda: raw,
    SYNCHRONOUS: lambda: Ours(False),
    ASYNCHRONOUS: lambda: Ours(True),
    "torch.save": lambda: torch_save,
    DCP: lambda: dcp,
    DCP_ASYNC: lambda: DcpAsync(False),
    DCP_KEPT: lambda: DcpAsync(True),
}


# --- the ways of loading: into `target`, whose tensors are there ---


def load_ours(target: State, folder: Path, world: World, *, verified: bool) -> None:
    (path,) = folder.glob("step-*")
    if verified:
        verify(path)
    saved = open_checkpoint(path)
    fill({name: Piece(tensor, tuple(tensor.shape)) for name, tensor in target.items()}, saved)


def load_dcp(target: State, folder: Path, world: World) -> None:
    dcp_load(target, checkpoint_id=folder, no_dist=world.size == 1)


def load_torch(target: State, folder: Path, world: World) -> None:
    read = torch.load(folder / "state.pt", weights_only=True)
    for name, tensor in target.items():
        tensor.copy_(read[name])


VERIFIED, UNVERIFIED, DCP_LOAD = "distdl, hashes verified", "distdl, not verified", "DCP load"
LOADS: dict[str, tuple[str, Callable[[State, Path, World], None]]] = {
    VERIFIED: (SYNCHRONOUS, partial(load_ours, verified=True)),
    UNVERIFIED: (SYNCHRONOUS, partial(load_ours, verified=False)),
    "torch.load": ("torch.save", load_torch),
    DCP_LOAD: (DCP, load_dcp),
}
