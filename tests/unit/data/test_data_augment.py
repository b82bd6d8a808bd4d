"""Augmentation: what it does to an image, and that it depends on the key alone."""

from __future__ import annotations

import numpy as np
import pytest

from distdl.data.augment.augmentation import augment

IMAGES = np.random.default_rng(0).integers(1, 255, (600, 3, 6, 5), dtype=np.uint8)


def _is_crop_of(result: np.ndarray, image: np.ndarray, padding: int) -> bool:
    padded = np.pad(image, [(0, 0), (padding, padding), (padding, padding)])
    height, width = image.shape[1:]
    return any(
        np.array_equal(result, padded[:, y : y + height, x : x + width])
        for y in range(2 * padding + 1)
        for x in range(2 * padding + 1)
    )


def test_half_of_the_images_are_mirrored_and_the_others_untouched() -> None:
    before = IMAGES.copy()
    result = augment(IMAGES, flip=True, crop_padding=0, key=3)
    mirrored = np.array([np.array_equal(r, i[..., ::-1]) for r, i in zip(result, IMAGES, strict=True)])
    same = np.array([np.array_equal(r, i) for r, i in zip(result, IMAGES, strict=True)])
    assert np.all(mirrored ^ same)
    assert 240 < mirrored.sum() < 360
    assert np.array_equal(IMAGES, before)


def test_crops_are_windows_of_the_zero_padded_image_at_every_offset() -> None:
    result = augment(IMAGES, flip=False, crop_padding=2, key=4)
    assert result.dtype == np.uint8
    assert result.shape == IMAGES.shape
    assert result.flags.c_contiguous
    assert all(_is_crop_of(r, i, 2) for r, i in zip(result[:60], IMAGES, strict=False))
    one = np.zeros((600, 5, 5), np.uint8)
    one[:, 2, 2] = 1
    y, x = np.nonzero(augment(one, False, 2, key=4).sum(axis=0))
    assert set(zip(y.tolist(), x.tolist(), strict=True)) == {(i, j) for i in range(5) for j in range(5)}


def test_an_image_is_treated_alike_with_or_without_a_channel_axis() -> None:
    grey = IMAGES[:, 0]
    with_axis = augment(grey[:, None], True, 1, key=9)
    assert np.array_equal(augment(grey, True, 1, key=9), with_axis[:, 0])


def test_the_choices_depend_on_the_key_and_the_place_alone() -> None:
    whole = augment(IMAGES, True, 2, key=5)
    assert np.array_equal(augment(IMAGES[:40], True, 2, key=5), whole[:40])
    assert not np.array_equal(augment(IMAGES, True, 2, key=6), whole)
    assert np.array_equal(augment(augment(IMAGES, True, 0, 5), False, 2, 5), whole)


def test_the_choices_never_change_between_versions() -> None:
    ramp = np.tile(np.arange(1, 10, dtype=np.uint8).reshape(3, 3), (4, 1, 1))
    assert augment(ramp, True, 1, key=2**64 - 1).reshape(4, 9).tolist() == [
        [4, 5, 6, 7, 8, 9, 0, 0, 0],
        [2, 1, 0, 5, 4, 0, 8, 7, 0],
        [0, 0, 0, 0, 3, 2, 0, 6, 5],
        [0, 0, 0, 0, 1, 2, 0, 4, 5],
    ]


def test_nothing_to_do_and_nothing_to_do_it_to() -> None:
    assert augment(IMAGES, False, 0, key=1) is IMAGES
    assert augment(IMAGES[:0], True, 2, key=1).shape == (0, 3, 6, 5)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(600, 90\)"):
        augment(IMAGES.reshape(600, 90), True, 0, key=1)
    with pytest.raises(ValueError, match="crop_padding is -1"):
        augment(IMAGES, True, -1, key=1)
