"""Training on a dataset that is streamed from a real S3-compatible server, which dies meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distdl import errors, stores
from distdl.data import ShardedDataset, loader
from distdl.data.huggingface import class_label, feature_of, with_features
from distdl.data.prepare.options import Options
from distdl.data.prepare.run import prepare
from distdl.record import read_lines
from distdl.testing import assert_same_bits
from tests.faults.support import Launched, events, tensors_of, wait_for_event, write_recipe
from tests.runs import train_here
from tests.s3_server import S3Server, s3_server

pytestmark = pytest.mark.slow

ROWS, SHARDS = 2_000, 10


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of 2,000 training images in 10 shards."""
    folder = tmp_path_factory.mktemp("data")
    images = ShardedDataset("fashion_mnist")[:ROWS]
    for name, rows in (("train", slice(0, ROWS)), ("test", slice(0, 200))):
        pixels = images["image"][rows].reshape(-1, 28, 28)
        arrays = pa.FixedSizeListArray.from_arrays(
            pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 28), 28
        )
        table = pa.table({"image": arrays, "label": pa.array(images["label"][rows])})
        features = {f.name: feature_of(f.type) for f in table.schema}
        features["label"] = class_label([f"class {n}" for n in range(10)])
        table = table.replace_schema_metadata(with_features(table.schema, features).metadata)
        (folder / "source").mkdir(exist_ok=True)
        pq.write_table(table, folder / "source" / f"{name}.parquet")
    prepare(str(folder / "source"), folder / "prepared", Options(shards=SHARDS))
    return folder / "prepared"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with s3_server(tmp_path / "s3") as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("DISTDL_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(stores, "_stores", {})
        yield running


@pytest.fixture
def url(server: S3Server, local: Path) -> str:
    return server.upload(local, "images")


def recipe_of(folder: Path, source: str, **changes: Any) -> Path:
    """Two epochs of 63 steps; a window of 400 rows, so that an epoch has several."""
    sections: dict[str, dict[str, Any]] = {
        "data": {"name": None, "path": source, "order": "block", "block_window": 400},
        "train": {"max_steps": 126, "seed": 3},
        "eval": {"every_steps": 50},
        "checkpoint": {"every_steps": 40},
    }
    for name, section in changes.items():
        sections[name] = {**sections.get(name, {}), **section}
    return write_recipe(folder, **sections)


def start(recipe: Path, *overrides: str, fail_at: str = "") -> Launched:
    return Launched(["launch", str(recipe), "--procs", "2", *overrides], fail_at=fail_at)


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics, without what tells the time."""
    timed = ("time", "samples_per_s")
    return [{k: v for k, v in row.items() if k not in timed} for row in read_lines(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, local: Path) -> Path:
    """The run directory of the same training from disk."""
    recipe = recipe_of(tmp_path_factory.mktemp("disk"), str(local))
    train_here(recipe)
    return recipe.parent / "run"


def test_streaming_trains_what_the_disk_does(
    tmp_path: Path, server: S3Server, url: str, undisturbed: Path
) -> None:
    with start(recipe_of(tmp_path, url)) as command:
        assert command.finish() == 0, command.output
        command.assert_nobody_left()
    assert metrics_of(tmp_path / "run") == metrics_of(undisturbed)
    assert_same_bits(tensors_of(tmp_path / "run"), tensors_of(undisturbed))
    gets = {key: n for key, n in server.requests().items() if key.endswith(".arrow")}
    assert set(gets.values()) == {1}, gets  # the ranks share what they fetch


def test_a_small_cache_changes_nothing_and_holds_its_bound(
    tmp_path: Path, server: S3Server, local: Path, url: str, undisturbed: Path
) -> None:
    shard = max(f.stat().st_size for f in (local / "train").glob("*.arrow"))
    bound = 5 * shard
    cache = tmp_path / "cache" / "stream"
    largest, over = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not over.wait(0.005):
            largest = max(largest, sum(size_of(f) for f in cache.rglob("*.arrow")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        train_here(recipe_of(tmp_path, url, hardware={"cache_bytes": bound}))
    finally:
        over.set()
        watcher.join()
    assert_same_bits(tensors_of(tmp_path / "run"), tensors_of(undisturbed))
    assert 2 * shard < largest <= bound
    gets = server.requests()
    fetched = sum(n for key, n in gets.items() if "/train/" in key)
    # Twice each for two epochs, and some more after the evaluations that pushed others out.
    assert SHARDS < fetched <= 4 * SHARDS


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def small_cache(local: Path) -> dict[str, Any]:
    """Room for a few shards, so that training fetches until its end."""
    return {"cache_bytes": 5 * max(f.stat().st_size for f in (local / "train").glob("*.arrow"))}


def test_a_server_killed_and_started_again_loses_nothing(
    tmp_path: Path, server: S3Server, local: Path, url: str, undisturbed: Path
) -> None:
    recipe = recipe_of(tmp_path, url, hardware={**small_cache(local), "retry_s": 60.0})
    run = tmp_path / "run"
    with start(recipe) as command:
        wait_for_event(run, "first_step")
        server.kill()
        wait_for_event(run, "data")
        server.start()
        assert command.finish() == 0, command.output
        command.assert_nobody_left()
    told = [event["message"] for event in events(run, "data")]
    assert "did not come" in told[0]
    assert any("came at try" in text for text in told)
    assert not events(run, "rank_failed")
    assert metrics_of(run) == metrics_of(undisturbed)
    assert_same_bits(tensors_of(run), tensors_of(undisturbed))


def test_a_server_gone_for_good_ends_in_an_error_and_the_run_goes_on_from_disk(
    tmp_path: Path, server: S3Server, local: Path, url: str, undisturbed: Path
) -> None:
    recipe = recipe_of(
        tmp_path,
        url,
        hardware={**small_cache(local), "retry_s": 1.0},
        checkpoint={"every_steps": 2},
    )
    run = tmp_path / "run"
    with start(recipe) as command:
        wait_for_event(run, "save")
        server.kill()
        began = time.monotonic()
        assert command.finish() == errors.DATA, command.output
        assert time.monotonic() - began < 15
        command.assert_nobody_left()
    assert "/train/data-000" in command.output
    assert "hardware.retry_s" in command.output
    assert "Traceback" not in command.output
    train_here(recipe, 2, f"data.path={local}")
    assert events(run, "start")[-1]["resumed_from"]
    assert_same_bits(tensors_of(run), tensors_of(undisturbed))


@pytest.mark.campaign
@pytest.mark.parametrize("hangs", [False, True])
def test_a_stop_while_waiting_saves_and_leaves_at_once(
    tmp_path: Path, server: S3Server, local: Path, url: str, undisturbed: Path, hangs: bool
) -> None:
    recipe = recipe_of(tmp_path, url, hardware={**small_cache(local), "retry_s": 500.0})
    run = tmp_path / "run"
    with start(recipe) as command:
        wait_for_event(run, "first_step")
        if hangs:
            server.pause(True)
            wait_until_idle(run)
        else:
            server.kill()
            wait_for_event(run, "data")
            wait_until_idle(run)
        began = time.monotonic()
        os.kill(command.process.pid, signal.SIGTERM)
        assert command.finish() == errors.STOPPED, command.output
        assert time.monotonic() - began < 10
        command.assert_nobody_left()
    stop = events(run, "stop")[-1]
    assert stop["saved"] == stop["step"] > 0
    if hangs:
        server.pause(False)
    else:
        server.start()
    train_here(recipe)
    assert_same_bits(tensors_of(run), tensors_of(undisturbed))


def wait_until_idle(run: Path, quiet_s: float = 1.5) -> None:
    """Until no step has been made for a while: all ranks wait."""
    beat = run / "attempts" / "0001" / "heartbeat"
    seen, since = beat.read_bytes(), time.monotonic()
    while time.monotonic() - since < quiet_s:
        threading.Event().wait(0.05)
        if (now := beat.read_bytes()) != seen:
            seen, since = now, time.monotonic()


def test_a_stop_while_the_first_shard_is_waited_for(tmp_path: Path, server: S3Server, url: str) -> None:
    recipe = recipe_of(tmp_path, url, hardware={"retry_s": 500.0})
    with start(recipe) as command:
        wait_for_event(tmp_path / "run", "launch")
        server.kill()
        wait_for_event(tmp_path / "run", "data")
        os.kill(command.process.pid, signal.SIGTERM)
        assert command.finish(30) == errors.STOPPED_BEFORE_START, command.output
        command.assert_nobody_left()


@pytest.mark.campaign
def test_workers_stream_and_hear_of_a_stop(
    tmp_path: Path, server: S3Server, local: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_transform.py").write_text("def same(rows, key):\n    return rows\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    recipe = recipe_of(
        tmp_path,
        url,
        data={"transform": "own_transform:same"},
        hardware={**small_cache(local), "retry_s": 500.0, "workers": 1},
    )
    run = tmp_path / "run"
    with start(recipe) as command:
        wait_for_event(run, "first_step")
        server.kill()
        wait_until_idle(run)
        os.kill(command.process.pid, signal.SIGTERM)
        assert command.finish(30) == errors.STOPPED, command.output
        command.assert_nobody_left()


def test_evaluating_a_run_streams(tmp_path: Path, server: S3Server, url: str, undisturbed: Path) -> None:
    recipe = undisturbed.parent / "recipe.yaml"
    with Launched(["eval", str(recipe), f"data.path={url}", "--json"]) as command:
        assert command.finish() == 0, command.output
    assert '"rows": 200' in command.output
    gets = [key for key in server.requests() if key.endswith(".arrow")]
    assert gets
    assert all("/test/" in key for key in gets)


def test_planning_fetches_the_index_alone(tmp_path: Path, server: S3Server, url: str) -> None:
    with Launched(["plan", str(recipe_of(tmp_path, url))]) as command:
        assert command.finish() == 0, command.output
    assert set(server.requests()) == {"images/index.json"}
    with Launched(["plan", str(recipe_of(tmp_path, url)), "data.order=full"]) as command:
        assert command.finish() == errors.USAGE
    assert "data.order=block" in command.output
    server.kill()
    began = time.monotonic()
    with Launched(["plan", str(recipe_of(tmp_path, url)), "hardware.retry_s=0.5"]) as command:
        assert command.finish() == errors.DATA
    assert "index.json did not come" in command.output
    assert time.monotonic() - began < 20


def test_a_dataset_of_ones_own_loop_streams(server: S3Server, local: Path, url: str) -> None:
    near, far = ShardedDataset(local), ShardedDataset(url, cache_bytes=10**7)
    assert far.info.fingerprint == near.info.fingerprint
    assert (len(far), far.columns, far.shard_rows) == (len(near), near.columns, near.shard_rows)
    options = {"order": "block", "order_options": {"window": 300}, "seed": 1}
    with loader(near, 64, **options) as a, loader(far, 64, **options) as b:
        for mine, theirs in zip(a, b, strict=True):
            assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
    far.close()


@pytest.mark.parametrize(
    "source", ["data.path=hf://datasets/zalando-datasets/fashion_mnist", "data.name=a/b"]
)
def test_a_node_without_internet_says_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("DISTDL_CACHE", str(tmp_path / "cache"))
    overrides = [source, "data.name=" if "path" in source else "data.path="]
    began = time.monotonic()
    with Launched(["launch", str(recipe_of(tmp_path, "/nowhere")), *overrides], cwd=tmp_path) as command:
        assert command.finish() == errors.DATA, command.output
    assert time.monotonic() - began < 15
    assert "distdl data prepare" in command.output
    assert "Traceback" not in command.output
