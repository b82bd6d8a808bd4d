"""Data that fit by their types and mean something else: refused, or read as what they are."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distdl.data.description import describe_data
from distdl.data.huggingface import class_label, feature_of, with_features
from distdl.data.inputs import _fitted, _numbers
from distdl.data.opening import open_split, ready
from distdl.data.prepare.decode import decode_classes, decode_image, image_size
from distdl.data.prepare.options import Options
from distdl.data.prepare.run import prepare
from distdl.errors import DataError
from distdl.recipe.schema import Data
from distdl.samples import Field


def rows_of(folder: Path, split: str = "train") -> dict[str, Any]:
    rows = open_split(ready(None, folder), split)
    return dict(rows.gather(np.arange(len(rows))))


def labelled(file: Path, names: list[str], labels: list[int]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([pa.field("x", pa.int64()), pa.field("label", pa.int64())])
    schema = with_features(schema, {"x": feature_of(pa.int64()), "label": class_label(names)})
    pq.write_table(pa.table({"x": range(len(labels)), "label": labels}, schema=schema), file)


# --- classes, tokens and bands of several files ---


def test_files_that_number_their_classes_otherwise(tmp_path: Path) -> None:
    labelled(tmp_path / "in" / "train.parquet", ["cat", "dog"], [0, 1])
    labelled(tmp_path / "in" / "test.parquet", ["dog", "cat"], [0, 1])
    says = r"'label' has classes cat, dog in train\.parquet and dog, cat in test\.parquet"
    with pytest.raises(DataError, match=says):
        prepare(str(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(DataError, match=says):
        ready(None, tmp_path / "in")
    labelled(tmp_path / "in" / "test.parquet", ["cat", "dog"], [1])
    assert rows_of(prepared(tmp_path), "test")["label"].tolist() == [1]


def prepared(folder: Path, **options: Any) -> Path:
    prepare(str(folder / "in"), folder / "out", Options(**options))
    return folder / "out"


def mixture(*folders: Path) -> Data:
    return Data(mixture={str(folder): 1 / len(folders) for folder in folders})


def test_a_mixture_whose_parts_number_their_classes_otherwise(tmp_path: Path) -> None:
    labelled(tmp_path / "a" / "in" / "train.parquet", ["cat", "dog"], [0, 1])
    labelled(tmp_path / "b" / "in" / "train.parquet", ["cow", "dog"], [0, 1])
    parts = [prepared(tmp_path / name) for name in "ab"]
    with pytest.raises(DataError, match=r"calls class 0 'cat' in .*a/out and 'cow' in .*b/out"):
        describe_data(mixture(*parts))


def test_a_mixture_of_two_tokenizers_of_one_size(tmp_path: Path) -> None:
    for name, words in (("a", "one two"), ("b", "two three")):
        (tmp_path / name / "in").mkdir(parents=True)
        (tmp_path / name / "in" / "train.txt").write_text(f"{words}\n{words}\n")
    made: dict[str, Any] = {"tokenize": ("text",), "tokenizer": "word"}
    parts = [prepared(tmp_path / name, **made) for name in "ab"]
    with pytest.raises(DataError, match=r"numbers of column 'text' mean other things .*--tokenizer .*a/out"):
        describe_data(mixture(*parts))
    prepare(str(tmp_path / "b" / "in"), tmp_path / "alike", Options(**made | {"tokenizer": str(parts[0])}))
    assert describe_data(mixture(parts[0], tmp_path / "alike")).rows["train"] == 4


# --- folders and tables ---


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["train/0.png", "test/0.png"], "without a folder for their class"),
        (["a/0.png", ".ipynb_checkpoints/0.png", "__MACOSX/a.png", "b/0.png"], None),
    ],
)
def test_folders_that_are_no_classes(files: list[str], says: str | None, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "in" / name)
    if says is None:
        assert ready(None, prepared(tmp_path)).info.fields["label"].classes == ("a", "b")
        return
    with pytest.raises(DataError, match=says):
        prepared(tmp_path)


def test_numbers_in_csv_are_classes_in_the_order_of_numbers(tmp_path: Path) -> None:
    """As those of other formats are, so that one dataset has one numbering."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.csv").write_text("x,code\n1,10\n2, 9\n3,-1\n")
    assert ready(None, prepared(tmp_path, classes=("code",))).info.fields["code"].classes == ("-1", "9", "10")
    (tmp_path / "in" / "train.csv").write_text("x,code\n1,1.5\n2,2\n")
    with pytest.raises(DataError, match=r"--classes code: the column has numbers such as 1\.5"):
        prepare(str(tmp_path / "in"), tmp_path / "other", Options(classes=("code",)))


