"""Encoded sound (WAV, FLAC, OGG, ...) -> log-mel features. The one file that imports soundfile."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from distdl.errors import DataError, EnvironmentProblem

SOUNDS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au")
WINDOW, HOP = 0.025, 0.010
"""Seconds that a frame looks at, and between the beginnings of two."""
_FLOOR = 1e-10
_BLOCK_SAMPLES, _BLOCK_FRAMES = 1 << 20, 8192


@dataclass(frozen=True)
class Sound:
    """How a sound column is made numbers: `mels` bands from 0 to half of `sample_rate` (Hz)."""

    sample_rate: int
    mels: int


def is_sound(data: bytes) -> bool:
    """Whether encoded bytes begin as a sound file does."""
    riff = data[:4] == b"RIFF" and data[8:12] == b"WAVE"  # WebP images are RIFF too
    mpeg = len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0  # a JPEG has FF D8
    return riff or mpeg or data[:4] in (b"fLaC", b"OggS", b"FORM", b".snd") or data[:3] == b"ID3"


def decode_sound(data: bytes, where: str) -> tuple[npt.NDArray[np.float32], int]:
    """(samples [n] in -1..1, the mean of the channels; samples a second).

    `where` names the row in errors. Raises DataError for bytes that are no sound, or have no samples, or such
    as are not finite; EnvironmentProblem where soundfile is not installed.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: its library of C is missing
        raise EnvironmentProblem(
            f"sound needs soundfile: pip install 'distdl[audio]' ({type(error).__name__}: {error})"
        ) from error
    parts = []
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate = int(file.samplerate)
            # In blocks: how long it is, its head may not know.
            while len(block := file.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)):
                parts.append(block.mean(1))
    except (soundfile.SoundFileError, TypeError, ValueError) as error:
        why = getattr(error, "error_string", str(error))
        raise DataError(f"{where} is not a sound that soundfile can read: {why}") from error
    if not parts:
        raise DataError(f"{where} is a sound without samples; drop such rows first")
    samples = np.concatenate(parts)
    if not np.isfinite(samples).all():
        raise DataError(f"{where} is a sound with samples that are not finite numbers; drop such rows first")
    return samples, rate


def log_mel(
    samples: npt.NDArray[np.float32], rate: int, sound: Sound, where: str = "a row"
) -> npt.NDArray[np.float16]:
    """Samples [n] -> float16 [frames, mels]: the logarithm of the energy in each band, 100 frames a second.

    A frame is 25 ms under a Hann window; bands are triangles of one area on Slaney's mel scale, which are
    equally wide up to 1 kHz and grow by a constant factor above (Slaney, 1998, Auditory Toolbox). A file of a
    higher rate than `sound.sample_rate` has the same bands, with no resampling. Raises DataError for a lower
    one, which lacks the upper bands, and for more bands than the spectrum has room for.
    """
    if rate < sound.sample_rate:
        raise DataError(
            f"{where} has {rate} samples a second, and the bands reach up to {sound.sample_rate / 2:g} Hz, "
            f"which needs {sound.sample_rate}: leave it out, or prepare all with --sample-rate {rate}"
        )
    window, hop = round(WINDOW * rate), round(HOP * rate)
    samples = np.pad(samples, (0, max(window - len(samples), 0)))
    frames = np.lib.stride_tricks.sliding_window_view(samples, window)[::hop]
    shape = np.hanning(window + 1)[:-1]
    size, found = _fft_size(window), np.empty((len(frames), sound.mels), np.float16)
    bands = _bands(rate, size, sound)
    for first in range(0, len(frames), _BLOCK_FRAMES):  # the spectrum of an hour would not fit
        spectrum = np.fft.rfft(frames[first : first + _BLOCK_FRAMES] * (shape / shape.sum()), size)
        energy = (spectrum.real**2 + spectrum.imag**2) @ bands
        found[first : first + _BLOCK_FRAMES] = np.log(np.maximum(energy, _FLOOR))
    return found


def _fft_size(window: int) -> int:
    return 1 << (window - 1).bit_length()


@lru_cache(maxsize=8)
def _bands(rate: int, size: int, sound: Sound) -> npt.NDArray[np.float64]:
    """[size // 2 + 1, mels]: the weight of each frequency in each band. Raises DataError for an empty one."""
    centres = _hertz(np.linspace(0, _mel(sound.sample_rate / 2), sound.mels + 2))
    at = np.arange(size // 2 + 1) * (rate / size)
    low, middle, high = centres[:-2], centres[1:-1], centres[2:]
    rising = (at[:, None] - low) / (middle - low)
    falling = (high - at[:, None]) / (high - middle)
    triangles: npt.NDArray[np.float64] = np.maximum(np.minimum(rising, falling), 0)
    if not triangles.any(0).all():
        raise DataError(
            f"--mels {sound.mels} is more than a spectrum up to {sound.sample_rate / 2:g} Hz has room for: "
            "some bands would hold no frequency; give fewer"
        )
    return triangles * (2 / (high - low)) * (rate / size)  # an integral: the same for bins of any width


_STEP = np.log(6.4) / 27
"""Slaney: above 1 kHz 27 mels are a factor of 6.4."""


def _mel(hertz: float) -> float:
    return hertz * 3 / 200 if hertz < 1000 else 15 + float(np.log(hertz / 1000)) / _STEP


def _hertz(mel: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * _STEP))
    return found
