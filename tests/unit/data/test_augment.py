"""Augmentation of images, tokens and series: what it does, what it is keyed by, what it refuses."""

from __future__ import annotations

import pickle
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distdl.data.augment import noise
from distdl.data.augment.augmentation import Augmentation, Normalise, TokenDropout, augment
from distdl.data.table.ragged import Ragged
from distdl.errors import DataError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(1, 255, (300, 3, 9, 8), dtype=np.uint8)
LAST = np.ascontiguousarray(np.moveaxis(IMAGES, 1, 3))
TOKENS = RNG.integers(4, 1000, (200, 37)).astype(np.int32)
SERIES = RNG.normal(size=(60, 50, 3)).astype(np.float32)


def ragged(array: np.ndarray, lengths: np.ndarray) -> Ragged:
    return Ragged(array[np.arange(array.shape[1]) < lengths[:, None]], lengths.astype(np.int64))


# --- images ---


@pytest.mark.parametrize("options", [{"flip": True}, {"crop_padding": 2}, {"cutout": 3}])
def test_channels_are_found_where_they_are(options: dict[str, Any]) -> None:
    first = Augmentation(**options)(IMAGES, key=5)
    last = Augmentation(**options)(LAST, key=5)
    assert isinstance(first, np.ndarray)
    assert isinstance(last, np.ndarray)
    assert last.flags.c_contiguous
    assert np.array_equal(np.moveaxis(last, 3, 1), first)
    assert not np.array_equal(first, IMAGES)
    grey = Augmentation(**options)(IMAGES[:, 0], key=5)
    assert np.array_equal(grey, first[:, 0])


def test_augment_flips_the_width_of_images_with_channels_last() -> None:
    assert np.array_equal(np.moveaxis(augment(LAST, True, 2, key=5), 3, 1), augment(IMAGES, True, 2, key=5))
    many = RNG.integers(0, 9, (20, 7, 9, 8))  # seven channels: neither axis looks like colours
    assert np.array_equal(augment(many, True, 2, key=5), augment(many, True, 2, key=5, channels="first"))


def test_channels_can_be_told_and_must_be_where_they_cannot_be_seen() -> None:
    many = np.moveaxis(RNG.integers(0, 9, (20, 7, 9, 8)), 1, 3)
    flipped = Augmentation(flip=True, channels="last")(many, key=1)
    other = Augmentation(flip=True, channels="first")(np.moveaxis(many, 3, 1), key=1)
    assert isinstance(other, np.ndarray)
    assert np.array_equal(flipped, np.moveaxis(other, 1, 3))
    with pytest.raises(DataError, match=r"\[20, 9, 8, 7\]: neither axis 1 nor axis 3.*Say channels"):
        Augmentation(flip=True)(many, key=1)


def test_the_augmentation_does_what_the_function_does() -> None:
    assert np.array_equal(Augmentation(flip=True, crop_padding=2)(IMAGES, 7), augment(IMAGES, True, 2, 7))


def test_cutout_sets_a_square_to_zero_with_its_centre_anywhere() -> None:
    result = Augmentation(cutout=4)(IMAGES, key=2)
    assert isinstance(result, np.ndarray)
    assert result.dtype == np.uint8
    gone = result == 0
    assert np.array_equal(gone, np.broadcast_to(gone[:, :1], gone.shape))  # all channels alike
    assert np.array_equal(result[~gone], IMAGES[~gone])
    for mask in gone[:, 0]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert 2 <= len(rows) <= 4  # cut off by the border at most up to the centre
        assert 2 <= len(columns) <= 4
        assert mask.sum() == len(rows) * len(columns)
        assert np.ptp(rows) == len(rows) - 1
    share = gone[:, 0].mean(axis=0)
    assert share.min() > 0.03  # corners too
    sizes = gone[:, 0].sum((1, 2))
    assert (sizes == 16).mean() > 0.4


def test_normalise_is_by_channel_in_float32_and_comes_before_cutout() -> None:
    by = Normalise((0.1, 0.2, 0.3), (0.5, 0.6, 0.7), 1 / 255)
    expected = (IMAGES / 255 - np.reshape(by.mean, (3, 1, 1))) / np.reshape(by.std, (3, 1, 1))
    result = Augmentation(kind="image", normalise=by)(IMAGES, key=2)
    assert isinstance(result, np.ndarray)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-6)
    last = Augmentation(kind="image", normalise=by)(LAST, key=2)
    assert isinstance(last, np.ndarray)
    assert np.array_equal(np.moveaxis(last, 3, 1), result)
    cut = Augmentation(normalise=by, cutout=4)(IMAGES, key=2)
    gone = Augmentation(cutout=4)(IMAGES, key=2) == 0
    assert np.array_equal(cut, np.where(gone, np.float32(0), result))
    grey = Augmentation(kind="image", normalise=Normalise((100.0,), (50.0,)))(IMAGES[:, 0], key=2)
    np.testing.assert_allclose(grey, (IMAGES[:, 0] - 100.0) / 50, atol=1e-6)


