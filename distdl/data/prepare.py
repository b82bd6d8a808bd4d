"""Turn a dataset's Parquet files into a memory-mappable Arrow dataset, once per machine.

The result lies in `$DISTDL_CACHE` (or ~/.cache/distdl) under `datasets/<fingerprint>/<split>/`, in the format
of Hugging Face `datasets`, whose `load_from_disk` opens it too. It is built in a temporary folder beside its
place and appears there by one rename, so what has that name is whole. This is the only file that imports
`datasets`, and only when there is something to build: the import takes a second in every worker.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from distdl.data.catalogue import Sources, sources, title
from distdl.data.info import describe_sources
from distdl.errors import DataError, EnvironmentProblem, nearest
from distdl.plan import DataInfo

CACHE_VARIABLE = "DISTDL_CACHE"
STATE_FILE = "state.json"
_ABANDONED_S = 24 * 3600


@dataclass(frozen=True)
class Prepared:
    """A dataset ready to be memory mapped: what it is, and the folder with one sub-folder per split."""

    info: DataInfo
    folder: Path

    def split_folder(self, split: str) -> Path:
        """Where `split` lies. Raises DataError where the dataset has no such split."""
        if split not in self.info.rows:
            raise DataError(
                f"dataset {self.info.name!r} has no split {split!r}{nearest(split, self.info.rows) or '.'} "
                f"Its splits: {', '.join(sorted(self.info.rows))}."
            )
        return self.folder / split


def prepare(name: str | None, path: str | Path | None) -> Prepared:
    """Find the dataset `name` or `path` in the cache, or build it there. Any process may call it, alone.

    Processes that build at the same moment all succeed, and one result stays; let one process a machine go
    first to spare the others the work. Raises DataError for bad files, EnvironmentProblem for a cache folder
    that cannot be written.
    """
    files = sources(name, path)
    info = describe_sources(files, title(name, path))
    prepared = Prepared(info, cache_folder(os.environ) / "datasets" / info.fingerprint)
    _build_unless_there(files, prepared.folder)
    missing = [s for s in info.rows if not (prepared.folder / s / STATE_FILE).is_file()]
    if missing:
        raise DataError(
            f"the prepared dataset {prepared.folder} has lost its {', '.join(sorted(missing))} split; "
            "delete that folder, and it is prepared again"
        )
    return prepared


def cache_folder(environ: Mapping[str, str]) -> Path:
    """The folder for everything that can be made again: `$DISTDL_CACHE`, or ~/.cache/distdl."""
    given = environ.get(CACHE_VARIABLE)
    return Path(given).expanduser().absolute() if given else Path.home() / ".cache" / "distdl"


def _build_unless_there(files: Sources, target: Path) -> None:
    try:
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target.parent)
        with tempfile.TemporaryDirectory(
            prefix=f"{target.name}.tmp-", dir=target.parent, ignore_cleanup_errors=True
        ) as scratch:
            built = Path(scratch) / "built"
            _convert(files, built, Path(scratch) / "datasets-cache")
            _flush(built)
            _publish(built, target)
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot prepare the dataset in {target.parent}: {error.strerror or error}. It needs about twice "
            f"the dataset's uncompressed size in free space; set {CACHE_VARIABLE} to a folder that has it."
        ) from error


def _publish(built: Path, target: Path) -> None:
    try:
        os.rename(built, target)
    except OSError as error:
        # Another process was first; its result comes from the same bytes as ours.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    _fsync(target.parent)


def _convert(files: Sources, built: Path, scratch: Path) -> None:
    """Parquet to Arrow with Hugging Face `datasets`, whose cache is private to this call."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    with _silent_progress_bars():
        try:
            splits = {
                split: datasets.Dataset.from_parquet(
                    # Escaped, because `datasets` reads `*`, `?` and `[` in a path as patterns.
                    [glob.escape(str(file.resolve())) for file in members],
                    split=datasets.NamedSplit(split),
                    cache_dir=str(scratch),
                )
                for split, members in files.items()
            }
        except ValueError as error:  # a feature type, in the files' own description, that it does not know
            raise DataError(
                f"`datasets` {datasets.__version__} cannot read these Parquet files: {error}"
            ) from error
        except DatasetGenerationError as error:
            cause = error.__cause__
            # Arrow reports corrupt data as an OSError without an errno; with one, it is the disk.
            if isinstance(cause, OSError) and cause.errno is not None:
                raise cause from error
            names = ", ".join(str(m[0].parent) for m in list(files.values())[:1])
            raise DataError(
                f"the Parquet files in {names} cannot be read through: {cause or error}. "
                "They are damaged or of mixed columns; fetch or write them again."
            ) from error
        datasets.DatasetDict(splits).save_to_disk(str(built))


@contextmanager
def _silent_progress_bars() -> Iterator[None]:
    import datasets

    disabled_already = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled_already:
            datasets.enable_progress_bars()


def _flush(folder: Path) -> None:
    """Make the files durable, so that a power cut after the rename cannot leave empty ones behind it."""
    for path in sorted(folder.rglob("*")):
        _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(parent: Path) -> None:
    """Delete what killed processes left. A day is far longer than a folder stays without a new file in it."""
    for folder in parent.glob("*.tmp-*"):
        # Another process may remove it too, between any two of these calls.
        with suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)
