"""`save`: write a checkpoint that either exists whole or does not exist, whatever fails and wherever.

Three rounds. In each, every rank does its part, keeps any error as a value, and the values are gathered; so
all ranks go on or all raise with the same cause, and no rank waits for one that has given up.

    prepare   compare what the ranks hold; rank 0 checks room and makes step-N.tmp-<random>
    write     every rank writes and fsyncs its file; sizes and hashes are gathered
    commit    rank 0 writes the manifest, fsyncs, renames to step-N, fsyncs the parent, prunes
"""

from __future__ import annotations

import logging
import os
import platform
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash

import distdl
from distdl.checkpoint.disk import aside, explain, remove, require_room, sync_directory, write_durably
from distdl.checkpoint.manifest import MANIFEST, Facts, file_name, seal, serialise, step_name
from distdl.checkpoint.read import dtype_name, verify
from distdl.checkpoint.retention import prune
from distdl.checkpoint.sharing import share_out
from distdl.comm.world import Json, World
from distdl.errors import CheckpointError, Corrupt, Incomplete
from distdl.testing.faults import point

SAVE_POINTS = (
    "save.begin",  # every rank
    "save.made_directory",  # every rank
    "save.written",  # every rank, after its file
    "save.before_manifest",  # from here on rank 0 alone
    "save.manifest_written",
    "save.before_rename",
    "save.renamed",
    "save.pruned",
)

# What headers, the manifest and a file system's own blocks may take beyond the tensors themselves.
MARGIN_BYTES = 1 << 20
MARGIN_BYTES_PER_TENSOR = 1 << 10

_log = logging.getLogger(__name__)


@dataclass
class _Save:
    """One save under way: the arguments of `save`, and how far rank 0 has come."""

    directory: Path
    tensors: Mapping[str, torch.Tensor]
    facts: Facts
    world: World
    keep: int
    temporary: Path | None = None
    renamed: bool = False

    @property
    def target(self) -> Path:
        return self.directory / step_name(self.facts.step)


def save(directory: Path, tensors: Mapping[str, torch.Tensor], facts: Facts, world: World, keep: int) -> Path:
    """Save one step in `directory` and return the checkpoint's path. All ranks call it; it blocks.

    `tensors` is replicated: every rank passes the same names, shapes, dtypes and values, on any device, of
    any layout; each writes a share of them. `facts` are taken from rank 0. `directory` is made if missing and
    has to be one that all ranks share. A sound checkpoint of the same step, recipe and data is left as it
    is and returned. Afterwards the newest `keep` (at least 1) are kept; a removal that fails is logged only.

    Raises CheckpointError on every rank if any rank fails, with the rank, host and cause. There is then no
    new checkpoint, and those from before are untouched. Only if the very last fsync failed, after the rename,
    is there a new one; the message says so.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; it has to be at least 1")
    job = _Save(directory, tensors, facts, world, keep)
    prepared = _together(job, lambda: _prepare(job))
    if prepared[0]["exists"]:
        return job.target
    _require_agreement(job, [p["holding"] for p in prepared])
    job.temporary = directory / prepared[0]["temporary"]
    written = _together(job, lambda: _write_share(job))
    _together(job, lambda: _commit(job, written) if world.is_main else None)
    return job.target


def _together(job: _Save, work: Callable[[], Json]) -> list[Json]:
    """Every rank's result of `work`, on every rank; CheckpointError on every rank if it raised on any."""
    value, failure = None, None
    try:
        value = work()
    except Exception as error:
        failure = error
    told = None if failure is None else f"{_who(job.world)} {explain(failure, job.directory)}"
    answers = job.world.gather([value, told, job.renamed])
    causes = [cause for _, cause, _ in answers if cause is not None]
    if causes:
        _give_up(job)
        raise CheckpointError("\n".join([*causes, _outcome(job.target, answers[0][2])])) from failure
    return [value for value, _, _ in answers]


def _outcome(target: Path, renamed: bool) -> str:
    if renamed:
        return f"{target} was written, but may not outlast a power failure"
    return f"{target} was not written; earlier checkpoints are as they were"


def _give_up(job: _Save) -> None:
    """Remove the temporary directory. Every rank waits for it: whoever leaves first may end the others."""
    if job.world.is_main and job.temporary is not None and job.temporary.exists():
        try:
            remove(job.temporary)
        except OSError as error:
            _log.warning("%s could not be removed (%s); the next start will try again", job.temporary, error)
    job.world.barrier()


def _who(world: World) -> str:
    return f"[rank {world.rank}/{world.size} on {socket.gethostname()}]"


# --- prepare ---


def _prepare(job: _Save) -> Json:
    point("save.begin", job.facts.step)
    answer: dict[str, Json] = {"holding": _holding(job), "exists": False}
    if job.world.is_main:
        answer["exists"] = _already_there(job)
        if not answer["exists"]:
            job.temporary = _make_temporary(job)
            answer["temporary"] = job.temporary.name
    return answer


