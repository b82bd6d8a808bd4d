"""DeepSpeed's configuration is derived whole, and what contradicts it is refused by name."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distdl.engines.zero_build import build_folder, own_builds
from distdl.engines.zero_library import load_deepspeed
from distdl.errors import EngineError, PlanError
from distdl.plan import Plan, make_plan
from distdl.recipe import Recipe, parse_recipe
from distdl.samples import DataInfo, Field
from distdl.topology import Topology
from distdl.zero_config import deepspeed_config

INFO = DataInfo("d", {"train": 640, "test": 8}, {"label": Field("int64", (), 10)}, "f")


def recipe_with(**hardware: Any) -> Recipe:
    return parse_recipe(
        {
            "task": {"name": "image_classification"},
            "model": {"name": "cnn5"},
            "data": {"name": "fashion_mnist"},
            "batch": {"global": 64, "micro": 8},
            "optim": {"name": "sgd", "lr": 0.1, "clip_norm": 0.5},
            "train": {"epochs": 1},
            "hardware": {"device": "cpu", "threads": 1, "engine": "zero2", **hardware},
        }
    )


def derive(size: int = 2, **hardware: Any) -> dict[str, Any]:
    recipe = recipe_with(**hardware)
    return deepspeed_config(plan_of(recipe, size), recipe)


def plan_of(recipe: Recipe, size: int) -> Plan:
    return make_plan(recipe, Topology.of(1, size), INFO)


def test_everything_follows_from_the_recipe_and_the_plan() -> None:
    config = derive(2)
    assert config["train_batch_size"] == 64
    assert config["train_micro_batch_size_per_gpu"] == 8
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["overlap_comm"] is False
    assert not any(config[section]["enabled"] for section in ("fp16", "bf16", "torch_autocast"))


def test_processes_with_unequal_shares_get_no_total_that_deepspeed_would_refuse() -> None:
    config = derive(3)
    assert config["gradient_accumulation_steps"] == 3
    assert "train_batch_size" not in config


@pytest.mark.parametrize(
    ("engine", "offload", "optimizer", "parameters"),
    [
        ("zero1", "none", "none", "none"),
        ("zero1", "optimizer", "cpu", "none"),
        ("zero3", "parameters", "cpu", "cpu"),
    ],
)
def test_offload_says_what_lies_in_cpu_memory(
    engine: str, offload: str, optimizer: str, parameters: str
) -> None:
    zero = derive(engine=engine, offload=offload)["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == optimizer
    assert zero["offload_param"]["device"] == parameters


def test_keys_of_the_users_own_are_added_at_any_depth() -> None:
    own = {
        "zero_optimization": {"reduce_bucket_size": 1000, "overlap_comm": True},
        "wall_clock_breakdown": True,
    }
    config = derive(deepspeed=own)
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert config["zero_optimization"]["overlap_comm"] is True
    assert config["zero_optimization"]["stage"] == 2
    assert config["wall_clock_breakdown"] is True


def test_a_key_that_says_the_same_or_auto_is_taken() -> None:
    own = {"train_batch_size": 64, "gradient_clipping": 0.5, "zero_optimization": {"stage": "auto"}}
    assert derive(deepspeed=own) == derive()


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"train_batch_size": 128}, ["train_batch_size", "128", "64", "batch.global"]),
        ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps", "= 1", "4"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping", "1.0", "0.5", "optim.clip_norm"]),
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage", "3", "2", "hardware.engine"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled", "True", "False", "train.precision"]),
        ({"bfloat16": {"enabled": True}}, ["bf16.enabled", "train.precision"]),
        ({"fp16": True}, ["fp16 is a section", "True"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "Adam", "`optim`"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "WarmupLR", "`schedule`"]),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            ["zero_optimization.offload_optimizer.device", "nvme", "none", "hardware.offload"],
        ),
    ],
)
def test_a_key_that_contradicts_is_refused_when_planning(own: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PlanError) as refused:
        plan_of(recipe_with(deepspeed=own), 2)
    assert all(word in str(refused.value) for word in words), refused.value


def test_without_deepspeed_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(EngineError, match=r"zero2.*pip install \"distdl\[deepspeed\]\""):
        load_deepspeed("zero2", torch.device("cpu"))


@pytest.fixture
def stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock file of a build that was killed."""
    pytest.importorskip("importlib.metadata").version("deepspeed")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lock = build_folder() / "some_op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    return lock


def test_a_stale_lock_is_cleared_and_said_so(stale: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with own_builds():
        assert not stale.exists()
    assert str(stale) in capsys.readouterr().err


def test_a_lock_stays_while_another_process_may_be_building(stale: Path) -> None:
    # A second open file is to flock what a second process is.
    other = os.open(stale.parent.parent / "in-use", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(other, fcntl.LOCK_SH)
        with own_builds():
            assert stale.exists()
    finally:
        os.close(other)


def test_a_folder_that_the_user_names_is_left_as_it_is(
    stale: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(stale.parent))
    with own_builds():
        assert os.environ["TORCH_EXTENSIONS_DIR"] == str(stale.parent)
    assert list(stale.parent.iterdir()) == [stale]


def test_the_folder_is_the_users_own_and_the_environment_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("importlib.metadata").version("deepspeed")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tmp_path in build_folder().parents
    with own_builds():
        assert os.environ["TORCH_EXTENSIONS_DIR"] == str(build_folder())
        assert build_folder().is_dir()
    assert "TORCH_EXTENSIONS_DIR" not in os.environ
