"""`Saver`: write checkpoints that either exist whole or do not exist, whatever fails and wherever.

    begin     compare what the ranks hold, share out what all hold; rank 0 checks room and begins an attempt
    write     every rank writes its file durably; asynchronously, from a copy, in a background thread
    commit    sizes and hashes are gathered; rank 0 makes the files a checkpoint, and removes old ones; copies
              in memory (`distdl.checkpoint.replicas`) become one with it

In each round every rank does its part, keeps any error as a value, and the values are gathered; so all ranks
go on or all raise with the same cause, and no rank waits for one that has given up. The background thread
takes part in no collective: what became of its file is such a value, gathered at a later boundary.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from distdl.checkpoint.commit import commit, stands_already
from distdl.checkpoint.disk import explain
from distdl.checkpoint.folders import Place, child, shown
from distdl.checkpoint.image import Image, dtype_name, slots_of, take_into, views
from distdl.checkpoint.manifest import Facts, file_name, step_name
from distdl.checkpoint.replicas.keeper import Replicas
from distdl.checkpoint.retention import Keep, prune
from distdl.checkpoint.sharing import share_out
from distdl.checkpoint.store import Store
from distdl.checkpoint.tensorfile import HashingWriter, Slot, header_of
from distdl.comm.world import Json, World
from distdl.errors import CheckpointError
from distdl.pieces import Piece
from distdl.testing import faults

SAVE_POINTS = (
    "save.begin",  # every rank
    "save.made_directory",  # every rank
    "save.header_written",  # every rank, from here to save.written in the background if asynchronous
    "save.data_written",  # not durable yet
    "save.written",
    "save.before_manifest",  # from here on rank 0 alone
    "save.manifest_written",  # in an object store, this is the commit
    "save.before_rename",  # not in an object store
    "save.renamed",  # not in an object store
    "save.pruned",  # in the background if asynchronous
)
COPIED = "save.copied"
"""The point before `save.made_directory` where a save that is written from a copy has it."""

# What headers, the manifest and a file system's own blocks may take beyond the tensors themselves.
MARGIN_BYTES = 1 << 20
MARGIN_BYTES_PER_PIECE = 1 << 10

_log = logging.getLogger(__name__)


@dataclass
class _Save:
    """One save under way. `work`: this rank's file, being written; its result is never an exception."""

    facts: Facts
    began: float
    attempt: str = ""
    work: Future[Json] | None = None


@dataclass(frozen=True)
class _Part:
    """What this rank writes: which file, how it begins, where in it what is, and, by name, what the manifest
    is to say of it.
    """

    file: str
    header: bytes
    slots: Sequence[Slot]
    entries: Mapping[str, Json]

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return len(self.header) + (self.slots[-1].end if self.slots else 0)


@dataclass(frozen=True)
class Committed:
    """What a save came to: `seconds` from its begin to its commit."""

    place: Place
    step: int
    seconds: float