def test_a_column_that_is_left_out_may_be_anything(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.jsonl").write_text('{"n": 1, "meta": "a"}\n{"n": 2, "meta": {"b": 1}}\n')
    assert rows_of(prepared(tmp_path, columns=("n",)))["n"].tolist() == [1, 2]


def test_codes_in_csv_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.csv").write_text("x,code,said\n1,007,10\n2,7,010\n3,0070,1e5\n")
    made = prepared(tmp_path, classes=("code",), tokenize=("said",), tokenizer="word", min_count=1)
    found = ready(None, made).info
    assert found.fields["code"].classes == ("007", "0070", "7")
    rows = rows_of(made)
    assert rows["code"].tolist() == [0, 2, 1]
    assert found.decode is not None
    assert [found.decode(rows["said"].rows(i, i + 1).values.tolist()) for i in range(3)] == [
        "10",
        "010",
        "1e5",
    ]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("train.csv", "x,y,label\n0.1,0.2,0,a\n", "rows with one field more than its header"),
        ("train.jsonl", '{"text": "hello"}\n{"text": 5}\n', "'text' has values of several types"),
    ],
)
def test_tables_whose_rows_do_not_fit_together(name: str, text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text(text)
    with pytest.raises(DataError, match=says):
        prepared(tmp_path)


def test_a_mark_at_the_beginning_of_a_text_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.txt").write_bytes(b"\xef\xbb\xbfhello\nworld\n")
    made = prepared(tmp_path, tokenize=("text",), tokenizer="space", min_count=1)
    decode = ready(None, made).info.decode
    assert decode is not None
    assert decode(rows_of(made)["text"].values.tolist()) == "hello world"


def test_metadata_whose_first_line_lacks_a_key_and_truth_values(tmp_path: Path) -> None:
    for split in ("test", "train"):
        (tmp_path / "in" / split).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "in" / split / f"{i}.png")

    def write(split: str, rows: list[dict[str, Any]]) -> None:
        lines = [json.dumps({"file_name": f"{i}.png", **row}) for i, row in enumerate(rows)]
        (tmp_path / "in" / split / "metadata.jsonl").write_text("\n".join(lines))

    write("test", [{"label": 0}, {"label": 1}, {"label": 0}])
    write("train", [{}, {"label": 1}, {"label": 2}])
    with pytest.raises(DataError, match="'label' has a null"):
        prepared(tmp_path)
    write("test", [{"label": 0}, {"label": 1}, {"label": 0}])
    write("train", [{"label": 1}, {"label": 1, "note": "blurred"}, {"label": 2}])
    assert rows_of(prepared(tmp_path, columns=("image", "label")))["label"].tolist() == [1, 1, 2]
    with pytest.raises(DataError, match="'note' has a null"):
        prepared(tmp_path, overwrite=True)
    write("test", [{"label": True}, {"label": False}, {"label": True}])
    write("train", [{"label": 0}, {"label": 1}, {"label": 2}])
    with pytest.raises(DataError, match=r"'label': it is int64; it is bool in another split"):
        prepared(tmp_path, overwrite=True)


def test_two_problems_of_series_in_one_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("X", "Y"):
        (tmp_path / "in" / f"{name}_TRAIN.ts").write_text("@classLabel true a b\n@data\n1,2:a\n")
    with pytest.raises(DataError, match=r"several series files of split 'train': X_TRAIN\.ts, Y_TRAIN\.ts"):
        prepared(tmp_path)


