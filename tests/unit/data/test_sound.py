"""Sounds: their log-mel features, and the folders and tables that they are prepared from."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from distdl.data.dataset import ShardedDataset
from distdl.data.prepare import sound
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
    with pytest.raises(DataError, match=r"has 8000 samples.*prepare all with --sample-rate 8000"):
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


CSV, JSONL = "metadata.csv", "metadata.jsonl"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({CSV: "name\na.wav\n"}, "has no column file_name with their names; it has name"),
        ({CSV: "file_name\n"}, "it has 0 rows"),
        ({CSV: "file_name\nb.wav\n"}, "no such file beside it"),
        ({CSV: "file_name\n../a.wav\n"}, "lies outside its folder"),
        ({CSV: "file_name\n/etc/a.wav\n"}, "lies outside its folder"),
        ({CSV: f"file_name\n{'a' * 300}.wav\n"}, "no such file beside it"),
        ({CSV: "file_name\na.txt\n"}, "expected one of .png"),
        ({CSV: "file_name,audio\na.wav,x\n"}, "has a column 'audio'"),
        ({CSV: "file_name,file_name\na.wav,a.wav\n"}, "cannot be read|two columns file_name"),
        ({CSV: "file_name\na.wav\n", JSONL: '{"file_name": "a.wav"}\n'}, "keep one"),
        ({JSONL: '{"file_name": 3}\n'}, "needs a name in file_name in every row"),
        ({JSONL: "{\n"}, "metadata.jsonl cannot be read"),
        ({JSONL: '{"file_name": "a\\u0000.wav"}\n'}, "no such file beside it"),
        ({CSV: "file_name\na.wav\n", "a.wav": b"hello"}, r"a\.wav\) is not a sound that soundfile can read"),
        ({CSV: "file_name\na.wav\n", "a.wav": encoded(tone(300, 8000), 8000)}, "--sample-rate 8000"),
        ({}, "without a folder for their class"),
    ],
)
def test_bad_folders(tmp_path: Path, files: dict[str, str | bytes], said: str) -> None:
    write(tmp_path / "in", {"a.wav": 300})
    for name, content in files.items():
        (tmp_path / "in" / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=said):
        prepare(str(tmp_path / "in"), tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()


def test_samples_that_are_no_numbers_are_refused() -> None:
    out = io.BytesIO()
    soundfile.write(out, np.array([0.0, np.nan], np.float32), 16_000, format="WAV", subtype="FLOAT")
    with pytest.raises(DataError, match="row 1 is a sound with samples that are not finite"):
        decode_sound(out.getvalue(), "row 1")


def test_more_bands_than_there_are_frequencies_are_refused() -> None:
    with pytest.raises(DataError, match="--mels 400 is more than a spectrum up to 8000 Hz has room for"):
        log_mel(tone(440), 16_000, Sound(16_000, 400))


def test_a_long_sound_is_heard_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = log_mel(tone(440, seconds=1), 16_000, SPEECH)
    monkeypatch.setattr(sound, "_BLOCK_FRAMES", 7)
    monkeypatch.setattr(sound, "_BLOCK_SAMPLES", 1001)
    samples, rate = decode_sound(encoded(tone(440, seconds=1)), "row 1")
    assert samples == pytest.approx(tone(440, seconds=1), abs=1e-3)
    assert log_mel(tone(440, seconds=1), rate, SPEECH) == pytest.approx(whole, abs=0.02)


def test_mpeg_is_known_by_its_beginning() -> None:
    assert sound.is_sound(encoded(tone(440), form="MP3"))
    assert not sound.is_sound(b"\xff\xd8\xff\xe0")  # a JPEG


def test_metadata_at_the_root_of_split_folders(tmp_path: Path) -> None:
    write(tmp_path / "in", {"train/a.wav": 300, "test/b.wav": 600, "train/c.wav": 400})
    (tmp_path / "in" / CSV).write_text("file_name,said\ntrain/a.wav,one\ntest/b.wav,two\ntrain/c.wav,three\n")
    index = prepare(str(tmp_path / "in"), tmp_path / "out", Options(mels=8, classes=("said",)))
    assert index.info().rows == {"train": 2, "test": 1}
    names = index.info().fields["said"].classes
    found = {s: ShardedDataset(str(tmp_path / "out"), split=s)[:9]["said"] for s in ("train", "test")}
    assert {s: [names[i] for i in labels] for s, labels in found.items()} == {
        "train": ["one", "three"],
        "test": ["two"],
    }


def test_splits_without_labels_or_in_another_order(tmp_path: Path) -> None:
    for split, text in {"train": "file_name,a,b\nx.wav,1,2\n", "test": "b,file_name,a\n2,x.wav,1\n"}.items():
        write(tmp_path / "in" / split, {"x.wav": 300})
        (tmp_path / "in" / split / CSV).write_text(text)
    prepare(str(tmp_path / "in"), tmp_path / "out", Options(mels=8))
    (tmp_path / "in" / "test" / CSV).write_text("file_name,a\nx.wav,1\n")
    with pytest.raises(DataError, match=r"column 'b' has a null, first in row 0 of split 'test'"):
        prepare(str(tmp_path / "in"), tmp_path / "again", Options(mels=8))
    left_out = Options(mels=8, columns=("audio", "a"))
    assert prepare(str(tmp_path / "in"), tmp_path / "again", left_out).info().rows["test"] == 1


def test_a_split_without_metadata_is_not_dropped_in_silence(tmp_path: Path) -> None:
    write(tmp_path / "in", {"test/a.wav": 300, "valid/low/b.wav": 300})
    (tmp_path / "in" / "test" / CSV).write_text("file_name\na.wav\n")
    with pytest.raises(DataError, match="valid holds images or sounds and has no metadata"):
        prepare(str(tmp_path / "in"), tmp_path / "out", Options())


def test_files_may_be_links(tmp_path: Path) -> None:
    write(tmp_path / "cache", {"blob.wav": 300})
    (tmp_path / "in").mkdir()
    (tmp_path / "cache" / "blob.wav").rename(tmp_path / "cache" / "blob")
    (tmp_path / "in" / "a.wav").symlink_to(tmp_path / "cache" / "blob")
    (tmp_path / "in" / CSV).write_text("file_name\na.wav\n")
    assert prepare(str(tmp_path / "in"), tmp_path / "out", Options()).info().rows == {"train": 1}


@pytest.mark.parametrize("beside", [CSV, "train.csv"])
def test_tables_stay_tables(tmp_path: Path, beside: str) -> None:
    """Metadata that name no files, and tables beside sounds, are what they were before there was sound."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / beside).write_text("a,b\n1,2\n")
    if beside == "train.csv":
        write(tmp_path / "in", {"clips/x.wav": 300})
    fields = prepare(str(tmp_path / "in"), tmp_path / "out", Options()).info().fields
    assert set(fields) == {"a", "b"}


def test_metadata_of_another_kind_need_not_be_readable(tmp_path: Path) -> None:
    (tmp_path / "in" / "raw").mkdir(parents=True)
    (tmp_path / "in" / "train.csv").write_text("a,b\n1,2\n")
    (tmp_path / "in" / "raw" / CSV).write_bytes("größe\n1\n".encode("latin-1"))
    assert set(prepare(str(tmp_path / "in"), tmp_path / "out", Options()).info().fields) == {"a", "b"}


def test_what_was_prepared_before_is_known_again() -> None:
    assert not {"sample_rate", "mels"} & set(Options().mathematics())
    assert Options(mels=40).mathematics()["mels"] == 40


def test_images_and_sounds_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path / "in", {"a.wav": 300})
    (tmp_path / "in" / "b.png").write_bytes(b"")
    (tmp_path / "in" / "metadata.csv").write_text("file_name\na.wav\nb.png\n")
    with pytest.raises(DataError, match=r"a\.wav is a sound and .*b\.png is none"):
        prepare(str(tmp_path / "in"), tmp_path / "out", Options())
