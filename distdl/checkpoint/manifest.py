"""`Manifest`: the JSON that makes a directory a checkpoint, and the names a checkpoint has on disk.

    checkpoints/step-00000300/                          a checkpoint, once manifest.json stands in it
    checkpoints/step-00000300/manifest.json
    checkpoints/step-00000300/rank-00000-of-00002.safetensors
    checkpoints/step-00000300.tmp-1f2e3d4c/             being written, or being removed; swept at start
    checkpoints/step-00000300.bad-1f2e3d4c/             was damaged and stood in the way of a new one
    checkpoints/step-00000300.old-1f2e3d4c/             same step, another recipe or other data; likewise

Of each tensor the manifest says which runs of its elements, in row-major order of the whole, are in which
file. In its file a whole tensor has its own shape, a part of one has the single dimension [end - begin].

Everything here is pure and imports no torch. A manifest may come from anybody: what `parse` returns is
consistent in itself; whether the files agree is checked where they are opened.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import xxhash
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from distdl.checkpoint.dtypes import ITEMSIZE
from distdl.errors import Corrupt, Incompatible
from distdl.recipe import differences

FORMAT_VERSION = 2
READABLE = (1, 2)
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 256 << 20
"""Bytes of the largest manifest that is read: some four million pieces."""

_STEP = re.compile(r"step-(\d{8,18})")
_LARGEST = 2**63 - 1


def step_name(step: int) -> str:
    """The directory name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a directory name stands for; None for any name that is not a checkpoint's."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and step_name(int(match[1])) == name else None


def file_name(rank: int, world_size: int, attempt: str = "") -> str:
    """The name of the file that one rank writes. `attempt` sets two attempts at one place apart."""
    return f"rank-{rank:05d}-of-{world_size:05d}{attempt and '-'}{attempt}.safetensors"


def _shown(name: str) -> str:
    # Names are printed; one with control characters in it could write to the reader's terminal.
    if not name.isprintable():
        raise ValueError(f"{name!r} has characters that cannot be printed")
    return name


Count = Annotated[int, Field(ge=0, le=_LARGEST)]
# One path component that cannot lead out of the directory: a manifest may come from anywhere.
PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=200)]
TensorName = Annotated[str, Field(max_length=1000), AfterValidator(_shown)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Piece = Annotated[tuple[PlainName, Count, Count], Field(strict=False)]
"""A file, and the run [begin, end) of the tensor's elements that is in it."""


class _Frozen(BaseModel):
    # Keys that a later distdl adds without raising format_version are ones that this one may ignore.
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=True)


class TensorEntry(_Frozen):
    """What one tensor is and where: `pieces` ascend and cover it, without gap or overlap.

    `dtype` is torch's name without "torch.", such as "bfloat16".
    """

    dtype: str
    shape: Annotated[list[Count], Field(max_length=64)]
    pieces: list[Piece]

    @property
    def numel(self) -> int:
        """How many elements the whole has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return self.numel * ITEMSIZE[self.dtype]

    @model_validator(mode="after")
    def _is_covered(self) -> TensorEntry:
        if self.dtype not in ITEMSIZE:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(ITEMSIZE)}")
        if self.nbytes > _LARGEST:
            raise ValueError(f"{self.numel} elements of {self.dtype} are more than any file holds")
        if len({file for file, _, _ in self.pieces}) < len(self.pieces):
            raise ValueError("two pieces of it are in one file")
        at = 0
        for file, begin, end in self.pieces:
            if begin != at or (end <= begin and self.numel):
                raise ValueError(f"the piece in {file} is [{begin}, {end}), expected one from {at} on")
            at = end
        if at != self.numel:
            raise ValueError(f"its pieces end at {at}, it has {self.numel} elements")
        return self


class FileEntry(_Frozen):
    """One file's size in bytes and its XXH3 hash, 128 bits as 32 hexadecimal digits."""

    size: Count
    xxh3_128: Hash


class Metric(_Frozen):
    """The evaluation at this very step: what retention compares."""

    name: str
    value: float
    mode: Literal["max", "min"]


