"""`Manifest`: the JSON that makes a directory a checkpoint, and the names a checkpoint has on disk.

    checkpoints/step-00000300/                          a checkpoint, once manifest.json stands in it
    checkpoints/step-00000300/manifest.json
    checkpoints/step-00000300/rank-00000-of-00002.safetensors
    checkpoints/step-00000300.tmp-1f2e3d4c/             being written, or being removed; swept at start
    checkpoints/step-00000300.bad-1f2e3d4c/             was damaged and stood in the way of a new one
    checkpoints/step-00000300.old-1f2e3d4c/             same step, another recipe or other data; likewise

Everything here is pure and imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distdl.errors import Corrupt, Incompatible

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

_STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """The directory name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a directory name stands for; None for any name that is not a checkpoint's."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and step_name(int(match[1])) == name else None


def file_name(rank: int, world_size: int) -> str:
    """The name of the file that one rank writes."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


Count = Annotated[int, Field(ge=0)]
# One path component that cannot lead out of the directory: a manifest may come from anywhere.
PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class _Frozen(BaseModel):
    # Keys that a later distdl adds without raising format_version are ones that this one may ignore.
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=True)


class TensorEntry(_Frozen):
    """Where one tensor is. `dtype` is torch's name without "torch.", such as "bfloat16"."""

    file: PlainName
    dtype: str
    shape: list[Count]


class FileEntry(_Frozen):
    """One file's size in bytes and its XXH3 hash, 128 bits as 32 hexadecimal digits."""

    size: Count
    xxh3_128: Hash


class Manifest(_Frozen):
    """What one checkpoint holds. Make one with `seal`, which computes `self_hash`."""

    format_version: int
    step: Count
    saved_at: str
    """UTC, ISO 8601."""
    recipe_hash: str
    mathematics: dict[str, Any]
    """The recipe's keys that `recipe_hash` covers, so that a reader can say which ones differ."""
    data_fingerprint: str
    train_state: dict[str, Any]
    engine: str
    world_size: Annotated[int, Field(ge=1)]
    versions: dict[str, str]
    files: dict[PlainName, FileEntry]
    tensors: dict[str, TensorEntry]
    self_hash: Hash
    """XXH3-128 of the canonical JSON of all the other keys."""

    @model_validator(mode="after")
    def _files_are_named(self) -> Manifest:
        lost = sorted({t.file for t in self.tensors.values()} - self.files.keys())
        if lost:
            raise ValueError(f"tensors are said to be in {', '.join(lost)}, not listed under files")
        return self


@dataclass(frozen=True)
class Facts:
    """What the caller of a save knows: everything in the manifest that is not about files.

    The dicts hold what JSON holds (tuples come back as lists); NaN and infinities are allowed.
    """

    step: int
    recipe_hash: str
    mathematics: Mapping[str, Any]
    data_fingerprint: str
    train_state: Mapping[str, Any]
    engine: str
    versions: Mapping[str, str] = field(default_factory=dict)


def seal(
    facts: Facts,
    world_size: int,
    saved_at: str,
    files: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Mapping[str, Any]],
) -> Manifest:
    """Put a manifest together and compute its own hash.

    Raises TypeError where `facts` holds what JSON cannot, ValueError where a field is not of its type.
    """
    raw = {
        "format_version": FORMAT_VERSION,
        "step": facts.step,
        "saved_at": saved_at,
        "recipe_hash": facts.recipe_hash,
        "mathematics": dict(facts.mathematics),
        "data_fingerprint": facts.data_fingerprint,
        "train_state": dict(facts.train_state),
        "engine": facts.engine,
        "world_size": world_size,
        "versions": dict(facts.versions),
        "files": dict(files),
        "tensors": dict(tensors),
    }
    # Through JSON once, so that the hash is taken over what a reader will see: lists, string keys.
    raw = json.loads(json.dumps(raw))
    return Manifest.model_validate({**raw, "self_hash": own_hash(raw)})


def own_hash(raw: Mapping[str, Any]) -> str:
    """XXH3-128 of the canonical JSON (sorted keys, no spaces, ASCII) of `raw` without `self_hash`."""
    rest = {k: v for k, v in raw.items() if k != "self_hash"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def serialise(manifest: Manifest) -> bytes:
    """The bytes of manifest.json, laid out for people to read."""
    return (json.dumps(manifest.model_dump(), indent=1) + "\n").encode()


def parse(data: bytes) -> Manifest:
    """Read the bytes of a manifest.json.

    Raises Corrupt where they are not what was written, Incompatible where a newer distdl wrote them.
    """
    raw = _json_object(data)
    told, computed = raw.get("self_hash"), own_hash(raw)
    if told != computed:
        raise Corrupt(f"{MANIFEST}: its own hash is {computed}, it says {told}")
    version = raw.get("format_version")
    if version != FORMAT_VERSION:
        raise Incompatible(
            f"{MANIFEST}: format_version is {version}, this distdl reads {FORMAT_VERSION}; use the distdl "
            "that wrote it, or a newer one"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Corrupt(f"{MANIFEST}: {where or 'the whole'}: {first['msg']}") from error


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{MANIFEST}: not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise Corrupt(f"{MANIFEST}: a {type(raw).__name__} stands where an object was expected")
    return raw
