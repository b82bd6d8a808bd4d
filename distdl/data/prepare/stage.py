"""Copy a prepared dataset to a node's own disk: once a node, every file checked, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from distdl.data.index import INDEX_FILE, DataFile, Index, Split, is_relative, read_index, resolve
from distdl.data.prepare.building import building, check_room, disk_errors, is_prepared
from distdl.data.prepare.run import Progress, Say
from distdl.data.prepare.writer import fsync_path
from distdl.errors import DataError
from distdl.testing.faults import point

_CHUNK_BYTES = 4 * 2**20


def stage(
    source: Path,
    to: Path,
    node: int = 0,
    nodes: int = 1,
    *,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Path:
    """Copy the dataset `source` to the folder `to` and return `to`; blocks.

    Every process of a node may call it: one copies, the others wait for it. Of several `nodes`, this one
    copies shards whose number in their split is `node` modulo `nodes`; the index names the others where they
    lie in `source`. The fingerprint stays the same. A copy that was killed goes on with the files that are
    missing. Raises DataError for damage, no room, or another dataset at `to`; EnvironmentProblem for a folder
    that cannot be written.
    """
    if not 0 <= node < nodes:
        raise DataError(f"--node {node} of --nodes {nodes}: expected 0 to {nodes - 1}")
    source, to = source.expanduser().absolute(), to.expanduser().absolute()
    index = staged_index(read_index(source), source, node, nodes)
    say = say or (lambda text: None)
    if _there(index, to):
        say(f"{to} is there already, and whole")
        return to
    with building(to, wait=True) as made, disk_errors(to):
        if _there(index, to):
            say(f"{to} is there already, and whole")
            made.discard()
            return to
        # The index is the job: a killed copy of the same dataset goes on, of another one starts over.
        if made.start({"stage": str(source), "index": index.to_json()}) == "again":
            say("going on with a copy that was interrupted")
        files = [file for file in index.files() if _is_local(file)]
        missing = [file for file in files if not _same_size(made.dataset / file.file, file)]
        check_room(made.folder, sum(file.bytes for file in missing))
        _copy_all(source, made.dataset, missing, progress or (lambda done, total: None))
        point("stage.before_index")
        _write(made.dataset / INDEX_FILE, [index.to_json().encode()])
        made.publish(overwrite=True)
    return to


def staged_index(index: Index, source: Path, node: int, nodes: int) -> Index:
    """The index of the copy that node `node` of `nodes` gets: files of others stay absolute paths or URLs."""
    splits = {}
    for name, split in index.splits.items():
        shards = tuple(
            shard
            if number % nodes == node and _is_local(shard)
            else shard.model_copy(update={"file": resolve(source, shard.file)})
            for number, shard in enumerate(split.shards)
        )
        splits[name] = Split(shards=shards, offsets=split.offsets)
    return index.model_copy(update={"splits": splits})


def _there(index: Index, to: Path) -> bool:
    """Whether `to` is this very copy, all files in place. Raises DataError where it is something else."""
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return False
    if not is_prepared(to):
        raise DataError(f"{to} exists and is not a prepared dataset; choose another --to, or remove it")
    found = read_index(to)
    if found.fingerprint != index.fingerprint:
        raise DataError(
            f"{to} holds another dataset, {found.name!r} with fingerprint {found.fingerprint}; remove it, or "
            "choose another --to"
        )
    whole = all(_same_size(to / file.file, file) for file in index.files() if _is_local(file))
    return whole and found == index


def _is_local(file: DataFile) -> bool:
    return is_relative(file.file)


def _same_size(path: Path, file: DataFile) -> bool:
    try:
        return path.stat().st_size == file.bytes
    except OSError:
        return False


def _copy_all(source: Path, target: Path, files: list[DataFile], progress: Progress) -> None:
    total = sum(file.bytes for file in files)
    done = 0
    progress(done, total)
    for number, file in enumerate(files):
        point("stage.file", number)
        copy_checked(source / file.file, target / file.file, file)
        done += file.bytes
        progress(done, total)


def copy_checked(source: Path, target: Path, file: DataFile) -> None:
    """Copy one file, hashing what is read; `target` appears only when it is right and durable."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.part")
    digest = xxhash.xxh3_128()
    size = _write(partial, _chunks(source, digest.update))
    if size != file.bytes or digest.hexdigest() != file.hash:
        partial.unlink()
        raise DataError(
            f"{source} is damaged: {size} bytes with hash {digest.hexdigest()}, and the index says "
            f"{file.bytes} with {file.hash}. `distdl data verify` lists all that is wrong; prepare or copy "
            "it again."
        )
    partial.replace(target)
    fsync_path(target.parent)


def _chunks(source: Path, see: Callable[[bytes], None]) -> Iterator[bytes]:
    try:
        stream = source.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror or error}. `distdl data verify`") from error
    with stream:
        while chunk := stream.read(_CHUNK_BYTES):
            see(chunk)
            yield chunk


def _write(path: Path, chunks: Iterator[bytes] | list[bytes]) -> int:
    size = 0
    with path.open("wb") as file:
        for chunk in chunks:
            size += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return size
