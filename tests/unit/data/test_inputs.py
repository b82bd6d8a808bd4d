"""What `distdl predict` makes of files that are not prepared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distdl.data import open_split, ready
from distdl.data.inputs import _numbers
from distdl.data.prepare.options import Options
from distdl.data.prepare.run import prepare
from distdl.errors import DataError
from distdl.samples import Field

ONE = Field("float", (3,))
"""One number a step."""


def csv(folder: Path, text: str) -> Path:
    file = folder / "mine.csv"
    file.write_text(text)
    return file


def test_a_series_beside_its_dates(tmp_path: Path) -> None:
    file = csv(tmp_path, "month,value\n2020-01,1\n2020-02,2\n2020-03,3\n2020-04,4\n")
    assert _numbers(file, ONE, recent=True).tolist() == [2, 3, 4]
    assert _numbers(csv(tmp_path, "value\n1\n2\n3\n"), ONE, recent=False).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("year,value\n2020,1\n", r"has columns year, value, of which year, value hold numbers, .* leave one"),
        ("month,name\n2020-01,x\n", "of which none hold numbers"),
        ("month,value\n2020-01,1\n2020-02,?\n", "expected a header and numbers"),
        ("month,value\n2020-01,1\n2020-02\n", "expected a header and numbers"),
        ("month,value\n", "has no rows"),
        ("", "has no rows"),
    ],
)
def test_a_file_that_is_no_series(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        _numbers(csv(tmp_path, text), ONE, recent=True)


@pytest.mark.parametrize(("grey", "shape"), [(True, [4, 5]), (False, [4, 5, 3]), (None, [4, 5, 3])])
def test_images_of_both_kinds_become_one(tmp_path: Path, grey: bool | None, shape: list[int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5), np.uint8)
    (tmp_path / "photos" / "some").mkdir(parents=True)
    Image.fromarray(pixels[0]).save(tmp_path / "photos" / "some" / "0.png")
    Image.fromarray(pixels[1]).convert("RGB").save(tmp_path / "photos" / "some" / "1.png")
    prepare(str(tmp_path / "photos"), tmp_path / "data", Options(grey=grey))
    opened = ready(None, tmp_path / "data")
    found = open_split(opened, next(iter(opened.info.rows)), ["image"]).gather(np.arange(2))["image"]
    assert list(found.shape[1:]) == shape
    first = found if grey else found[..., 0]
    assert np.array_equal(np.asarray(first), pixels)