class Saver:
    """Saves at one place. All ranks call `save`, `commit` and `settle`, in the same order; one thread a rank.

    `asynchronous`: `save` returns once this rank's share is copied, into memory that is kept from save to
    save, as much as its share. `metric`: the name and mode whose `keep.best` are kept. `replicas`: where that
    copy is made instead, and from where others get theirs; every save is written from a copy then.
    """

    def __init__(
        self,
        store: Store,
        world: World,
        keep: Keep,
        *,
        asynchronous: bool = False,
        metric: tuple[str, str] | None = None,
        replicas: Replicas | None = None,
    ) -> None:
        self._store = store
        self._world = world
        self._keep = keep
        self._metric = metric
        self._asynchronous = asynchronous
        self._replicas = replicas
        self._image = Image()
        # One thread, so that a removal and the next write take turns.
        self._background = ThreadPoolExecutor(1, "distdl-save")
        self._flying: _Save | None = None
        self.last: Committed | None = None
        """The last save that was committed, or found to be there already."""

    def save(self, held: Mapping[str, Piece], facts: Facts) -> Place | None:
        """Collective. Save one step; blocks until it is committed, or, if asynchronous, until it is copied.

        Returns the checkpoint's place, or None where it is to be committed later. Commits what is in flight
        before. A piece that is held whole has to have equal values on all ranks; each writes a share of them.
        `facts` are taken from rank 0. A sound checkpoint of the same step, recipe and data is left as it is.

        Raises CheckpointError on every rank if any rank fails, with the rank, host and cause. There is then
        no new checkpoint, and those from before are untouched. Only if the very last fsync failed, after the
        rename, is there a new one; the message says so.
        """
        self.commit()
        job = _Save(facts, time.perf_counter())
        loads = self._compare(job, held)
        if loads is None:
            return self._done(job)
        mine = self._share(held, loads)
        self._begin(job, loads, held)
        part = self._part(job, mine)
        room = self._replicas.begin(job.facts.step, part.file, part.nbytes) if self._replicas else None
        if not self._asynchronous and room is None:
            return self._commit(job, self._write(job, part, views(part.slots, mine)))
        copied, failure = self._try(lambda: self._copy(job, part, mine, room))
        if self._replicas is not None:
            self._replicas.send()  # after a failure too: others wait for it, and the commit makes it void
        # A copy that failed on one rank alone is told at the commit, as everything else of this rank is.
        data = [copied] if copied is not None else []
        work = lambda: {"problem": failure} if failure else self._write(job, part, data)  # noqa: E731
        if not self._asynchronous:
            return self._commit(job, work())
        self._flying = job
        job.work = self._background.submit(work)
        return None

    def written(self) -> bool:
        """Local. Whether something is in flight and this rank's part of it has ended, well or not."""
        done = self._flying is not None and self._flying.work is not None and self._flying.work.done()
        return done and (self._replicas is None or self._replicas.arrived())

    @property
    def in_flight(self) -> int | None:
        """Local, the same on all ranks. The step of the save that is not committed yet."""
        return self._flying.facts.step if self._flying else None

    def commit(self) -> Place | None:
        """Collective. Commit what is in flight; waits where a rank is not `written`. None: nothing was.

        Raises as `save`; nothing is in flight afterwards.
        """
        job, self._flying = self._flying, None
        if job is None:
            return None
        assert job.work is not None
        return self._commit(job, job.work.result())

    def settle(self) -> Place | None:
        """Collective. As `commit`, and waits for the removal of old checkpoints as well."""
        place = self.commit()
        self._background.submit(lambda: None).result()
        return place

    def close(self) -> None:
        """Local. No more is saved; what is in flight is not committed. Does not wait. May be called again."""
        self._background.shutdown(wait=False)

    # --- rounds ---

    def _together(self, job: _Save, work: Callable[[], Json]) -> list[Json]:
        """Every rank's result of `work`, on every rank; CheckpointError on every rank if it raised on any."""
        value, problem = self._try(work)
        return self._agree(job, value, problem)

    def _try(self, work: Callable[[], Json]) -> tuple[Json, str | None]:
        try:
            return work(), None
        except Exception as error:
            return None, explain(error, str(self._store))

    def _agree(self, job: _Save, value: Json, problem: str | None) -> list[Json]:
        world = self._world
        told = problem and f"[rank {world.rank}/{world.size} on {socket.gethostname()}] {problem}"
        answers = world.gather([value, told])
        causes = [cause for _, cause in answers if cause is not None]
        if causes:
            raise CheckpointError("\n".join([*causes, self._give_up(job)]))
        return [value for value, _ in answers]

    def _give_up(self, job: _Save) -> str:
        """Discard the attempt; how it stands now. Every rank waits: who leaves first may end the others."""
        place = child(self._store.place, step_name(job.facts.step))
        said = f"{shown(place)} was not written; earlier checkpoints are as they were"
        if self._world.is_main and job.attempt:
            try:
                if self._store.is_committed(job.attempt, job.facts.step):
                    said = f"{shown(place)} was written, but may not outlast a power failure"
                else:
                    self._store.discard(job.attempt, job.facts.step)
            except Exception as error:
                _log.warning("%s: what was written is left for the next start (%s)", shown(place), error)
        return str(self._world.from_main(said))

    def _compare(self, job: _Save, held: Mapping[str, Piece]) -> list[int] | None:
        """By rank, the bytes of its own pieces; None where the checkpoint stands already."""

        def look() -> Json:
            faults.point("save.begin", job.facts.step)
            there = self._world.is_main and stands_already(self._store, job.facts)
            own = sum(p.data.nbytes for p in held.values() if p.begin is not None)
            return [there, own, _holding(job.facts, held)]

        answers = self._together(job, look)
        first = answers[0][2]
        for rank, (_, _, (step, count, digest)) in enumerate(answers):
            if [step, count, digest] != first:
                raise CheckpointError(
                    f"rank {rank} saves step {step} with {count} tensors that all ranks hold (digest of "
                    f"names, shapes and dtypes: {digest}); rank 0 saves step {first[0]} with {first[1]} "
                    f"tensors ({first[2]}). All ranks have to hold the same"
                )
        return None if answers[0][0] else [own for _, own, _ in answers]

    def _share(self, held: Mapping[str, Piece], loads: Sequence[int]) -> dict[str, Piece]:
        """What this rank writes."""
        shared = {n: p.data.nbytes for n, p in held.items() if p.begin is None}
        mine = set(share_out(shared, loads)[self._world.rank])
        # An engine may list the empty rest of a tensor that ran out before this rank.
        runs = {n for n, p in held.items() if p.begin is not None and (p.data.numel() or not p.meta.numel)}
        return {n: p for n, p in held.items() if n in mine or n in runs}

    def _begin(self, job: _Save, loads: Sequence[int], held: Mapping[str, Piece]) -> None:
        shared = sum(p.data.nbytes for p in held.values() if p.begin is None)
        pieces = len(held) * self._world.size
        needed = sum(loads) + shared + pieces * MARGIN_BYTES_PER_PIECE + MARGIN_BYTES
        world, step = self._world, job.facts.step
        answers = self._together(job, lambda: self._store.begin(step, needed) if world.is_main else None)
        job.attempt = str(answers[0])

    def _part(self, job: _Save, mine: Mapping[str, Piece]) -> _Part:
        slots = slots_of(mine)
        file = file_name(self._world.rank, self._world.size, self._store.mark(job.attempt))
        return _Part(file, header_of(slots), slots, {name: _entry(piece) for name, piece in mine.items()})

    def _copy(self, job: _Save, part: _Part, mine: Mapping[str, Piece], room: Tensor | None) -> memoryview:
        if room is None:
            data = self._image.take(part.slots, mine)
        else:
            # All of the file: what lies in memory then is what a checkpoint's directory has.
            room[: len(part.header)] = torch.frombuffer(bytearray(part.header), dtype=torch.uint8)
            data = take_into(room[len(part.header) :], part.slots, mine)
        faults.point(COPIED, job.facts.step)
        return data

    def _write(self, job: _Save, part: _Part, data: Iterable[memoryview]) -> Json:
        """Local. Write this rank's file; what became of it, or what went wrong. Never raises."""
        value, problem = self._try(lambda: self._write_file(job, part, data))
        return {"value": value, "problem": problem}

    def _write_file(self, job: _Save, part: _Part, data: Iterable[memoryview]) -> Json:
        step = job.facts.step
        faults.point("save.made_directory", step)
        sink = self._store.create(job.attempt, step, part.file, part.nbytes)
        try:
            with HashingWriter(sink) as writer:
                writer.write(part.header)
                faults.point("save.header_written", step)
                for view in data:
                    writer.write(view)
            faults.point("save.data_written", step)
            sink.finish()
        except BaseException:
            with contextlib.suppress(Exception):
                sink.abandon()
            raise
        faults.point("save.written", step)
        return {
            "file": part.file,
            "size": writer.size,
            "xxh3_128": writer.hexdigest(),
            "tensors": part.entries,
        }

    def _commit(self, job: _Save, result: Json) -> Place:
        written = self._agree(job, result.get("value"), result.get("problem"))
        world, store = self._world, self._store
        manifest: list[bytes] = []  # stays here: it may be large, and the others need it not

        def make_it_one() -> None:
            if world.is_main:
                manifest.append(commit(store, job.attempt, job.facts, world.size, written))

        self._together(job, make_it_one)
        place = self._done(job)
        if self._replicas is not None:
            self._replicas.commit(manifest[0] if manifest else None)
        if world.is_main:
            pruned = self._background.submit(self._prune, job.facts.step)
            if not self._asynchronous:
                pruned.result()
        return place

    def _done(self, job: _Save) -> Place:
        place = child(self._store.place, step_name(job.facts.step))
        self.last = Committed(place, job.facts.step, time.perf_counter() - job.began)
        return place

    def _prune(self, step: int) -> None:
        # The checkpoint stands by now. Failing the run over its predecessors would only make it restart from
        # this one, and fail at the same place again.
        try:
            prune(self._store, self._keep, step, self._metric)
            faults.point("save.pruned", step)
        except Exception as error:
            _log.warning("old checkpoints were not all removed: %s", explain(error, str(self._store)))


def _holding(facts: Facts, held: Mapping[str, Piece]) -> Json:
    """What has to be the same on all ranks: the step, and a digest of what all of them hold."""
    shared = sorted((n, p) for n, p in held.items() if p.begin is None)
    described = [f"{n} {dtype_name(p.data.dtype)} {list(p.shape)}" for n, p in shared]
    return [facts.step, len(described), xxhash.xxh3_64_hexdigest("\n".join(described).encode())]


def _entry(piece: Piece) -> Json:
    """Dtype, whole shape, and the run of elements."""
    begin = piece.begin or 0
    return [dtype_name(piece.data.dtype), list(piece.shape), begin, begin + piece.data.numel()]
