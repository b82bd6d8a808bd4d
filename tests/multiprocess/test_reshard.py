"""Any engine at any world size reads what any other wrote: the same bits, and the run goes on as it was.

Writers take three steps, save, and take five more, whose losses are those of the undisturbed run. Readers
load one checkpoint after another into the same engine, and take the same five steps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import finalize

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from distdl.checkpoint.manifest import Facts, step_name
from distdl.checkpoint.open import open_checkpoint
from distdl.checkpoint.retention import Keep
from distdl.checkpoint.store import store_at
from distdl.checkpoint.write import Saver
from distdl.comm import World
from distdl.engines import build_engine
from distdl.engines.shards import piece_of
from distdl.errors import EngineError, Incompatible
from distdl.pieces import Saved
from distdl.recipe import parse_recipe
from distdl.testing import assert_same_bits, run_world
from tests.multiprocess.contract import ADAMW, CASES, Case, Driven, build, plan_for, recipe_for

pytestmark = pytest.mark.skipif(
    not (find_spec("deepspeed") and find_spec("accelerate")),
    reason="DeepSpeed or Accelerate is not installed",
)

ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3", "accelerate")
SHARDED = "ddp sharded"
HARDWARE: dict[str, dict[str, Any]] = {name: {"engine": name} for name in ENGINES}
HARDWARE[SHARDED] = {"engine": "ddp", "shard_optimizer": True}
HARDWARE["zero3"]["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
NETWORKS = {
    "cnn": replace(CASES["cnn_batchnorm"], optim=ADAMW, ema=0.9),
    "lstm": CASES["lstm_ragged"],
}
BEFORE, AFTER = 3, 5
Writer = tuple[str, int]
"""Engine and world size."""


@dataclass(frozen=True)
class Written:
    """What a writer leaves: the sha256 of every tensor, and the losses of the steps after the save."""

    digests: dict[str, str]
    losses: list[float]


def driven(world: World, case: Case, name: str) -> Driven:
    """An engine for a step of three microbatches."""
    sections = recipe_for(case, HARDWARE[name]).model_dump(mode="json", by_alias=True)
    sections["batch"]["global"] = 24
    recipe = parse_recipe(sections)
    plan = plan_for(recipe, world.size)
    engine = build_engine(plan, recipe, world, torch.device("cpu"))
    engine.setup(build(case))
    return Driven(engine, plan, case, recipe, world, {})


def folder_of(root: Path, network: str, writer: Writer) -> Path:
    return root / f"{network}-{writer[0].replace(' ', '-')}-{writer[1]}"


def digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(
            f"{t.dtype} {tuple(t.shape)}".encode() + t.reshape(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, t in state.items()
    }


def onward(run: Driven) -> list[float]:
    """Collective. The losses of the five steps after the save."""
    run.updates = BEFORE
    losses: list[float] = []
    for step in range(BEFORE, BEFORE + AFTER):
        assert run.step(step).updated
        losses.append(sum(run.world.gather(run.loss)))
    return losses


def write(world: World, root: Path, names: tuple[str, ...], networks: tuple[str, ...]) -> None:
    for name in names:
        for network in networks:
            run = driven(world, NETWORKS[network], name)
            for step in range(BEFORE):
                assert run.step(step).updated
            folder = folder_of(root, network, (name, world.size))
            # Written in the background from a copy: what the five steps change must not show.
            saver = Saver(store_at(folder), world, Keep(1), asynchronous=network == "cnn")
            found = digests(run.state())
            saver.save(run.engine.held(), Facts(BEFORE, "hash", {}, "data", {}, name))
            losses = onward(run)
            saver.settle()
            saver.close()
            if world.is_main:
                (folder / "written.json").write_text(json.dumps(vars(Written(found, losses))))


def read(world: World, root: Path, name: str, networks: tuple[str, ...], writers: list[Writer]) -> list[str]:
    """What differs, for each network and writer."""
    problems = []
    for network in networks:
        run = driven(world, NETWORKS[network], name)
        for writer in writers:
            folder = folder_of(root, network, writer)
            written = Written(**json.loads((folder / "written.json").read_text()))
            counting = Counting(open_checkpoint(folder / step_name(BEFORE)))
            run.engine.load(counting)
            what = f"{network} from {writer} to {(name, world.size)}"
            problems += [f"{what}: {problem}" for problem in counting.problems()]
            found = digests(run.state())
            differ = sorted(
                n for n in written.digests.keys() | found if written.digests.get(n) != found.get(n)
            )
            problems += [f"{what}: {n} has other bits" for n in differ[:3]]
            losses = onward(run)
            if losses != pytest.approx(written.losses, rel=1e-5, abs=0):
                problems.append(f"{what}: losses {losses}, undisturbed {written.losses}")
        problems += [f"{name}: {problem}" for problem in refused(run)]
    return problems


class Counting:
    """`Saved` that counts the bytes it has given out and that are still referred to."""

    def __init__(self, source: Saved) -> None:
        self._source = source
        self.metas = source.metas
        self._alive = self._most = 0
        self._one_at_a_time = Lock()

    def whole(self, name: str) -> Tensor:
        return self._given(self._source.whole(name))

    def run(self, name: str, begin: int, end: int) -> Tensor:
        assert 0 <= begin < end <= self.metas[name].numel, f"{name}: [{begin}, {end})"
        return self._given(self._source.run(name, begin, end))

    def read_into(self, name: str, begin: int, target: Tensor) -> None:
        assert 0 <= begin <= begin + target.numel() <= self.metas[name].numel, f"{name}: from {begin}"
        if target.is_contiguous() and target.dtype == self.metas[name].dtype:
            self._source.read_into(name, begin, target)  # takes no memory
        else:
            with self._one_at_a_time:
                target.copy_(self.run(name, begin, begin + target.numel()).view(target.shape))

    def problems(self) -> list[str]:
        largest = max(meta.nbytes for meta in self.metas.values())
        found = [] if self._most <= largest else [f"{self._most} bytes at once, the largest has {largest}"]
        return found + ([f"{self._alive} bytes are still referred to"] if self._alive else [])

    def _given(self, tensor: Tensor) -> Tensor:
        # An array ends with the storage that is made from it, whatever views of that there were.
        array = np.empty(tensor.nbytes, dtype=np.uint8)
        given = torch.from_numpy(array).view(tensor.dtype).view(tensor.shape)
        given.copy_(tensor)
        self._alive += tensor.nbytes
        self._most = max(self._most, self._alive)
        finalize(array, self._ended, tensor.nbytes)
        return given

    def _ended(self, nbytes: int) -> None:
        self._alive -= nbytes


def refused(run: Driven) -> list[str]:
    """What an engine takes of states that do not fit, and no bit is changed before it refuses them."""
    before = run.state()
    weight = "head.weight"
    other = torch.zeros(3)
    problems = []
    for wrong in (
        {k: t for k, t in before.items() if k != f"model/{weight}"},
        {**before, f"model/{weight}": other},
        {**before, f"ema/{weight}": other} if f"ema/{weight}" in before else {},
        {**before, f"optim/exp_avg/{weight}": other},
        {**before, "optim/exp_avg/nobody": other},
    ):
        state = {k: torch.zeros_like(t) for k, t in wrong.items()}
        try:
            run.load(state)
            problems.append(f"took {sorted(state.keys() ^ before.keys())}")
        except Incompatible:
            pass
        assert_same_bits(run.state(), before)
    return problems


def layouts(world: World) -> list[str]:
    """Shards of DTensors: which runs they are, and which layouts are none."""
    mesh = init_device_mesh("cpu", (world.size,))
    problems = []
    for rows, runs in ((5, [(0, 9), (9, 6)]), (2, [(0, 3), (3, 3)]), (1, [(0, 3), None])):
        whole = torch.arange(3.0 * rows).view(rows, 3)
        piece = piece_of(shard(whole, mesh, world.rank))
        found = piece and (piece.begin, len(piece.data))
        if found != runs[world.rank]:
            problems.append(f"{rows} rows: {found}")
        if piece and not torch.equal(piece.data, whole.view(-1)[piece.begin :][: len(piece.data)]):
            problems.append(f"{rows} rows: {piece}")
    everywhere = piece_of(DTensor.from_local(torch.ones(2), mesh, [Replicate()], run_check=False))
    if everywhere is None or everywhere.begin is not None:
        problems.append(f"replicated: {everywhere}")
    with pytest.raises(EngineError, match="not one run"):
        piece_of(DTensor.from_local(torch.ones(2, 2), mesh, [Shard(1)], run_check=False))
    return problems


def shard(whole: Tensor, mesh: Any, rank: int) -> Tensor:
    chunks = whole.chunk(mesh.size())
    mine = chunks[rank] if rank < len(chunks) else whole[:0]
    return DTensor.from_local(
        mine, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


Readers = dict[str, list[Writer]]


def several(world: World, root: Path, readers: Readers, names: tuple[str, ...]) -> list[str]:
    """Each of `readers` reads from its writers; `names` write."""
    problems = layouts(world) if world.size > 1 else []
    for name, writers in readers.items():
        problems += read(world, root, name, ("cnn",), writers)
    write(world, root, names, ("cnn",))
    return problems


@pytest.mark.slow
def test_each_engine_reads_what_another_wrote_at_another_world_size(tmp_path: Path) -> None:
    """Two ranks write, one reads and writes, two read; every engine reads from its neighbour in the list."""
    env = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    ring = (*ENGINES, SHARDED)
    assert run_world(several, 2, tmp_path, {}, ring, env=env) == [[]] * 2
    alone: Readers = {name: [(ring[i + 1], 2)] for i, name in enumerate(ENGINES)}
    assert run_world(several, 1, tmp_path, alone, ENGINES, env=env) == [[]]
    both: Readers = {name: [(ENGINES[i - 1], 1)] for i, name in enumerate(ring)}
    assert run_world(several, 2, tmp_path, both, (), env=env) == [[]] * 2


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of every engine at 1, 2 and 3 ranks."""
    root = tmp_path_factory.mktemp("written")
    env = {"TORCH_EXTENSIONS_DIR": str(root)}
    for size in (1, 2, 3):
        run_world(write, size, root, ENGINES, tuple(NETWORKS), env=env)
    return root


@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", ENGINES)
def test_every_pair_of_engines_and_world_sizes(name: str, size: int, written: Path) -> None:
    """Of 648 loads: parameters, buffers, averages and optimiser state to the bit, five losses to 1e-5."""
    writers = [(engine, ranks) for engine in ENGINES for ranks in (1, 2, 3)]
    env = {"TORCH_EXTENSIONS_DIR": str(written)}
    found = run_world(read, size, written, name, tuple(NETWORKS), writers, deadline_s=220, env=env)
    assert found == [[]] * size