# --- tokens ---


def test_tokens_are_replaced_with_the_probability_and_others_left_alone() -> None:
    before = TOKENS.copy()
    result = Augmentation(token_dropout=TokenDropout(0.2, 1))(TOKENS, key=8)
    assert isinstance(result, np.ndarray)
    assert result.dtype == np.int32
    changed = result != TOKENS
    assert (result[changed] == 1).all()
    assert abs(changed.mean() - 0.2) < 0.02
    assert np.array_equal(TOKENS, before)
    assert (Augmentation(token_dropout=TokenDropout(1.0, 1))(TOKENS, key=8) == 1).all()


def test_a_row_is_treated_alike_in_a_list_and_in_a_padded_array() -> None:
    lengths = RNG.integers(0, 38, len(TOKENS))
    drop = Augmentation(token_dropout=TokenDropout(0.3, 1, spared=(0,)))
    padded = np.where(np.arange(37) < lengths[:, None], TOKENS, 0)
    from_list, from_array = drop(ragged(TOKENS, lengths), key=3), drop(padded, key=3)
    assert isinstance(from_list, Ragged)
    assert np.array_equal(from_list.padded(), from_array)
    series = ragged(SERIES, lengths[:60])
    jittered, whole = Augmentation(jitter=0.1)(series, key=3), Augmentation(jitter=0.1)(SERIES, key=3)
    assert isinstance(jittered, Ragged)
    assert isinstance(whole, np.ndarray)
    assert np.array_equal(jittered.values, whole[np.arange(50) < lengths[:60, None]])


# --- series ---


def test_jitter_adds_normal_noise_of_the_deviation() -> None:
    result = Augmentation(jitter=0.25)(SERIES, key=4)
    assert isinstance(result, np.ndarray)
    assert result.dtype == np.float32
    assert result.shape == SERIES.shape
    added = (result - SERIES) / 0.25
    assert abs(added.mean()) < 0.05
    assert abs(added.std() - 1) < 0.03
    assert abs((added**4).mean() - 3) < 0.3
    assert abs((added[:, 1:] * added[:, :-1]).mean()) < 0.05


def test_series_are_normalised_by_their_last_axis_and_then_jittered() -> None:
    by = Normalise((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    plain = Augmentation(kind="series", normalise=by)(SERIES, key=4)
    np.testing.assert_allclose(plain, (SERIES - by.mean) / by.std, atol=1e-6)
    both = Augmentation(normalise=by, jitter=0.1)(SERIES, key=4)
    noise_alone = Augmentation(jitter=0.1)(np.zeros_like(SERIES), key=4)
    np.testing.assert_allclose(both, plain + noise_alone, atol=1e-6)
    counts = np.arange(12, dtype=np.int16).reshape(3, 4)
    one = Augmentation(kind="series", normalise=Normalise((2.0,), (4.0,)))(counts, key=4)
    np.testing.assert_allclose(one, (counts - 2) / 4)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50))
def test_normal_numbers_are_the_inverse_of_the_distribution(raw: list[int]) -> None:
    words = np.array([*raw, 0, 2**64 - 1, 2**63], dtype=np.uint64)
    inverse = [statistics.NormalDist().inv_cdf(((int(w) >> 32) + 0.5) / 2**32) for w in words]
    np.testing.assert_allclose(noise.normal(words), inverse, rtol=1e-13, atol=1e-14)


# --- all ---

ALL: list[tuple[Augmentation, np.ndarray]] = [
    (Augmentation(flip=True, crop_padding=1, cutout=3), IMAGES),
    (Augmentation(token_dropout=TokenDropout(0.3, 1)), TOKENS),
    (Augmentation(jitter=0.1), SERIES),
]


@pytest.mark.parametrize(("what", "values"), ALL, ids=["image", "tokens", "series"])
def test_the_choices_depend_on_the_key_and_the_row_alone(what: Augmentation, values: np.ndarray) -> None:
    whole = what(values, key=11)
    assert np.array_equal(what(values[:20], key=11), whole[:20])
    assert not np.array_equal(what(values, key=12), whole)
    same = np.broadcast_to(values[:1], values.shape)
    rows = what(same, key=11)
    assert len(np.unique(np.asarray(rows).reshape(len(values), -1), axis=0)) > 15
    assert what(values[:0], key=11).shape == values[:0].shape
    assert np.array_equal(pickle.loads(pickle.dumps(what))(values, 11), whole)  # noqa: S301 - ours


