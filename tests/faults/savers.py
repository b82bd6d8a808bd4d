"""Processes that save again and again, to be killed at any moment: a state that is a function of the step.

Every element of every tensor follows from its name, its place and the step, so that a tensor of another step,
a run in the wrong place or a byte that was never written shows. The pieces are cut as real engines cut them.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import select
import struct
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from distdl.checkpoint.find import find_and_verify
from distdl.checkpoint.folders import child
from distdl.checkpoint.manifest import Facts, step_name
from distdl.checkpoint.open import open_checkpoint
from distdl.checkpoint.read import verify
from distdl.checkpoint.retention import Keep
from distdl.checkpoint.store import store_at
from distdl.checkpoint.write import Saver
from distdl.comm import World
from distdl.comm.world import join
from distdl.lifeline import die_with_parent
from distdl.pieces import Meta, Piece, Saved
from distdl.testing import faults
from distdl.testing.worlds import PRELOAD

KILLED = -9
DEADLINE_S = 60.0
ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3", "accelerate")

_PRIME = 2039


# --- a state that is a function of the step ---


@dataclass(frozen=True)
class Part:
    """What a rank holds of a tensor: a `Piece` without its elements. `length` counts them."""

    meta: Meta
    begin: int | None
    length: int


Layout = dict[str, Part]
"""What one rank holds, by name."""


def values(name: str, meta: Meta, step: int, begin: int, end: int) -> Tensor:
    """The elements [begin, end) of a tensor at a step; each differs from those of the 2000 steps before."""
    numbers = torch.arange(begin, end) * 31 + zlib.crc32(name.encode()) + step * 7919
    return (numbers % _PRIME).to(meta.dtype)


def held(layout: Layout, step: int) -> dict[str, Piece]:
    """A rank's pieces at a step."""
    pieces = {}
    for name, part in layout.items():
        begin = part.begin or 0
        data = values(name, part.meta, step, begin, begin + part.length)
        shape = part.meta.shape
        pieces[name] = Piece(data.reshape(shape) if part.begin is None else data, shape, part.begin)
    return pieces


def facts(step: int) -> Facts:
    return Facts(step, "abc", {"seed": 7}, "f00d", {"step": step}, "ddp")


def require_state(saved: Saved, step: int, names: Iterable[str]) -> None:
    """Fail unless `saved` has exactly these names, and every element is that of `step`."""
    assert sorted(saved.metas) == sorted(names)
    for name, meta in saved.metas.items():
        expected = values(name, meta, step, 0, meta.numel).reshape(meta.shape)
        assert torch.equal(saved.whole(name), expected), f"{name} is not of step {step}"


def good_steps(place: str, names: Iterable[str]) -> list[int]:
    """The steps of all that is named as a checkpoint, newest first. Fails unless all are sound."""
    store = store_at(place)
    names = list(names)
    steps = store.steps()
    for step in steps:
        path = child(store.place, step_name(step))
        assert verify(path).train_state == {"step": step}
        require_state(open_checkpoint(path), step, names)
    return steps


def whole_layout(sizes: dict[str, tuple[int, ...]]) -> Layout:
    """float32 tensors that every rank holds whole."""
    metas = {name: Meta(torch.float32, shape) for name, shape in sizes.items()}
    return {name: Part(meta, None, meta.numel) for name, meta in metas.items()}


def layouts_of_engines(world: World) -> dict[str, Layout]:
    """Collective. How each engine cuts what a rank holds of a small CNN after a step of AdamW, with EMA."""
    from tests.multiprocess.contract import drive

    found = {}
    for engine in ENGINES:
        run = drive(world, "cnn_groupnorm", {"engine": engine})
        run.step(0)
        found[engine] = {
            name: Part(piece.meta, piece.begin, piece.data.numel())
            for name, piece in run.engine.held().items()
        }
    return found


# --- a group of processes that save ---


@dataclass(frozen=True)
class Job:
    """What a group saves, how and where. `layouts`: one a rank. `place`: a folder or a URL."""

    folder: Path
    place: str
    layouts: tuple[Layout, ...]
    asynchronous: bool
    keep: int = 3
    attempt: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.layouts)

    @property
    def names(self) -> set[str]:
        return {name for layout in self.layouts for name in layout}


