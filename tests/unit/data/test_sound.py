"""Sounds: their log-mel features, and the folders and tables that they are prepared from."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from distdl.data.dataset import ShardedDataset
from distdl.data.prepare.options import Options
from distdl.data.prepare.run import prepare
from distdl.data.prepare.sound import Sound, _hertz, _mel, decode_sound, log_mel
from distdl.errors import DataError

Samples = npt.NDArray[np.float32]
SPEECH = Sound(16_000, 80)
CENTRES = _hertz(np.linspace(0, _mel(8000), 82))[1:-1]


def tone(hertz: float, rate: int = 16_000, seconds: float = 0.5, size: float = 0.5) -> Samples:
    return (size * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def encoded(samples: Samples, rate: int = 16_000, form: str = "WAV") -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=form)
    return out.getvalue()


@pytest.mark.parametrize("hertz", [200, 440, 1000, 2500, 7000])
def test_the_loudest_band_is_that_of_the_tone(hertz: float) -> None:
    loudest = log_mel(tone(hertz), 16_000, SPEECH).astype(np.float64).mean(0).argmax()
    nearest = np.abs(CENTRES - hertz).argmin()
    assert abs(int(loudest) - int(nearest)) <= (hertz < 300)  # the bands there are as wide as a frequency bin


def test_slaneys_scale() -> None:
    # 1 kHz is mel 15; 6.4 kHz is 27 mels above.
    assert _mel(1000) == pytest.approx(15)
    assert _mel(6400) == pytest.approx(42)
    assert _hertz(np.array([3.0, 15.0, 42.0])) == pytest.approx([200, 1000, 6400])


def test_energy_by_the_definition() -> None:
    # One frame, its Fourier transform and its triangles written out.
    samples = np.random.default_rng(0).standard_normal(400).astype(np.float32)
    at = np.arange(400)
    weighed = samples * (0.5 - 0.5 * np.cos(2 * np.pi * at / 400))
    weighed /= (0.5 - 0.5 * np.cos(2 * np.pi * at / 400)).sum()
    edges = _hertz(np.linspace(0, _mel(8000), 12))
    wanted = np.zeros(10)
    for k in range(257):
        energy = abs((weighed * np.exp(-2j * np.pi * k * at / 512)).sum()) ** 2
        for band in range(10):
            low, middle, high = edges[band : band + 3]
            f = k * 16_000 / 512
            share = (f - low) / (middle - low) if f < middle else (high - f) / (high - middle)
            wanted[band] += max(share, 0) * 2 / (high - low) * energy * 31.25
    found = log_mel(samples, 16_000, Sound(16_000, 10))
    assert found.shape == (1, 10)
    assert found[0] == pytest.approx(np.log(wanted), abs=0.01)  # float16


def test_ten_times_as_loud_is_a_hundred_times_the_energy() -> None:
    quiet, loud = (log_mel(tone(440, size=s), 16_000, SPEECH).max(1) for s in (0.05, 0.5))
    assert (loud - quiet).astype(float) == pytest.approx(np.log(100), abs=0.02)


def test_a_higher_rate_has_the_same_bands() -> None:
    low, high = (log_mel(tone(440, rate), rate, SPEECH) for rate in (16_000, 44_100))
    band = int(low.mean(0).argmax())
    assert high.mean(0).argmax() == band
    assert high[:, band].mean() == pytest.approx(float(low[:, band].mean()), abs=0.3)
    assert abs(len(high) - len(low)) <= 1


def test_frames() -> None:
    assert log_mel(tone(440, seconds=1), 16_000, SPEECH).shape == (98, 80)
    assert log_mel(tone(440, seconds=0.001), 16_000, SPEECH).shape == (1, 80)
    silent = log_mel(np.zeros(800, np.float32), 16_000, SPEECH)
    assert np.isfinite(silent).all()
    with pytest.raises(DataError, match=r"a row has 8000 samples a second.*give --sample-rate 8000"):
        log_mel(tone(440, 8000), 8000, SPEECH)


def test_channels_are_averaged_and_what_is_no_sound_is_said() -> None:
    both = np.stack([tone(440), np.zeros(8000, np.float32)], 1)
    samples, rate = decode_sound(encoded(both), "row 1")
    assert rate == 16_000
    assert samples == pytest.approx(tone(440) / 2, abs=1e-3)
    with pytest.raises(DataError, match="row 1 is not a sound that soundfile can read"):
        decode_sound(b"RIFFxxxxWAVEnothing", "row 1")
    with pytest.raises(DataError, match="row 1 is a sound without samples"):
        decode_sound(encoded(np.zeros(0, np.float32)), "row 1")


def write(folder: Path, names: dict[str, float]) -> None:
    for name, hertz in names.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(tone(hertz, seconds=0.1 + hertz / 10_000), form=file.suffix[1:].upper()))


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    write(tmp_path / "in", {"train/low/a.wav": 300, "train/high/b.flac": 3000, "test/low/c.ogg": 310})
    index = prepare(str(tmp_path / "in"), tmp_path / "out", Options(mels=20))
    fields = index.info().fields
    assert (fields["audio"].dtype, fields["audio"].shape) == ("halffloat", (None, 20))
    assert fields["label"].classes == ("high", "low")
    rows = ShardedDataset(str(tmp_path / "out"), split="train")[:2]
    assert rows["label"].tolist() == [0, 1]
    assert rows["audio"].lengths.tolist() == [1 + (6400 - 400) // 160, 1 + (2080 - 400) // 160]
    expected = log_mel(tone(300, seconds=0.13), 16_000, Sound(16_000, 20))
    # 16-bit WAV: what is nearly silent is rounding.
    heard = rows["audio"].rows(1, 2).values
    assert np.exp(heard.astype(float)) == pytest.approx(np.exp(expected.astype(float)), rel=0.02, abs=1e-7)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_metadata_beside_the_sounds(tmp_path: Path, form: str) -> None:
    for split, names in {"train": {"x/1.wav": 300.0, "x/2.wav": 600.0}, "test": {"3.wav": 400.0}}.items():
        write(tmp_path / "in" / split, names)
        rows = [{"file_name": n, "said": f"00{n[-5]} two\nlines"} for n in names]
        quoted = "file_name,said\n" + "".join(f'{r["file_name"]},"{r["said"]}"\n' for r in rows)
        (tmp_path / "in" / split / f"metadata.{form}").write_text(quoted if form == "csv" else lines(rows))
    options = Options(mels=8, tokenize=("said",), tokenizer="word", min_count=1)
    fields = prepare(str(tmp_path / "in"), tmp_path / "out", options).info().fields
    assert fields["audio"].shape == (None, 8)
    assert fields["said"].vocabulary == 4 + len({"001", "002", "two", "lines"})
    assert len(ShardedDataset(str(tmp_path / "out"), split="test")) == 1


def test_digits_in_csv_stay_text(tmp_path: Path) -> None:
    write(tmp_path / "in", {"a.wav": 300})
    (tmp_path / "in" / "metadata.csv").write_text("file_name,said\na.wav,0042\n")
    options = Options(classes=("said",))
    assert prepare(str(tmp_path / "in"), tmp_path / "out", options).info().fields["said"].classes == ("0042",)


def test_tables_with_encoded_sounds(tmp_path: Path) -> None:
    values = [{"bytes": encoded(tone(300)), "path": None}, {"bytes": encoded(tone(900)), "path": None}]
    column = pa.array(values, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"voice": column})
    said = {"huggingface": json.dumps({"info": {"features": {"voice": {"_type": "Audio"}}}})}
    for name, one in {"said": table.replace_schema_metadata(said), "unsaid": table}.items():
        pq.write_table(one, tmp_path / f"{name}.parquet")
        index = prepare(str(tmp_path / f"{name}.parquet"), tmp_path / name, Options(mels=8))
        assert index.info().fields["voice"].shape == (None, 8), name


Spoil = Callable[[Path], object]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: (d / "metadata.csv").write_text("name\na.wav\n"), "needs a column file_name"),
        (lambda d: (d / "metadata.csv").write_text("file_name\n"), "needs a column file_name.*0 rows"),
        (lambda d: (d / "metadata.csv").write_text("file_name\nb.wav\n"), "no such file beside it"),
        (lambda d: (d / "metadata.csv").write_text("file_name\n../a.wav\n"), "lies outside its folder"),
        (lambda d: (d / "metadata.csv").write_text("file_name\na.txt\n"), "expected one of .png"),
        (lambda d: (d / "metadata.csv").write_text("file_name,audio\na.wav,x\n"), "has a column 'audio'"),
        (lambda d: (d / "metadata.jsonl").write_text('{"file_name": 3}\n'), "needs a column file_name"),
        (lambda d: (d / "metadata.jsonl").write_text("{\n"), "metadata.jsonl"),
        (lambda d: (d / f"metadata.{'jsonl'}").write_text('{"file_name": "a.wav"}\n'), "keep one"),
        (lambda d: (d / "a.wav").write_bytes(b"hello"), "not a sound that soundfile can read"),
        (lambda d: (d / "a.wav").write_bytes(encoded(tone(300, 8000), 8000)), "--sample-rate 8000"),
    ],
)
def test_bad_folders(tmp_path: Path, spoil: Spoil, said: str) -> None:
    form = "metadata.jsonl" if "metadata.jsonl" in spoil.__code__.co_consts else "metadata.csv"
    write(tmp_path / "in", {"a.wav": 300})
    (tmp_path / "in" / form).write_text(
        "file_name\na.wav\n" if form.endswith("csv") else '{"file_name": "a.wav"}\n'
    )
    spoil(tmp_path / "in")
    with pytest.raises(DataError, match=said):
        prepare(str(tmp_path / "in"), tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()


def test_images_and_sounds_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path / "in", {"a.wav": 300})
    (tmp_path / "in" / "b.png").write_bytes(b"")
    (tmp_path / "in" / "metadata.csv").write_text("file_name\na.wav\nb.png\n")
    with pytest.raises(DataError, match=r"a\.wav is a sound and .*b\.png is none"):
        prepare(str(tmp_path / "in"), tmp_path / "out", Options())
