"""Staging: a whole, checked copy on a node's own disk, once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distdl.data.index import DataFile, read_index
from distdl.data.opening import open_split, ready
from distdl.data.prepare.inspect import verify
from distdl.data.prepare.options import Options
from distdl.data.prepare.run import prepare
from distdl.data.prepare.stage import stage
from distdl.errors import DataError


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """100 rows in 5 shards, with a sequence column."""
    (tmp_path / "source").mkdir()
    words = pa.array([[n] * (n % 3) for n in range(100)], pa.list_(pa.int32()))
    pq.write_table(pa.table({"id": np.arange(100), "words": words}), tmp_path / "source" / "train.parquet")
    prepare(str(tmp_path / "source"), tmp_path / "shared", Options(shards=5))
    return tmp_path / "shared"


def ids(folder: Path) -> list[int]:
    rows = open_split(ready(None, folder), "train", ["id"])
    return [int(n) for n in rows.gather(np.arange(len(rows)))["id"]]


def test_a_copy_is_whole_and_made_once(dataset: Path, tmp_path: Path) -> None:
    said: list[str] = []
    local = stage(dataset, tmp_path / "local", say=said.append)
    assert local == tmp_path / "local"
    assert {f.relative_to(dataset): f.read_bytes() for f in dataset.rglob("*") if f.is_file()} == {
        f.relative_to(local): f.read_bytes() for f in local.rglob("*") if f.is_file()
    }
    before = (local / "index.json").stat().st_mtime_ns
    stage(dataset, tmp_path / "local", say=said.append)
    assert said == [f"{local} is there already, and whole"]
    assert (local / "index.json").stat().st_mtime_ns == before
    assert not (tmp_path / "local.building").exists()


def test_each_node_copies_its_shards_and_reads_the_others_where_they_are(
    dataset: Path, tmp_path: Path
) -> None:
    copied = []
    for node in range(2):
        local = stage(dataset, tmp_path / f"node{node}", node, 2)
        verify(local)
        assert ids(local) == list(range(100))
        assert read_index(local).fingerprint == read_index(dataset).fingerprint
        copied.append(sorted(f.name[5:10] for f in local.rglob("*.arrow")))
    assert copied == [["00000", "00002", "00004"], ["00001", "00003"]]


@pytest.mark.parametrize("part", ["shards", "others"])
@pytest.mark.parametrize("file", ["../../escaped", "train/../../../escaped", "~/escaped"])
def test_an_index_that_leads_out_of_its_folder_is_refused(
    dataset: Path, tmp_path: Path, file: str, part: str
) -> None:
    index = read_index(dataset)
    split = index.splits["train"]
    shard = split.shards[0]
    for place in (dataset / file, tmp_path / "escaped"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes((dataset / shard.file).read_bytes())
    moved = DataFile(file=file, bytes=shard.bytes, hash=shard.hash)
    if part == "others":
        index = index.model_copy(update={"others": (moved,)})
    else:
        shards = (shard.model_copy(update={"file": file}), *split.shards[1:])
        index = index.model_copy(update={"splits": {"train": split.model_copy(update={"shards": shards})}})
    (dataset / "index.json").write_text(index.to_json(), encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=rf"index\.json names the file '{file}'.*without '\.\.' and '~'"):
        stage(dataset, tmp_path / "deep" / "local")
    assert sorted(tmp_path.rglob("*")) == before


def test_damage_is_found_while_copying(dataset: Path, tmp_path: Path) -> None:
    shard = dataset / "train" / "data-00003-of-00005.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"data-00003-of-00005\.arrow is damaged.*distdl data verify"):
        stage(dataset, tmp_path / "local")
    assert not (tmp_path / "local").exists()


CODE = """
import sys
from pathlib import Path
from distdl.data.prepare.stage import stage
from distdl.testing.faults import arm_from_environment
arm_from_environment(0)
sys.stdin.readline()
stage(Path(sys.argv[1]), Path(sys.argv[2]), say=print)
"""


@pytest.mark.parametrize(
    "where", ["stage.file@0", "stage.file@3", "stage.before_index", "prepare.before_rename"]
)
def test_a_killed_copy_goes_on(where: str, dataset: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(dataset), str(tmp_path / "local")],
        env=os.environ | {"DISTDL_FAIL_AT": f"0:{where}:kill"},
        input="go\n",
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "local").exists()
    seen: list[int] = []
    stage(dataset, tmp_path / "local", progress=lambda done, total: seen.append(total))
    verify(tmp_path / "local")
    total = sum(file.bytes for file in read_index(dataset).files())
    assert (seen[0] < total) == (where != "stage.file@0")


def test_ranks_of_a_node_wait_for_the_one_that_copies(dataset: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE, str(dataset), str(tmp_path / "local")]
    ranks = [subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) for _ in range(3)]
    done = [rank.communicate("go\n", timeout=60) for rank in ranks]
    said = sorted(done)
    already = f"{tmp_path / 'local'} is there already, and whole\n"
    assert said == [("", ""), (already, ""), (already, "")]


def test_what_stands_in_the_way_is_left_alone(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    with pytest.raises(DataError, match="not a prepared dataset"):
        stage(dataset, tmp_path / "mine")
    prepare(str(tmp_path / "source"), tmp_path / "other", Options(shards=2))
    with pytest.raises(DataError, match="holds another dataset"):
        stage(dataset, tmp_path / "other")
    with pytest.raises(DataError, match="--node 2 of --nodes 2"):
        stage(dataset, tmp_path / "local", 2, 2)
