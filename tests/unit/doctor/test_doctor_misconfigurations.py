"""The listed misconfigurations are named, with what to do about them; healthy machines raise no alarm."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from distdl.doctor.collect import place_in
from distdl.doctor.collect.network import interfaces_here, network_here
from distdl.doctor.collect.recipe import Asked
from distdl.doctor.collect.software import software_here
from distdl.doctor.collect.storage import storage_here
from distdl.doctor.facts import Gpu, Gpus, Torch
from distdl.doctor.finding import Finding
from distdl.recipe import load_recipe
from distdl.testing import run_world
from distdl.topology import Topology
from tests.unit.doctor.doctor_support import WANTED, changed, healthy, problems, visit

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "configs" / "fashion_cnn.yaml"
KINDS = {
    it["kind"]: it for it in yaml.safe_load(Path(__file__).with_name("misconfigurations.yaml").read_text())
}
"""Kind -> what has to be said of it."""

Seed = Callable[[Path, pytest.MonkeyPatch], list[Finding]]
SEEDS: dict[str, Seed] = {}


def seed(kind: str) -> Callable[[Seed], Seed]:
    def keep(function: Seed) -> Seed:
        SEEDS[kind] = function
        return function

    return keep


def from_facts(kind: str, nodes: int, per_node: int, which: int | None, **parts: Any) -> None:
    """A seed in made-up facts: of one process, or of all."""

    def facts(_: Path, __: pytest.MonkeyPatch) -> list[Finding]:
        them = healthy(nodes, per_node)
        return problems([changed(f, **parts) if which in (None, i) else f for i, f in enumerate(them)])

    SEEDS[kind] = facts


TWO_GPUS = Gpus(present=2, driver="550.54", cards=(Gpu(index=0), Gpu(index=1)))
BUSY = Gpu(index=1, others={4242: 9 << 30})
WITH_CUDA = {"torch": Torch(cuda="12.8", nccl="2.21.5", devices=2)}
UNUSABLE = {"torch": Torch(cuda="12.8", cuda_error="the driver is too old")}

from_facts("hostname-is-loopback", 2, 1, 1, network={"host_addresses": ("127.0.1.1",)})
from_facts("clock-skew", 2, 1, 1, network={"clock_skew": -90.0})
from_facts("torch-differs", 3, 1, 1, software={"torch": Torch(version="2.5.1")})
from_facts("shm-tiny", 1, 2, None, machine={"shm": 64 << 20, "shm_free": 64 << 20},
           wanted=WANTED.model_copy(update={"workers": 4}))  # fmt: skip
from_facts(
    "driver-too-old", 1, 2, None, gpus=TWO_GPUS.model_copy(update={"driver": "470.82"}), software=UNUSABLE
)
from_facts("duplicate-rank", 3, 1, 2, place={"rank": 1})
from_facts("world-size-differs", 2, 1, 1, place={"world_size": 4})
from_facts("loopback-interface-on-two-nodes", 2, 1, None, env={"NCCL_SOCKET_IFNAME": "lo"})
from_facts(
    "disk-nearly-full",
    1,
    2,
    None,
    storage={"free": 10**9},
    wanted=WANTED.model_copy(update={"save": 2 * 10**9}),
)
from_facts("cpu-build-on-gpus", 1, 2, None, gpus=TWO_GPUS)
from_facts(
    "visible-gpu-missing", 1, 2, None, gpus=TWO_GPUS, software=WITH_CUDA, env={"CUDA_VISIBLE_DEVICES": "0,7"}
)
from_facts("gpu-busy", 1, 2, None, software=WITH_CUDA,
           gpus=TWO_GPUS.model_copy(update={"cards": (Gpu(index=0), BUSY)}))  # fmt: skip
from_facts("too-many-threads", 1, 2, None, env={"OMP_NUM_THREADS": "512"})
from_facts("proxy-catches-loopback", 1, 2, None,
           env={"http_proxy": "http://proxy:3128", "AWS_ENDPOINT_URL": "http://127.0.0.1:9000"})  # fmt: skip


def at(host: str, port: int, rank: int) -> Topology:
    return Topology(rank=rank, world_size=2, launcher="torchrun", master_addr=host, master_port=port)


@seed("master-unresolvable")
def _(_: Path, __: pytest.MonkeyPatch) -> list[Finding]:
    them = healthy()
    return problems(
        [them[0], changed(them[1], network=network_here(at("no-such-host.invalid", 29500, 1), 0.1))]
    )


@seed("port-in-use")
def _(_: Path, __: pytest.MonkeyPatch) -> list[Finding]:
    them = healthy()
    with socket.create_server(("", 0)) as holder:
        network = network_here(at("127.0.0.1", holder.getsockname()[1], 0), 0.1)
    found = problems([changed(them[0], network=network), them[1]])
    assert any(f"process {os.getpid()} (" in f.found for f in found)
    return found


@seed("interface-missing")
def _(_: Path, __: pytest.MonkeyPatch) -> list[Finding]:
    there = {"interfaces": interfaces_here()}
    return problems([changed(f, network=there, env={"GLOO_SOCKET_IFNAME": "eth99"}) for f in healthy()])


@seed("rank-beyond-world")
def _(_: Path, __: pytest.MonkeyPatch) -> list[Finding]:
    env = {
        "RANK": "2",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    return problems([changed(healthy(1, 1)[0], place=place_in(env)[1])])


@seed("run-directory-not-writable")
def _(tmp_path: Path, _: pytest.MonkeyPatch) -> list[Finding]:
    (tmp_path / "file").write_text("")
    asked = Asked("recipe.yaml", load_recipe(RECIPE, [f"run.dir={tmp_path}/file/run"]))
    return problems([changed(f, storage=storage_here(asked)) for f in healthy()])


@seed("stale-build-lock")
def _(tmp_path: Path, _: pytest.MonkeyPatch) -> list[Finding]:
    lock = tmp_path / "shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - 86400,) * 2)
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    asks = WANTED.model_copy(update={"engine": "zero2"})
    found = problems(
        [changed(f, software=software_here(env, None, fix=False), wanted=asks) for f in healthy()]
    )
    assert lock.exists()
    mended = changed(healthy(1, 1)[0], software=software_here(env, None, fix=True), wanted=asks)
    assert not lock.exists()
    assert problems([mended]) == []
    return found


@seed("distdl-shadowed")
def _(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    (tmp_path / "distdl").mkdir()
    (tmp_path / "distdl" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    return problems([changed(f, software=software_here(os.environ, None, fix=False)) for f in healthy()])


def on_two_ranks(
    folders: list[Path], recipe: Path | None, cores: list[int] | None = None, open_files: int | None = None
) -> list[Finding]:
    """What is found by two real ranks, each in its folder."""
    told = run_world(visit, 2, recipe and str(recipe), [str(f) for f in folders], cores, open_files)
    assert told[1] == []
    return [Finding(**f) for f in told[0] if f["status"] in ("warn", "fail")]


@seed("open-files-low")
def _(tmp_path: Path, _: pytest.MonkeyPatch) -> list[Finding]:
    return on_two_ranks([tmp_path, tmp_path], None, open_files=64)


@seed("one-core-for-all")
def _(tmp_path: Path, _: pytest.MonkeyPatch) -> list[Finding]:
    return on_two_ranks([tmp_path, tmp_path], None, cores=[min(os.sched_getaffinity(0))])


@seed("run-directory-not-shared")
def _(tmp_path: Path, _: pytest.MonkeyPatch) -> list[Finding]:
    folders = [tmp_path / "node0", tmp_path / "node1"]
    for folder in folders:
        (folder / "runs" / "fashion_cnn").mkdir(parents=True)
    return on_two_ranks(folders, RECIPE)


@seed("user-code-differs")
def _(tmp_path: Path, _: pytest.MonkeyPatch) -> list[Finding]:
    recipe = tmp_path / "recipe.yaml"
    text = RECIPE.read_text().replace("{name: image_classification}", "{name: 'own_task:Own'}")
    recipe.write_text(f"{text}\n".replace("runs/fashion_cnn", str(tmp_path / "run")))
    folders = [tmp_path / "node0", tmp_path / "node1"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "own_task.py").write_text(f"NUMBER = {number}\n")
    return on_two_ranks(folders, recipe)


def is_named(kind: Mapping[str, Any], found: list[Finding]) -> bool:
    """Whether one finding says all that it should, and what to do."""
    return any(
        f.status == kind["status"]
        and all(word.lower() in f.found.lower() for word in kind["named"])
        and all(word in f.todo for word in kind["fix"])
        for f in found
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_misconfiguration_is_named_with_what_to_do(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SEEDS[kind](tmp_path, monkeypatch)
    assert is_named(KINDS[kind], found), found
    # Nothing else is blamed for it: at most one more finding, where one cause shows in two places.
    assert len({f.check for f in found}) <= 2, found


def test_there_are_25_kinds() -> None:
    assert len(KINDS) == 25
    assert set(SEEDS) == set(KINDS)


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 1), (1, 2), (2, 1), (4, 8)])
def test_healthy_facts_raise_no_alarm(nodes: int, per_node: int) -> None:
    assert problems(healthy(nodes, per_node)) == []


def test_two_healthy_ranks_raise_no_alarm(tmp_path: Path) -> None:
    assert on_two_ranks([tmp_path, tmp_path], RECIPE) == []
    assert list(tmp_path.iterdir()) == []