def test_lists_of_the_view_kind_keep_their_rows(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    lists = [[1], [], [2, 3], [], []]
    views = pa.array(lists, pa.large_list_view(pa.int32()))
    pq.write_table(pa.table({"x": views}), tmp_path / "in" / "train.parquet")
    found = rows_of(prepared(tmp_path))["x"]
    assert [found.rows(i, i + 1).values.tolist() for i in range(5)] == lists


def test_dictionaries_in_row_groups_of_several_shards(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    words = [f"w{i % 7}" for i in range(600)]
    table = pa.table({"x": pa.array(words).dictionary_encode(), "n": range(600)})
    pq.write_table(table, tmp_path / "in" / "train.parquet", row_group_size=300)
    rows = rows_of(prepared(tmp_path, shards=10, classes=("x",)))
    assert rows["x"].tolist() == [i % 7 for i in range(600)]
    assert rows["n"].tolist() == list(range(600))


# --- images ---


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_a_photo_is_upright_as_it_is_shown() -> None:
    """Turned by its Exif data, as viewers do it, and so as its boxes and masks were drawn."""
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right: what is left comes to the top
    data = encoded(Image.fromarray(pixels), "PNG", exif=exif)
    found = decode_image(data, "it", grey=True)
    assert found.shape == image_size(data, "it") == (16, 8)
    assert (found[:8] == 255).all()
    assert (found[8:] == 0).all()
    assert decode_classes(data, "it").shape == (16, 8)
    assert decode_image(encoded(Image.fromarray(pixels), "PNG"), "it", grey=True).shape == (8, 16)
    for kind in ("TIFF", "WEBP"):
        other = encoded(Image.fromarray(pixels), kind, exif=exif)
        assert decode_image(other, "it", grey=False).shape[:2] == image_size(other, "it") == (16, 8)
    damaged = encoded(Image.fromarray(pixels), "JPEG", exif=b"Exif\x00\x00damaged")
    assert decode_image(damaged, "it", grey=True).shape == image_size(damaged, "it") == (8, 16)


@pytest.mark.parametrize("kind", ["PNG", "PPM", "TIFF"])
def test_images_of_sixteen_bits_keep_their_upper_eight(kind: str) -> None:
    deep = (np.array([[0, 40, 128, 255]]) * 256 + 9).astype(np.uint16)
    found = decode_image(encoded(Image.fromarray(deep), kind), "it", grey=True)
    assert found.tolist() == [[0, 40, 128, 255]]


def test_images_of_32_bits_are_whole_numbers_of_eight() -> None:
    fits = encoded(Image.fromarray(np.array([[0, 255]], np.float32)), "TIFF")
    assert decode_image(fits, "it", grey=True).tolist() == [[0, 255]]
    for wrong in (np.array([[0, 0.5]], np.float32), np.array([[0, 70_000]], np.int32)):
        with pytest.raises(
            DataError, match=r"it is an image of 32-bit numbers from 0\S* to \S+; expected whole"
        ):
            decode_image(encoded(Image.fromarray(wrong), "TIFF"), "it", grey=True)


def test_masks_that_blend_and_inputs_of_other_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it is a JPEG, which blends"):
        decode_classes(encoded(Image.fromarray(np.zeros((8, 8), np.uint8)), "JPEG"), "it")
    with pytest.raises(DataError, match="'image' of the input is float32; the model was trained on uint8"):
        _fitted("image", np.zeros((1, 2, 2), np.float32), Field("uint8", (2, 2)))
    found = _fitted("image", np.full((1, 2, 2), 255), Field("uint8", (2, 2)))
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.uint8
    with (tmp_path / "series.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[1], [2], [3]])
    with pytest.raises(DataError, match="begins with numbers; expected a header"):
        _numbers(tmp_path / "series.csv", Field("float", (3,)), recent=False)
