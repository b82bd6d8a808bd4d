"""Sounds from files to strings: trained in exact mode at one and two processes, then asked for new files."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from distdl.testing import assert_same_bits
from tests.commands import distdl
from tests.multiprocess.test_series_runs import recipe, tensors
from tests.runs import train_here

pytestmark = pytest.mark.slow

RATE = 8000
LOW, HIGH = (697, 770, 852, 941), (1209, 1336, 1477)
KEYS = "123456789*0#"


def dialled(keys: str, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """The tones of a telephone's keys (ITU-T Q.23), 60 to 100 ms each, with pauses and some noise."""
    parts = [np.zeros(400)]
    for key in keys:
        row, column = divmod(KEYS.index(key), 3)
        at = np.arange(int(RATE * rng.uniform(0.06, 0.1))) / RATE
        parts += [sum(np.sin(2 * np.pi * f * at) / 4 for f in (LOW[row], HIGH[column])), np.zeros(480)]
    sound = np.concatenate(parts)
    return (sound + rng.normal(0, 0.01, len(sound))).astype(np.float32)


def record(folder: Path, rows: int, seed: int, form: str = "wav") -> list[str]:
    """`rows` files and the metadata beside them; returns what was dialled."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    said = [" ".join(rng.choice([*KEYS[:4]], rng.integers(1, 5))) for _ in range(rows)]
    lines = ["file_name,keys"]
    for i, keys in enumerate(said):
        soundfile.write(folder / f"{i:03d}.{form}", dialled(keys.replace(" ", ""), rng), RATE)
        lines.append(f"{i:03d}.{form},{keys}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return said


def test_dialled_keys_are_heard(tmp_path: Path) -> None:
    record(tmp_path / "in" / "train", 96, 0)
    said = record(tmp_path / "in" / "test", 12, 1)
    keys = ["--tokenize", "keys", "--tokenizer", "space", "--min-count", "1", "--sample-rate", "8000"]
    keys += ["--mels", "24"]
    code, text = distdl("data", "prepare", str(tmp_path / "in"), *keys, "--out", str(tmp_path / "data"))
    assert code == 0, text
    config = None
    for size in (1, 2):
        config = recipe(
            tmp_path,
            {"name": "transcription"},
            {"name": "crnn_ctc", "width": 8, "hidden": 24},
            data={
                "path": str(tmp_path / "data"),
                "eval_split": "test",
                "order": "length_bucketed",
                "sequence": "audio",
            },
            optim={"name": "adamw", "lr": 0.005, "clip_norm": 5.0},
            train={"epochs": 30, "seed": 3, "reduction": "exact"},
            run={"dir": str(tmp_path / f"w{size}")},
        )
        train_here(config, size)
    assert_same_bits(tensors(tmp_path / "w2"), tensors(tmp_path / "w1"))
    code, text = distdl("eval", str(config), "--json")
    assert code == 0, text
    accuracy = json.loads(text.splitlines()[-1])["accuracy"]
    assert accuracy > 0.8
    # Its rows may have any length in another program, too.
    if all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        made = str(tmp_path / "made.onnx")
        code, text = distdl("ckpt", "export", str(tmp_path / "w2"), "--to", "onnx", "--out", made)
        assert code == 0, text
    # The files themselves, as a user has them: heard with the bands of the dataset.
    out = tmp_path / "out.jsonl"
    files = sorted((tmp_path / "in" / "test").glob("*.wav"))
    (tmp_path / "new").mkdir()
    for file in files:
        file.rename(tmp_path / "new" / file.name)
    plot = ["--plot", str(tmp_path / "heard.png")]
    code, text = distdl("predict", str(config), "--input", str(tmp_path / "new"), "--out", str(out), *plot)
    assert code == 0, text
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [Path(one["file"]).name for one in found] == [f.name for f in files]
    right = [one["text"] == keys for one, keys in zip(found, said, strict=True)]
    assert np.mean(right) == pytest.approx(accuracy)
    assert (tmp_path / "heard.png").stat().st_size > 10_000
