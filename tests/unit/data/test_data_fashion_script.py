"""benchmarks/fashion_mnist.py on small IDX files of the same make."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from distdl.data.info import describe
from distdl.data.opening import open_split, ready

# A shell script and processes for each case.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
IMAGES = {
    s: np.random.default_rng(n).integers(0, 255, (n, 28, 28), np.uint8)
    for s, n in [("train", 50), ("t10k", 20)]
}
LABELS = {s: np.arange(len(images), dtype=np.uint8) % 10 for s, images in IMAGES.items()}


def _header(*shape: int) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    """A folder with four IDX files: the images gzipped, the labels not."""
    for split, images in IMAGES.items():
        content = gzip.compress(_header(*images.shape) + images.tobytes())
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(content)
        labels = LABELS[split]
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(_header(len(labels)) + labels.tobytes())
    return tmp_path


def _run(idx: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "fashion_mnist.py"), "--idx", str(idx)]
    command += ["--per-class", "4", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, "--out", str(out)], env=environment, capture_output=True, text=True)


def test_the_converted_images_are_those_of_the_idx_files(
    idx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = _run(idx, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    info = describe(None, tmp_path / "out")
    assert info.rows == {"train": 40, "test": 20}
    assert info.fields == describe("fashion_mnist", None).fields
    monkeypatch.setenv("DISTDL_CACHE", str(tmp_path / "cache"))
    rows = open_split(ready(None, tmp_path / "out"), "test").gather(np.arange(20))
    assert np.array_equal(rows["image"], IMAGES["t10k"])
    assert np.array_equal(rows["label"], LABELS["t10k"])
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["test.parquet", "train.parquet"]


def test_the_same_input_gives_the_same_file(idx: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        assert _run(idx, tmp_path / out).returncode == 0
    assert (tmp_path / "a" / "test.parquet").read_bytes() == (tmp_path / "b" / "test.parquet").read_bytes()
    assert pq.read_metadata(tmp_path / "a" / "train.parquet").num_rows == 40


def test_unfitting_files_end_in_one_clear_line(idx: Path, tmp_path: Path) -> None:
    (idx / "t10k-labels-idx1-ubyte").write_bytes(_header(3) + b"abc")
    done = _run(idx, tmp_path / "out")
    assert done.returncode == 5
    assert done.stderr.startswith("error: ")
    assert "the test files hold images (20, 28, 28) uint8 and labels (3,)" in done.stderr
    (idx / "t10k-labels-idx1-ubyte").unlink()
    assert "t10k-labels-idx1-ubyte.gz: No such file" in _run(idx, tmp_path / "out").stderr
