"""`Search`: the newest checkpoint that the memories of all nodes still have together, brought to every node.

Every byte is hashed before it is used: what a node has, by its own ranks, and what it is sent, by whom it was
sent to. A damaged copy is as good as none; where there is no other, the next older checkpoint is looked for,
and in the end the caller goes to disk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
import xxhash

from distdl.checkpoint.folders import LocalFolder
from distdl.checkpoint.image import memory_of
from distdl.checkpoint.manifest import MANIFEST, Manifest, parse, step_name
from distdl.checkpoint.read import wrong_hashes
from distdl.checkpoint.replicas.home import Copy, put
from distdl.checkpoint.replicas.keeper import Replicas, attempt
from distdl.checkpoint.replicas.mapped import Mapped
from distdl.checkpoint.replicas.nodes import Move, moves
from distdl.checkpoint.replicas.room import free_memory
from distdl.checkpoint.sharing import share_out
from distdl.testing import faults


@dataclass
class _Candidate:
    """One checkpoint: by node, its files there, as indices among its sorted names, `count` of them."""

    step: int
    count: int
    on: dict[int, set[int]]


class Search:
    """One resume. All ranks make one, call `newest` alike, and `close` when what it found has been read."""

    def __init__(self, replicas: Replicas, recipe_hash: str, data_fingerprint: str) -> None:
        """Collective. Looks at what each node has of this recipe and these data."""
        self._r = replicas
        self._world, self._nodes = replicas.world, replicas.nodes
        self.notes: list[str] = []
        """What was not used and why, the same on all ranks."""
        found: list[Copy] | None = attempt(replicas.home.copies)[0]
        self._here: dict[tuple[str, str], Copy] = {
            (copy.name, copy.manifest.self_hash): copy
            for copy in found or []
            if (copy.manifest.recipe_hash, copy.manifest.data_fingerprint) == (recipe_hash, data_fingerprint)
        }
        self._candidates = self._gathered()
        self._taken: tuple[str, Manifest] | None = None

    def _gathered(self) -> dict[tuple[str, str], _Candidate]:
        mine = []
        if self._r.leads:
            for (name, own), copy in self._here.items():
                all_files = sorted(copy.manifest.files)
                indices = [i for i, file in enumerate(all_files) if file in copy.files]
                mine.append([name, own, copy.manifest.step, len(all_files), indices])
        found: dict[tuple[str, str], _Candidate] = {}
        for rank, rows in enumerate(self._world.gather(mine)):
            for name, own, step, count, indices in rows:
                candidate = found.setdefault((name, own), _Candidate(step, count, {}))
                candidate.on[self._nodes.of(rank)] = set(indices)
        return found

    @property
    def steps(self) -> list[int]:
        """Of what any node has some of; the same on all ranks."""
        return sorted({candidate.step for candidate in self._candidates.values()})

    def newest(self, at_least: int, on_disk: Mapping[int, str | None]) -> tuple[Path, Manifest] | None:
        """Collective. The newest checkpoint of this or a later step of which every file is sound somewhere,
        brought into this node's memory; None where there is none. What was refused is not tried again.

        `on_disk`: the steps that may be taken and the hash of their manifest there, None where it is damaged.
        """
        for key in sorted(self._candidates, key=lambda k: (self._candidates[k].step, k), reverse=True):
            if self._candidates[key].step < at_least:
                break
            candidate = self._candidates.pop(key)
            if candidate.step not in on_disk or on_disk[candidate.step] not in (None, key[1]):
                continue
            problem = self._bring(key, candidate)
            if problem is None and self._taken is not None:
                return self._r.home.path / key[0], self._taken[1]
            if not self._r.on:
                break
            self.notes.append(f"{step_name(candidate.step)} in memory: {problem}")
        return None

    def close(self, *, used: bool) -> None:
        """Collective. All ranks have read what `newest` found, or (`used` false) resume from elsewhere.

        Of what was found, each node keeps what belongs to it until the next save; the rest goes.
        """
        self._world.barrier()
        if not self._r.leads:
            return
        with contextlib.suppress(OSError):
            if not used or self._taken is None:
                self._r.home.clear()
                return
            name, manifest = self._taken
            self._r.home.clear(name)
            files, kept = sorted(manifest.files), self._nodes.kept_on(self._r.node)
            for i, file in enumerate(files):
                if i * self._world.size // len(files) not in kept:  # as many ranks wrote it, or others
                    (self._r.home.path / name / file).unlink(missing_ok=True)

    # --- one candidate ---

    def _bring(self, key: tuple[str, str], candidate: _Candidate) -> str | None:
        """Collective. Have all its files on every node; what is wrong, the same on all ranks, else None."""
        raw = self._manifest(key, candidate)
        manifest = parse(raw)
        files = sorted(manifest.files)
        holders = {file: [n for n, on in candidate.on.items() if i in on] for i, file in enumerate(files)}
        folder = self._r.home.path / key[0]
        problem = self._drop_damaged(folder, manifest, holders)
        lost = [file for file in files if not holders[file]]
        if lost:
            named = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
            return f"{problem or ''}{len(lost)} of {len(files)} files are in no node's memory ({named})"
        needed = moves(files, holders, self._nodes)
        problem = self._told(self._lacking(manifest, needed)) or self._transfer(folder, manifest, needed)
        if problem is None:
            problem = self._told(attempt(lambda: self._publish(folder, raw))[1])
        if problem is None:
            self._taken = (key[0], manifest)
        return problem

    def _told(self, problem: str | None) -> str | None:
        """Collective. The first rank's problem."""
        found = [(rank, told) for rank, told in enumerate(self._world.gather(problem)) if told]
        return f"rank {found[0][0]}: {found[0][1]}" if found else None

    def _manifest(self, key: tuple[str, str], candidate: _Candidate) -> bytes:
        """Collective. From the first node that has it: the same bytes, so the same manifest, everywhere."""
        source = self._nodes.members[min(candidate.on)][0]
        mine = self._here[key].raw.decode() if self._world.rank == source else None
        return bytes(self._world.from_rank(source, mine).encode())

    def _drop_damaged(self, folder: Path, manifest: Manifest, holders: Mapping[str, list[int]]) -> str | None:
        """Collective. Hash what is there, and take whom has it damaged out of `holders`; which those are."""
        members = self._nodes.members[self._r.node]
        sizes = {f: manifest.files[f].size for f, nodes in holders.items() if self._r.node in nodes}
        mine = share_out(sizes, [0] * len(members))[members.index(self._world.rank)]
        wrong = wrong_hashes(LocalFolder(folder), manifest, mine)
        said = ""
        for rank, found in enumerate(self._world.gather(wrong)):
            for file, what in found.items():
                node = self._nodes.of(rank)
                holders[file].remove(node)
                self.notes.append(
                    f"damaged copy in the memory of node {node}: {step_name(manifest.step)}/{file}: {what}"
                )
                said = "after damaged ones, "
        return said or None

    def _lacking(self, manifest: Manifest, needed: Sequence[Move]) -> str | None:
        wanted = sum(manifest.files[m.file].size for m in needed if self._nodes.of(m.target) == self._r.node)
        free, problem = attempt(lambda: free_memory(self._r.home.path))
        if problem is None and wanted > free:
            problem = f"{wanted:,} bytes would have to be fetched into memory, {free:,} can be taken"
        return problem

    def _transfer(self, folder: Path, manifest: Manifest, needed: Sequence[Move]) -> str | None:
        """Collective. Carry out all moves at once."""
        rank = self._world.rank
        opened, problem = attempt(lambda: self._open(folder, manifest, needed))
        problem = self._told(problem)
        if problem is not None:
            return problem
        problem = attempt(lambda: self._exchange(needed, opened))[1]
        if self._r.failed(problem):  # the group is of no use after a time-out
            return "it could not be fetched from the other nodes"
        received = {m.file: mapped for m, mapped in zip(needed, opened, strict=True) if m.target == rank}
        return self._told(attempt(lambda: _accept(folder, manifest, received))[1])

    def _exchange(self, needed: Sequence[Move], opened: Sequence[Mapped | None]) -> None:
        rank, works = self._world.rank, []
        for tag, (move, mapped) in enumerate(zip(needed, opened, strict=True)):
            if mapped is None:
                continue
            if move.target == rank:
                works.append(dist.irecv(mapped.tensor, move.source, group=self._r.group, tag=tag))
            else:
                works.append(dist.isend(mapped.tensor, move.target, group=self._r.group, tag=tag))
        faults.point("replica.fetching")
        for work in works:
            assert work is not None  # None: this rank is not in the group
            work.wait()

    def _open(self, folder: Path, manifest: Manifest, needed: Sequence[Move]) -> list[Mapped | None]:
        """By move, the memory that this rank sends or receives; None where it has no part in it."""
        rank = self._world.rank
        folder.mkdir(mode=0o700, exist_ok=True)
        opened: list[Mapped | None] = []
        for move in needed:
            size = manifest.files[move.file].size
            if move.target == rank:
                arriving = folder / f"{move.file}.part"
                arriving.unlink(missing_ok=True)  # of a resume that was killed
                opened.append(Mapped.create(arriving, size))
            elif move.source == rank:
                opened.append(Mapped.attach(folder / move.file, size))
            else:
                opened.append(None)
        return opened

    def _publish(self, folder: Path, raw: bytes) -> None:
        if self._r.leads:
            put(folder / MANIFEST, raw)  # over a damaged one, too


def _accept(folder: Path, manifest: Manifest, received: Mapping[str, Mapped]) -> None:
    """Give what has arrived its name. Raises ValueError where it is not what was saved."""
    for file, mapped in received.items():
        found = xxhash.xxh3_128_hexdigest(memory_of(mapped.tensor))
        if found != manifest.files[file].xxh3_128:
            raise ValueError(f"{file}: arrived with xxh3-128 {found}")
        mapped.move(folder / file)