def _holding(job: _Save) -> Json:
    """What has to be the same on all ranks: the step, and a digest of names, dtypes and shapes."""
    described = [f"{n} {dtype_name(t)} {list(t.shape)}" for n, t in sorted(job.tensors.items())]
    return [job.facts.step, len(described), xxhash.xxh3_64_hexdigest("\n".join(described).encode())]


def _require_agreement(job: _Save, holdings: list[Json]) -> None:
    for rank, (step, count, digest) in enumerate(holdings):
        if [step, count, digest] != holdings[0]:
            _give_up(job)
            raise CheckpointError(
                f"rank {rank} saves step {step} with {count} tensors (digest of names, shapes and dtypes: "
                f"{digest}); rank 0 saves step {holdings[0][0]} with {holdings[0][1]} tensors "
                f"({holdings[0][2]}). All ranks have to hold the same"
            )


def _already_there(job: _Save) -> bool:
    """Whether this step's checkpoint exists, is sound, and is of this recipe and these data."""
    if not os.path.lexists(job.target):
        return False
    try:
        manifest = verify(job.target)
    except (Incomplete, Corrupt):
        return False
    same = (job.facts.recipe_hash, job.facts.data_fingerprint)
    return (manifest.recipe_hash, manifest.data_fingerprint) == same


def _make_temporary(job: _Save) -> Path:
    if not job.directory.is_dir():
        job.directory.mkdir(parents=True)
        sync_directory(job.directory.parent)
    needed = sum(t.nbytes + MARGIN_BYTES_PER_TENSOR for t in job.tensors.values()) + MARGIN_BYTES
    require_room(job.directory, needed)
    temporary = aside(job.target, "tmp")
    temporary.mkdir()
    return temporary


# --- write ---


def _write_share(job: _Save) -> Json:
    """Write this rank's file; its size and hash, and what is in it, as the manifest will say."""
    assert job.temporary is not None
    point("save.made_directory", job.facts.step)
    sizes = {name: tensor.nbytes for name, tensor in job.tensors.items()}
    mine = share_out(sizes, job.world.size)[job.world.rank]
    name = file_name(job.world.rank, job.world.size)
    data = safetensors.torch.save(_on_cpu({n: job.tensors[n] for n in mine}), {"format": "pt"})
    try:
        digest = write_durably(job.temporary / name, data)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{job.temporary} is not there, though rank 0 has made it: the run directory has to be on a file "
            "system that all nodes share"
        ) from error
    point("save.written", job.facts.step)
    entries = {n: _entry(name, job.tensors[n]) for n in mine}
    return {"files": {name: {"size": len(data), "xxh3_128": digest}}, "tensors": entries}


def _entry(file: str, tensor: torch.Tensor) -> Json:
    return {"file": file, "dtype": dtype_name(tensor), "shape": list(tensor.shape)}


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors, no two of which share memory: safetensors refuses those that do."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        copy = tensor.detach().to("cpu").contiguous()
        if copy.untyped_storage().data_ptr() in seen:
            copy = copy.clone()
        seen.add(copy.untyped_storage().data_ptr())
        result[name] = copy
    return result


# --- commit ---


def _commit(job: _Save, written: list[Json]) -> None:
    """Rank 0: make the written files a checkpoint, then prune."""
    assert job.temporary is not None
    step = job.facts.step
    point("save.before_manifest", step)
    files: dict[str, Any] = {k: v for part in written for k, v in part["files"].items()}
    _require_visible(job.temporary, files)
    entries = {k: v for part in written for k, v in part["tensors"].items()}
    in_order = {name: entries[name] for name in job.tensors}
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    manifest = seal(_with_versions(job.facts), job.world.size, now, files, in_order)
    write_durably(job.temporary / MANIFEST, serialise(manifest))
    point("save.manifest_written", step)
    sync_directory(job.temporary)
    point("save.before_rename", step)
    _clear_the_way(job)
    job.temporary.rename(job.target)
    job.renamed = True
    sync_directory(job.directory)
    point("save.renamed", step)
    _prune(job)


def _require_visible(temporary: Path, files: Mapping[str, Any]) -> None:
    """Two nodes that do not share the directory would each see only their own files."""
    for name, entry in files.items():
        path = temporary / name
        if not path.exists() or path.stat().st_size != entry["size"]:
            raise CheckpointError(
                f"{path}, as its rank wrote it, is not what rank 0 sees: the run directory has to be on a "
                "file system that all nodes share"
            )


def _with_versions(facts: Facts) -> Facts:
    known = {"distdl": distdl.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return replace(facts, versions={**known, **facts.versions})


def _clear_the_way(job: _Save) -> None:
    """Move what stands at the target aside: `prepare` found it damaged, or of another recipe or data."""
    if not os.path.lexists(job.target):
        return
    try:
        verify(job.target)
        kind = "old"
    except (Incomplete, Corrupt):
        kind = "bad"
    job.target.rename(aside(job.target, kind))


def _prune(job: _Save) -> None:
    # The checkpoint stands by now. Failing the run over its predecessors would only make it restart from this
    # one, and fail at the same place again.
    try:
        prune(job.directory, job.keep, job.target)
        point("save.pruned", job.facts.step)
    except Exception as error:
        _log.warning("old checkpoints were not all removed: %s", explain(error, job.directory))
