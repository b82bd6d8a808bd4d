"""Compose spoken strings of digits from real recordings, as Parquet that `distdl data prepare` reads.

    apt-get download asterisk-core-sounds-{en,es,fr,it,ru}-wav
    for package in *.deb; do dpkg-deb -x "$package" sounds; done
    python benchmarks/spoken_digits.py --sounds sounds --out data/in/spoken_digits
    distdl data prepare data/in/spoken_digits --tokenize digits --tokenizer space --sample-rate 8000 \\
        --mels 40 --out data/spoken_digits

The packages have each digit once in each of five languages, spoken by four people, 8,000 samples a second
(CC BY-SA 3.0; the Russian ones CC BY 3.0). A string is one to six digits in one language, each faster or
slower by up to 12 %, with pauses of 20 to 250 ms, 20 dB between the quietest and the loudest string, and
white noise 10 to 30 dB below the voice. Training and test strings are drawn apart, of the same recordings:
it is new strings that the test is about, not new voices. Same seed, same rows.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import wave
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

RATE = 8000
LONGEST = 6
ROWS = {"train": 6_000, "test": 1_000}

Samples = npt.NDArray[np.float64]


def recordings(folder: Path) -> list[list[Samples]]:
    """For each voice the sounds of 0 to 9, without the silence around them."""
    voices = sorted(file.parent for file in folder.rglob("digits/0.wav"))
    return [[_trimmed(_read(voice / f"{digit}.wav")) for digit in range(10)] for voice in voices]


def _read(file: Path) -> Samples:
    with wave.open(str(file)) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (RATE, 1, 2), file
        return np.frombuffer(sound.readframes(sound.getnframes()), "<i2") / 2**15


def _trimmed(samples: Samples) -> Samples:
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    return samples[max(loud[0] - 80, 0) : loud[-1] + 80]


def spoken(digits: list[int], voice: list[Samples], rng: np.random.Generator) -> Samples:
    """One string."""
    parts = [np.zeros(int(RATE * rng.uniform(0.02, 0.25)))]
    for digit in digits:
        samples = voice[digit]
        at = np.arange(0, len(samples) - 1, rng.uniform(0.88, 1.12))
        parts += [np.interp(at, np.arange(len(samples)), samples)]
        parts += [np.zeros(int(RATE * rng.uniform(0.02, 0.25)))]
    sound = np.concatenate(parts)
    sound *= 0.5 / np.abs(sound).max()
    noise = np.sqrt(np.mean(sound**2)) * 10 ** -rng.uniform(0.5, 1.5)
    found: Samples = (sound + rng.normal(0, noise, len(sound))) * 10 ** -rng.uniform(0, 1)
    return found


def wav(samples: Samples) -> bytes:
    """A WAV file of 16 bits a sample."""
    out = io.BytesIO()
    with wave.open(out, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(RATE)
        sound.writeframes((samples.clip(-1, 1) * (2**15 - 1)).astype("<i2").tobytes())
    return out.getvalue()


def table(voices: list[list[Samples]], rows: int, rng: np.random.Generator) -> pa.Table:
    """An Arrow table with Hugging Face features: audio (Audio) and digits (string)."""
    sounds, texts = [], []
    for _ in range(rows):
        digits = rng.integers(0, 10, rng.integers(1, LONGEST + 1)).tolist()
        sound = spoken(digits, voices[rng.integers(len(voices))], rng)
        sounds.append({"bytes": wav(sound), "path": None})
        texts.append(" ".join(map(str, digits)))
    kind = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
    features = {"audio": {"_type": "Audio"}, "digits": {"dtype": "string", "_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    columns = [pa.array(sounds, kind), pa.array(texts)]
    return pa.table(columns, names=["audio", "digits"]).replace_schema_metadata(metadata)


def main(arguments: list[str] | None = None) -> int:
    """Parse, compose, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sounds", type=Path, required=True, metavar="FOLDER", help="the packages, unpacked")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the files go")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    voices = recordings(given.sounds)
    if not voices:
        parser.error(f"{given.sounds} holds no digits/0.wav at any depth")
    given.out.mkdir(parents=True, exist_ok=True)
    for number, (split, rows) in enumerate(ROWS.items()):
        data = table(voices, rows, np.random.default_rng([given.seed, number]))
        pq.write_table(data, given.out / f"{split}.parquet", row_group_size=1000)
        print(f"{given.out / split}.parquet: {rows} rows, {len(voices)} voices")
    return 0


if __name__ == "__main__":
    sys.exit(main())
