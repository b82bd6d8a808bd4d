"""`kill -9` at random moments of saving, again and again: the next start always has a whole checkpoint.

Groups of two processes save without a pause, synchronously and in the background in turn, the pieces of each
engine in turn. A kill takes rank 0, rank 1 or both at once, in whatever thread, and now and then while a
group is starting; who is left goes on for a moment, as it would under a launcher, and is killed as well.
"""

from __future__ import annotations

import random
import select
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from distdl.testing import run_world
from tests.faults.savers import ENGINES, Group, Job, Layout, good_steps, layouts_of_engines

pytestmark = pytest.mark.slow

KEEP = 3
KINDS = [(engine, asynchronous) for engine in ENGINES for asynchronous in (True, False)]


@dataclass
class Campaign:
    """A run directory that groups save in and are killed, and what was found after each kill."""

    folder: Path
    layouts: list[dict[str, Layout]]
    chance: random.Random
    newest: int = 0
    saved: int = 0
    where: Counter[str] = field(default_factory=Counter)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def kill_once(self, number: int) -> None:
        """Start a group, kill it at a random moment, and look at what there is."""
        engine, asynchronous = KINDS[number % len(KINDS)]
        cut = tuple(of_rank[engine] for of_rank in self.layouts)
        job = Job(self.folder, str(self.checkpoints), cut, asynchronous, KEEP, number)
        starting = number % 10 == 9
        with Group(job) as group:
            if not starting:
                # At once, or once the group has saved: else, on a slow disk, only its first save is met.
                group.wait_until_saved(self.chance.choice((0, 1, 2)))
            self.pause(0.3)
            victims = self.chance.choice([(0,), (1,), (0, 1)])
            group.kill(*victims)
            hit = group.progress[victims[0]]
            self.where[hit.point if hit.resumed >= 0 else "a start"] += 1
            self.pause(0.03)
        self.look(group)

    def pause(self, longest: float) -> None:
        select.select([], [], [], self.chance.uniform(0, longest))

    def look(self, group: Group) -> None:
        """What there is now is whole, of one step each, and no older than what was known to be committed."""
        for progress in group.progress:
            assert progress.resumed in (-1, self.newest), "a start loaded another checkpoint than the newest"
        steps = good_steps(str(self.checkpoints), group.job.names)
        committed = max(self.newest, *(p.last_committed for p in group.progress))
        newest = max(steps, default=0)
        assert newest in (committed, committed + 1), f"{committed} was committed, {steps} are there"
        # Each step is saved once, one after the other: as many as are kept have to be there.
        self.saved += newest - self.newest
        assert len(steps) >= min(KEEP, self.saved), f"of {self.saved} saved, {steps} are there"
        assert steps == list(range(newest, newest - len(steps), -1))
        self.newest = newest


def check(folder: Path, kills: int, seed: int) -> None:
    campaign = Campaign(folder, run_world(layouts_of_engines, 2), random.Random(seed))
    for number in range(kills):
        campaign.kill_once(number)
    print(f"\n{kills} of {kills} starts found a whole checkpoint; {campaign.newest} steps were saved")
    for point, count in sorted(campaign.where.items()):
        print(f"  {count:4} after {point}")
    assert campaign.newest >= kills // 2


def test_a_dozen_kills_lose_nothing(tmp_path: Path) -> None:
    check(tmp_path, kills=12, seed=12)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_two_hundred_kills_lose_nothing(tmp_path: Path) -> None:
    check(tmp_path, kills=200, seed=200)