class Manifest(_Frozen):
    """What one checkpoint holds. Make one with `seal`, which computes `self_hash`."""

    format_version: int
    step: Annotated[int, Field(ge=0, lt=10**18)]
    saved_at: str
    """UTC, ISO 8601."""
    recipe_hash: str
    mathematics: dict[str, Any]
    """The recipe's keys that `recipe_hash` covers, so that a reader can say which ones differ."""
    data_fingerprint: str
    train_state: dict[str, Any]
    engine: str
    world_size: Annotated[int, Field(ge=1, le=10**7)]
    versions: dict[str, str]
    metric: Metric | None = None
    files: dict[PlainName, FileEntry]
    tensors: dict[TensorName, TensorEntry]
    self_hash: Hash
    """XXH3-128 of the canonical JSON of all the other keys."""

    def what_changed(self, mathematics: Mapping[str, Any], data_fingerprint: str) -> list[str]:
        """Every key of the mathematics, and the data, in which a run differs from it (checkpoint -> run)."""
        changed = differences(self.mathematics, mathematics)
        if self.data_fingerprint != data_fingerprint:
            changed.append(f"the data themselves: {self.data_fingerprint} -> {data_fingerprint}")
        return changed

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return sum(entry.size for entry in self.files.values())

    @model_validator(mode="after")
    def _files_can_hold_it(self) -> Manifest:
        held = dict.fromkeys(self.files, 0)
        for name, tensor in self.tensors.items():
            for file, begin, end in tensor.pieces:
                if file not in held:
                    raise ValueError(f"{name} is said to be in {file}, not listed under files")
                held[file] += (end - begin) * ITEMSIZE[tensor.dtype]
        for file, nbytes in held.items():
            if nbytes > self.files[file].size:
                raise ValueError(f"{file}: {nbytes} bytes of tensors in a file of {self.files[file].size}")
        return self


@dataclass(frozen=True)
class Facts:
    """What the caller of a save knows: everything in the manifest that is not about files.

    The dicts hold what JSON holds (tuples come back as lists); NaN and infinities are allowed. `metric`: the
    name, value and mode ("max" or "min") of an evaluation at this very step.
    """

    step: int
    recipe_hash: str
    mathematics: Mapping[str, Any]
    data_fingerprint: str
    train_state: Mapping[str, Any]
    engine: str
    versions: Mapping[str, str] = field(default_factory=dict)
    metric: Mapping[str, Any] | None = None


def seal(
    facts: Facts,
    world_size: int,
    saved_at: str,
    files: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Mapping[str, Any]],
) -> Manifest:
    """Put a manifest together and compute its own hash.

    Raises TypeError where `facts` holds what JSON cannot, ValueError where a field is not of its type or the
    pieces of a tensor do not make it up.
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
        "metric": None if facts.metric is None else dict(facts.metric),
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
    """The bytes of manifest.json: for people to read, with one line for each file and each tensor."""
    long = ("files", "tensors")
    lines = []
    for key, value in manifest.model_dump().items():
        if key in long and value:
            rows = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items()]
            text = "{\n" + ",\n".join(rows) + "\n }"
        else:
            text = json.dumps(value, indent=1).replace("\n", "\n ")
        lines.append(f" {json.dumps(key)}: {text}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def parse(data: bytes) -> Manifest:
    """Read the bytes of a manifest.json.

    Raises Corrupt where they are not what was written, Incompatible where a newer distdl wrote them.
    """
    raw, computed = _json_object(data)
    if raw.get("self_hash") != computed:
        told = str(raw.get("self_hash"))[:80]
        raise Corrupt(f"{MANIFEST}: its own hash is {computed}, it says {told!r}")
    version = raw.get("format_version")
    if version not in READABLE:
        raise Incompatible(
            f"{MANIFEST}: format_version is {str(version)[:80]!r}, this distdl reads "
            f"{' and '.join(map(str, READABLE))}; use the distdl that wrote it, or a newer one"
        )
    try:
        return Manifest.model_validate(_in_pieces(raw) if version == 1 else raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Corrupt(f"{MANIFEST}: {where or 'the whole'}: {first['msg']}"[:1000]) from error


def _in_pieces(raw: dict[str, Any]) -> dict[str, Any]:
    """Version 1, where each tensor is whole in one file, as version 2. What makes no sense stays so."""
    tensors = raw.get("tensors")
    if not isinstance(tensors, dict):
        return raw
    whole = {}
    for name, entry in tensors.items():
        whole[name] = entry
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if isinstance(shape, list) and len(shape) <= 64 and all(type(n) is int for n in shape):
            whole[name] = {**entry, "pieces": [[entry.get("file"), 0, math.prod(shape)]]}
    return {**raw, "tensors": whole}


def _json_object(data: bytes) -> tuple[dict[str, Any], str]:
    """The object and its own hash."""
    try:
        raw = json.loads(data.decode())
        if isinstance(raw, dict):
            return raw, own_hash(raw)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{MANIFEST}: not JSON ({str(error)[:200]})") from error
    raise Corrupt(f"{MANIFEST}: a {type(raw).__name__} stands where an object was expected")