def test_turning_one_on_does_not_move_the_choices_of_another() -> None:
    cut = Augmentation(cutout=3)(np.ones_like(IMAGES), key=6)
    with_flip = Augmentation(flip=True, cutout=3)(np.ones_like(IMAGES), key=6)
    assert np.array_equal(cut, with_flip)
    flipped = Augmentation(flip=True)(IMAGES, key=6)
    assert np.array_equal(Augmentation(flip=True, cutout=3)(IMAGES, key=6), np.where(cut == 0, 0, flipped))


def test_the_choices_never_change_between_versions() -> None:
    cut = Augmentation(cutout=2)(np.ones((3, 3, 3), np.uint8), key=2**64 - 1)
    assert np.asarray(cut).reshape(3, 9).tolist() == CUT
    dropped = Augmentation(token_dropout=TokenDropout(0.5, 0))(np.ones((2, 12), np.int64), key=1)
    assert np.asarray(dropped).tolist() == DROPPED
    jittered = np.asarray(Augmentation(jitter=1.0)(np.zeros((2, 4)), key=1))
    assert [x.hex() for x in jittered.ravel().tolist()] == JITTERED


CUT = [[1, 0, 0, 1, 0, 0, 1, 1, 1], [0, 1, 1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 0, 0, 1]]
DROPPED = [[0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0], [1, 0, 1, 0, 0, 1, 0, 0, 1, 1, 0, 1]]
JITTERED = [
    "0x1.d5e9ad2155d71p+0",
    "0x1.8cb75cf173ff2p-2",
    "-0x1.130533adea9a6p+0",
    "-0x1.258c51b5f5280p+0",
    "0x1.db9d262d6a0f3p-1",
    "0x1.c42240b941dc6p-3",
    "0x1.18126eee0e70fp-2",
    "0x1.ffc1566ee41f0p-2",
]


def test_nothing_to_do_returns_the_values_themselves() -> None:
    for values in (IMAGES, TOKENS, SERIES, ragged(TOKENS, np.full(200, 3))):
        assert Augmentation()(values, key=1) is values
    assert Augmentation(token_dropout=TokenDropout(0.0, 1))(TOKENS, key=1).base is TOKENS


def test_on_a_column_of_a_batch() -> None:
    batch = {"image": IMAGES, "label": np.arange(300)}
    change = pickle.loads(pickle.dumps(Augmentation(flip=True).on("image")))  # noqa: S301 - ours
    changed = change(batch, 3)
    assert np.array_equal(changed["image"], Augmentation(flip=True)(IMAGES, 3))
    assert changed["label"] is batch["label"]
    assert batch["image"] is IMAGES
    with pytest.raises(DataError, match="no column 'imag' to augment; did you mean 'image'"):
        Augmentation(flip=True).on("imag")(batch, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": True, "jitter": 0.1}, "flip is for image, jitter is for series"),
        ({"kind": "tokens", "cutout": 3}, "cutout is for image, kind is for tokens"),
        ({"kind": "tokens", "normalise": Normalise((0.0,), (1.0,))}, "not for tokens"),
        ({"normalise": Normalise((0.0,), (1.0,))}, "say kind: image, or series"),
        ({"crop_padding": -1}, "crop_padding is -1"),
        ({"cutout": -2}, "cutout is -2"),
        ({"jitter": float("nan")}, "jitter is nan"),
        ({"token_dropout": TokenDropout(1.2, 0)}, "probability of token_dropout is 1.2"),
        ({"kind": "image", "normalise": Normalise((0.0,), (0.0,))}, "one std above 0"),
        ({"kind": "image", "normalise": Normalise((0.0, 1.0), (1.0,))}, "one mean and"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Augmentation(**options)


@pytest.mark.parametrize(
    ("what", "values", "message"),
    [
        (Augmentation(flip=True), TOKENS, r"images have shape \[200, 37\] int32"),
        (
            Augmentation(flip=True),
            ragged(TOKENS, np.full(200, 3)),
            r"\[200, varying\] of \[600\] int32.*image-size",
        ),
        (
            Augmentation(token_dropout=TokenDropout(0.1, 0)),
            SERIES[:, :, 0],
            "tokens to augment are .* float32",
        ),
        (Augmentation(token_dropout=TokenDropout(0.1, 0)), TOKENS[0], r"\[37\] int32; expected integers"),
        (
            Augmentation(token_dropout=TokenDropout(0.1, 300)),
            IMAGES[:, 0, 0],
            "300 does not fit tokens of type uint8",
        ),
        (Augmentation(jitter=0.1), TOKENS, "series to augment are .* int32; expected floats"),
        (
            Augmentation(jitter=1, normalise=Normalise((0.0,), (1.0,))),
            SERIES,
            "has 1 means, and the data 3 channels",
        ),
    ],
)
def test_values_of_another_kind_are_refused(what: Augmentation, values: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        what(values, key=1)