class Progress:
    """Where a rank stands, in memory that outlives it: the step it resumed at, the last one that it knows to
    be committed, and the point of a save that it passed last.
    """

    _FORM = struct.Struct("<qq48s")

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(self._FORM.pack(-1, -1, b"start"))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), self._FORM.size)

    def resumed_at(self, step: int) -> None:
        struct.pack_into("<q", self._memory, 0, step)

    def committed(self, step: int) -> None:
        struct.pack_into("<q", self._memory, 8, step)

    def passed(self, name: str, step: int | None = None) -> None:
        struct.pack_into("<48s", self._memory, 16, name.encode())

    @property
    def resumed(self) -> int:
        return int(struct.unpack_from("<q", self._memory, 0)[0])

    @property
    def last_committed(self) -> int:
        return int(struct.unpack_from("<q", self._memory, 8)[0])

    @property
    def point(self) -> str:
        return bytes(struct.unpack_from("<48s", self._memory, 16)[0]).rstrip(b"\0").decode()


def saver_for(place: str, world: World, asynchronous: bool, keep: int = 3) -> Saver:
    return Saver(store_at(place), world, Keep(keep), asynchronous=asynchronous)


def save_for_ever(job: Job, world: World, progress: Progress) -> None:
    """What a run does, without training: find the newest, load it, sweep; then save, save, save."""
    store = store_at(job.place)
    found = find_and_verify(store, world)
    assert not found.damaged, found.damaged
    step = 0
    if found.path is not None and found.manifest is not None:
        step = found.manifest.step
        require_state(open_checkpoint(found.path), step, job.names)
    if world.is_main:
        store.sweep()
    world.barrier()
    progress.resumed_at(step)
    saver = saver_for(job.place, world, job.asynchronous, job.keep)
    while True:
        step += 1
        pieces = held(job.layouts[world.rank], step)
        saver.save(pieces, facts(step))
        progress.committed(step - 1 if job.asynchronous else step)
        for piece in pieces.values():
            piece.data.zero_()  # training goes on: what is written must not change with it
        if job.asynchronous and step % 3:  # else the next save comes while this one is in flight
            while world.sum_ints([int(saver.written())])[0] < world.size:
                pass
            saver.commit()
            progress.committed(step)


def _trace(progress: Progress) -> None:
    """Note every point of a save that is passed, in the background too. An armed fault makes `point` look."""
    faults._armed.append(faults.Fault(None, "none of them", "raise"))
    faults._trigger = progress.passed


def _rank_main(job: Job, rank: int) -> None:
    die_with_parent()
    torch.set_num_threads(1)
    os.environ.update(job.environment)
    progress = Progress(job.folder / f"progress-{job.attempt}-{rank}")
    _trace(progress)
    meeting = str(job.folder / f"meeting-{job.attempt}")
    try:
        world = join(rank, job.size, "cpu", DEADLINE_S, FileStore(meeting, job.size))
        save_for_ever(job, world, progress)
    except BaseException:
        # Quietly: that a rank fails when another is killed is what is expected.
        (job.folder / f"story-{job.attempt}-{rank}").write_text(traceback.format_exc())
        os._exit(1)


class Group:
    """The processes of one attempt. Leaving the block kills whoever is alive."""

    def __init__(self, job: Job) -> None:
        self.job = job
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.progress = [Progress(job.folder / f"progress-{job.attempt}-{r}") for r in range(job.size)]
        self._processes: list[BaseProcess] = [
            context.Process(target=_rank_main, args=(job, rank), daemon=True) for rank in range(job.size)
        ]

    def __enter__(self) -> Group:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def kill(self, *ranks: int) -> None:
        """`kill -9` of these ranks at once; all of the group have to be alive."""
        assert all(p.is_alive() for p in self._processes), self.stories()
        victims = [self._processes[rank] for rank in ranks]
        for process in victims:
            process.kill()
        for process in victims:
            process.join()

    def wait_until(self, reached: Callable[[Progress], bool]) -> None:
        """Until `reached(progress)` is true of every rank. Fails where one ends before."""
        end = time.monotonic() + DEADLINE_S
        while not all(reached(p) for p in self.progress):
            assert all(p.is_alive() for p in self._processes), self.stories()
            assert time.monotonic() < end, f"not within {DEADLINE_S} s, at {[p.point for p in self.progress]}"
            select.select([], [], [], 0.001)

    def wait_until_saved(self, count: int) -> None:
        """Until every rank has resumed and knows of so many saves since then that they are committed."""
        self.wait_until(lambda p: p.resumed >= 0 and (not count or p.last_committed >= p.resumed + count))

    def stories(self) -> str:
        """How the ranks that failed by themselves tell it."""
        stories = self.job.folder.glob(f"story-{self.job.attempt}-*")
        return "\n".join(f"{p.name}:\n{p.read_text()}" for p in sorted(stories)) or "ended without a word"
