"""`Store`: where checkpoints go. Two kinds, a directory and an object store; nothing outside asks which."""

from __future__ import annotations

from typing import Protocol

from distdl.checkpoint.folders import Folder, Place, is_url, local_path
from distdl.checkpoint.local import LocalStore
from distdl.checkpoint.objects import ObjectStore

__all__ = ["FileSink", "LocalStore", "ObjectStore", "Store", "store_at"]


class FileSink(Protocol):
    """A new file that is being written by one thread."""

    def write(self, data: memoryview) -> None:
        """Append all of `data`, whose memory may be used again afterwards."""

    def finish(self) -> None:
        """Make it durable. Called once, last."""

    def abandon(self) -> None:
        """Give up instead: what was written is of no use."""


class Store(Protocol):
    """Local, no rank waits for another. Raises OSError, CheckpointError, and what a store's library raises.

    An attempt is one save of one step: rank 0 begins, discards or commits it, every rank creates its file.
    """

    place: Place

    def steps(self) -> list[int]:
        """The steps of everything that is named as a checkpoint, sound or not, the highest first."""

    def stands(self, step: int) -> bool:
        """Whether something stands where the checkpoint of `step` belongs, sound or not."""

    def begin(self, step: int, needed: int) -> str:
        """Begin an attempt that writes `needed` bytes; returns its name, for the other ranks.

        Raises CheckpointError where there is no room.
        """

    def mark(self, attempt: str) -> str:
        """What file names of this attempt have to carry."""

    def create(self, attempt: str, step: int, file: str, nbytes: int) -> FileSink:
        """A new file of the attempt, about `nbytes` large."""

    def written(self, attempt: str, step: int) -> Folder:
        """What the ranks have written."""

    def commit(self, attempt: str, step: int, manifest: bytes, kept_as: str | None) -> None:
        """Make the attempt the checkpoint of `step`, durably.

        `kept_as`: what stands there already is kept, marked by this word; None: nothing stands there.
        """

    def is_committed(self, attempt: str, step: int) -> bool:
        """Whether the attempt has become a checkpoint."""

    def discard(self, attempt: str, step: int) -> None:
        """Remove an attempt that was not committed; nothing where it was."""

    def remove(self, step: int) -> None:
        """Remove a checkpoint, in such an order that what a kill leaves is never taken for one."""

    def sweep(self) -> list[str]:
        """Remove what unfinished saves and removals left; returns those names.

        Only while nobody saves here: rank 0 calls it at start, when it holds the lock on the run.
        """


def store_at(place: Place) -> Store:
    """The store at a directory or URL."""
    return ObjectStore(str(place)) if is_url(place) else LocalStore(local_path(place))
