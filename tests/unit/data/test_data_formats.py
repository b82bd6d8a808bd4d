"""Every layout that `distdl data prepare` reads: what comes out of it, and what is refused in which words."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distdl.data import open_split, ready
from distdl.data.index import Index, read_index, resolve
from distdl.data.prepare.decode import encode_classes
from distdl.data.prepare.idx import read_idx
from distdl.data.prepare.options import Options
from distdl.data.prepare.run import prepare
from distdl.data.stream import hub
from distdl.errors import DataError


def rows(out: Path, index: Index, split: str = "train") -> dict[str, list[Any]]:
    """All rows of a split, read with pyarrow alone."""
    tables = []
    for shard in index.splits[split].shards:
        with pa.memory_map(resolve(out, shard.file)) as mapped, pa.ipc.open_stream(mapped) as reader:
            tables.append(reader.read_all())
    found: dict[str, list[Any]] = pa.concat_tables(tables).to_pydict()
    return found


def made(source: Path, tmp_path: Path, **options: Any) -> tuple[Index, dict[str, list[Any]]]:
    out = tmp_path / "made"
    index = prepare(str(source), out, Options(**options))
    return index, rows(out, index)


def folder(tmp_path: Path, **files: str) -> Path:
    """A folder of text files; `__` in a keyword stands for the dot."""
    base = tmp_path / "source"
    base.mkdir()
    for name, text in files.items():
        (base / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return base


def test_csv_with_classes(tmp_path: Path) -> None:
    source = folder(
        tmp_path, train__csv="text,label\nhello there,pos\nbye,neg\n", test__csv="text,label\nx,odd\n"
    )
    index, found = made(source, tmp_path, classes=("label",), rename={"text": "words"})
    assert index.columns["label"].classes == ("neg", "odd", "pos")
    assert found == {"words": ["hello there", "bye"], "label": [2, 0]}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"train__tsv": "a\tb\n1\t2.5\n"}, {"a": [1], "b": [2.5]}),
        ({"train__jsonl": '{"x": [1, 2]}\n{"x": []}\n'}, {"x": [[1, 2], []]}),
        ({"train__txt": "one, line\n\nand two\n"}, {"text": ["one, line", "", "and two"]}),
        (
            {"train__en": "a b\nc\u2028d\n", "train__de": "x\ny\r\n"},
            {"de": ["x", "y"], "en": ["a b", "c\u2028d"]},
        ),
    ],
    ids=["tsv", "jsonl", "text", "parallel"],
)
def test_text_files(files: dict[str, str], expected: dict[str, Any], tmp_path: Path) -> None:
    assert made(folder(tmp_path, **files), tmp_path)[1] == expected


def test_one_file_is_split_train(tmp_path: Path) -> None:
    source = folder(tmp_path, my_notes__txt="one\n", other__csv="a\n1\n")
    assert made(source / "my_notes.txt", tmp_path)[1] == {"text": ["one"]}


TS = "# made up\n@problemName X\n@timeStamps false\n@classLabel true a b\n@data\n"


def test_ts_of_one_length_is_fixed(tmp_path: Path) -> None:
    source = folder(tmp_path, X_TRAIN__ts=TS + "1,2,3:b\n4,5,6:a\n", X_TEST__ts=TS + "7,8,9:a\n")
    index, found = made(source, tmp_path)
    assert found == {"series": [[1, 2, 3], [4, 5, 6]], "label": [1, 0]}
    assert index.columns["series"].shape == (3,)
    assert index.columns["label"].classes == ("a", "b")
    assert index.splits["test"].rows == 1


def test_ts_of_several_lengths_and_dimensions(tmp_path: Path) -> None:
    source = folder(tmp_path, X_TRAIN__ts=TS + "1,2,3:4,5,6:b\n1,2:3,4:a\n")
    index, found = made(source, tmp_path)
    assert found["series"] == [[[1, 4], [2, 5], [3, 6]], [[1, 3], [2, 4]]]
    assert index.columns["series"].shape == (None, 2)
    assert index.splits["train"].offsets["series"].longest == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1,2:a\n", "no line '@data'"),
        (TS + "1,?:a\n", r"X_TRAIN\.ts, line 6: .*missing value"),
        (TS + "1,2:c\n", r"line 6: class 'c' is not among those named: \['a', 'b'\]"),
        (TS + "1,2:3:a\n", r"its dimensions have lengths \[2, 1\]"),
        (TS + "1,nan:a\n", "missing or infinite"),
        (TS, "holds no series"),
    ],
)
def test_a_bad_ts_file_is_named_with_its_line(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        made(folder(tmp_path, X_TRAIN__ts=text), tmp_path)


def write_images(base: Path, **shapes: tuple[int, ...]) -> Path:
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        file = base / (name.replace("__", "/") + ".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, shape, np.uint8)).save(file)
    return base


def test_an_image_folder(tmp_path: Path) -> None:
    shapes = {"train__dog__0": (4, 3, 3), "train__cat__0": (4, 3, 3), "test__dog__0": (4, 3, 3)}
    source = write_images(tmp_path / "source", **shapes)
    index, found = made(source, tmp_path)
    assert index.columns["image"].shape == (4, 3, 3)
    assert found["label"] == [0, 1]
    first = np.asarray(Image.open(source / "train" / "cat" / "0.png"))
    assert np.array_equal(found["image"][0], first)
    assert index.splits["test"].rows == 1


def test_grey_images_stay_grey_and_mixed_ones_become_rgb(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", a__0=(4, 3), b__0=(4, 3))
    assert made(source, tmp_path)[0].columns["image"].shape == (4, 3)
    write_images(source, b__1=(4, 3, 3), b__2=(4, 3, 4))
    index = prepare(str(source), tmp_path / "mixed")
    assert index.columns["image"].shape == (4, 3, 3)


def test_images_of_two_sizes_need_image_size(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", a__0=(4, 3), a__1=(4, 3), a__2=(5, 6))
    with pytest.raises(
        DataError, match=r"in row 0 .* is 4x3 .* in row 2 of split 'train' 5x6.*--image-size 4x3"
    ):
        made(source, tmp_path)
    assert made(source, tmp_path, image_size=(2, 7))[0].columns["image"].shape == (2, 7)


def encoded(image: Image.Image) -> dict[str, Any]:
    out = io.BytesIO()
    image.save(out, "png")
    return {"bytes": out.getvalue(), "path": None}


def write_objects(folder: Path, mask: Image.Image, boxes: Any) -> Path:
    """One row: an image of 8x4 (height x width), its mask, and its boxes."""
    file = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "image": pa.array([encoded(Image.new("L", (4, 8)))], file),
        "mask": pa.array([encoded(mask)], file),
        "boxes": pa.array([boxes]),
    }
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return folder


@pytest.mark.parametrize("mode", ["L", "P"])
def test_masks_and_boxes_are_resized_as_their_image_and_stay_classes(mode: str, tmp_path: Path) -> None:
    numbers = np.kron([[0, 9], [200, 3]], np.ones((4, 2))).astype(np.uint8)
    mask = Image.fromarray(numbers)
    if mode == "P":
        mask = Image.open(io.BytesIO(encode_classes(numbers)))
        assert mask.mode == "P"
    source = write_objects(tmp_path / "source", mask, [[0, 2, 3, 8], [1, 1, 2, 2]])
    index, found = made(source, tmp_path, image_size=(12, 12), masks=("mask",), boxes=("boxes",))
    assert index.columns["mask"].shape == (12, 12)
    assert np.array_equal(found["mask"][0], np.kron([[0, 9], [200, 3]], np.ones((6, 6))))
    assert found["boxes"][0] == [[0, 3, 9, 12], [3, 1.5, 6, 3]]
    assert (index.columns["boxes"].dtype, index.columns["boxes"].shape) == ("float", (None, 4))
    shutil.rmtree(tmp_path / "made")
    found = made(source, tmp_path, masks=("mask",), boxes=("boxes",))[1]  # as large as they are
    assert np.array_equal(found["mask"][0], numbers)
    assert found["boxes"][0] == [[0, 2, 3, 8], [1, 1, 2, 2]]


@pytest.mark.parametrize(
    ("mode", "boxes", "options", "says"),
    [
        ("RGB", [[0, 0, 1, 1]], {"masks": ("mask",)}, r"mode RGB; a mask is a class number"),
        ("L", [[0, 0, 1]], {"boxes": ("boxes",)}, r"--boxes boxes: row 0 of split 'train' has .*four"),
        ("L", [[0, 0, 1, 1]], {"masks": ("boxes",)}, r"--masks boxes: column 'boxes' does not hold"),
        (
            "L",
            [[0, 0, 1, 1]],
            {"boxes": ("boxes",), "image_size": (4, 4)},
            r"2 columns of images: image, mask; .*--masks",
        ),
    ],
)
def test_what_is_no_mask_or_box_is_named(
    mode: str, boxes: Any, options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    source = write_objects(tmp_path / "source", Image.new(mode, (4, 8)), boxes)
    with pytest.raises(DataError, match=says):
        made(source, tmp_path, **options)


def test_a_size_beyond_the_sample_is_named_by_row(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 9, (2, 2) if n != 300 else (2, 3), np.uint8) for n in range(1000)]
    (tmp_path / "source" / "a").mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "source" / "a" / f"{number:04d}.png")
    with pytest.raises(DataError, match=r"row 300 of split 'train' 2x3"):
        made(tmp_path / "source", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", a__0=(40, 30), a__1=(40, 30))
    data = (source / "a" / "1.png").read_bytes()
    (source / "a" / "1.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"row 1 of split 'train' \(.*1\.png\) is a damaged image"):
        made(source, tmp_path)


def _idx(array: Any) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_idx(base: Path) -> Path:
    base.mkdir()
    for split, count in [("train", 50), ("t10k", 20)]:
        images = np.random.default_rng(count).integers(0, 255, (count, 28, 28), np.uint8)
        (base / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(_idx(images)))
        (base / f"{split}-labels-idx1-ubyte").write_bytes(_idx(np.arange(count) % 10))
    return base


def test_idx_files_under_a_catalogue_name_get_its_class_names(tmp_path: Path) -> None:
    source = write_idx(tmp_path / "idx")
    index = prepare("fashion_mnist", tmp_path / "out", local=source)
    assert index.name == "fashion_mnist"
    found = rows(tmp_path / "out", index, "test")
    assert np.array_equal(found["image"], read_idx(source / "t10k-images-idx3-ubyte.gz"))
    assert found["label"] == [n % 10 for n in range(20)]
    assert (index.columns["label"].classes or ())[9] == "Ankle boot"
    assert index.columns["image"].shape == (28, 28)
    plain = prepare(str(source), tmp_path / "plain")
    assert (plain.columns["label"].classes or ())[9] == "9"


def test_idx_files_that_do_not_fit(tmp_path: Path) -> None:
    source = write_idx(tmp_path / "idx")
    (source / "t10k-labels-idx1-ubyte").write_bytes(_idx(np.arange(3)))
    with pytest.raises(DataError, match=r"the test files hold images \(20, 28, 28\) uint8 and labels \(3,\)"):
        prepare(str(source), tmp_path / "out")
    (source / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="has no t10k-labels-idx1-ubyte"):
        prepare(str(source), tmp_path / "out")


def test_what_datasets_saved_and_every_feature_that_has_a_shape(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {
            "m": datasets.Array2D((2, 3), "float32"),
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["a", "b"]),
            "fixed": datasets.Sequence(datasets.Value("int16"), length=2),
            "free": datasets.Sequence(datasets.Value("int16")),
        }
    )
    columns = {
        "m": [np.full((2, 3), n, np.float32) for n in range(5)],
        "image": [Image.fromarray(np.full((3, 3), n, np.uint8)) for n in range(5)],
        "label": [0, 1, 0, 1, 0],
        "fixed": [[n, n] for n in range(5)],
        "free": [[7, 7]] * 5,
    }
    saved = datasets.Dataset.from_dict(columns, features=features)
    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "saved", num_shards={"train": 2})
    datasets.enable_progress_bars()
    index, found = made(tmp_path / "saved", tmp_path)
    shapes = {name: column.shape for name, column in index.columns.items()}
    # Lists that happen to have one length stay variable: only a feature says that they always will.
    assert shapes == {"m": (2, 3), "image": (3, 3), "label": (), "fixed": (2,), "free": (None,)}
    assert np.array_equal(found["m"], columns["m"])
    again = datasets.load_from_disk(str(tmp_path / "made"))["train"]
    assert again.features["label"].names == ["a", "b"]
    assert np.array_equal(again[:]["image"], found["image"])


def test_classes_of_lists_have_their_names(tmp_path: Path) -> None:
    import datasets

    label = datasets.ClassLabel(names=["cup", "plate"])
    objects = datasets.Sequence({"category": label, "size": datasets.Value("int16")})
    inner = {"feature": label, "n": datasets.Value("int16")}  # named as what a list's feature has
    features = datasets.Features({"tags": datasets.Sequence(label), "objects": objects, "one": inner})
    columns = {
        "tags": [[0, 1], [1]],
        "objects": [{"category": [1], "size": [3]}, {"category": [0, 0], "size": [3, 4]}],
        "one": [{"feature": 1, "n": 2}] * 2,
    }
    datasets.disable_progress_bars()
    saved = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "d")
    datasets.enable_progress_bars()
    index, _ = made(tmp_path / "d", tmp_path)
    names = {name: column.classes for name, column in index.columns.items()}
    named = dict.fromkeys(("tags", "objects.category", "one.feature"), ("cup", "plate"))
    assert names == {**named, "objects.size": None, "one.n": None}
    # An index that was written before they were read is not refused.
    bare = {name: column.model_copy(update={"classes": None}) for name, column in index.columns.items()}
    out = tmp_path / "made"
    (out / "index.json").write_text(index.model_copy(update={"columns": bare}).to_json())
    tags = open_split(ready(None, out), "train", ["tags"]).gather(np.arange(2))["tags"]
    assert tags.tolist() == [[0, 1], [1]]


def test_ragged_where_a_feature_promises_a_shape(tmp_path: Path) -> None:
    features = {"m": {"shape": [2, 2], "dtype": "int64", "_type": "Array2D"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"m": [[[1, 2], [3, 4]], [[1, 2], [3]]]}).replace_schema_metadata(metadata)
    (tmp_path / "d").mkdir()
    pq.write_table(table, tmp_path / "d" / "train.parquet")
    with pytest.raises(
        DataError, match=r"column 'm' is ragged .*\[2, 2\].* row 1 of split 'train' has a list of 1"
    ):
        made(tmp_path / "d", tmp_path)


@pytest.mark.parametrize("column", [[1, None, 3], [[1], [None], [2]], [{"a": 1}, {"a": None}, {"a": 1}]])
def test_a_null_is_named_by_column_and_row(column: list[Any], tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"x": column, "y": [1, 2, 3]}), tmp_path / "d" / "train.parquet")
    with pytest.raises(DataError, match=r"column 'x' has a null, first in row 1 of split 'train'"):
        made(tmp_path / "d", tmp_path)
    assert made(tmp_path / "d", tmp_path, columns=("y",))[1] == {"y": [1, 2, 3]}


TEXT = "the cat sat\nthe cat, the dog\n" * 3


@pytest.mark.parametrize("kind", ["word", "space", "bpe"])
def test_a_trained_tokenizer_sees_only_the_train_split(kind: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    source = folder(tmp_path, train__txt=TEXT, test__txt="the zebra\n")
    index, found = made(source, tmp_path, tokenize=("text",), tokenizer=kind, vocab_size=270)
    tokenizer = Tokenizer.from_file(str(tmp_path / "made" / "tokenizer.json"))
    assert [tokenizer.token_to_id(t) for t in ("<pad>", "<unk>", "<bos>", "<eos>")] == [0, 1, 2, 3]
    assert found["text"][0] == tokenizer.encode("the cat sat").ids
    assert index.columns["text"].dtype == "int32"
    assert "tokenizer.json" in [file.file for file in index.others]
    test = rows(tmp_path / "made", index, "test")["text"][0]
    assert (1 in test) == (kind != "bpe")
    if kind == "space":
        assert tokenizer.token_to_id("cat,") is not None
    again = prepare(str(source), tmp_path / "b", Options(tokenize=("text",), tokenizer=kind, vocab_size=270))
    assert again.others == index.others


def test_an_existing_tokenizer_and_max_tokens(tmp_path: Path) -> None:
    source = folder(tmp_path, train__txt=TEXT)
    made(source, tmp_path, tokenize=("text",), tokenizer="word")
    said: list[str] = []
    tokenizer = str(tmp_path / "made" / "tokenizer.json")
    options = Options(tokenize=("text",), tokenizer=tokenizer, max_tokens=3)
    index = prepare(str(source), tmp_path / "b", options, say=said.append)
    assert said == ["train: 3 of 6 rows had more than 3 tokens and were cut"]
    assert index.splits["train"].offsets["text"].longest == 3
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == Path(tokenizer).read_bytes()
    with pytest.raises(DataError, match="cannot load the tokenizer"):
        (tmp_path / "bad.json").write_text("{}")
        prepare(
            str(source), tmp_path / "c", Options(tokenize=("text",), tokenizer=str(tmp_path / "bad.json"))
        )


def test_a_prepared_dataset_can_be_a_source(tmp_path: Path) -> None:
    source = folder(tmp_path, train__csv="a\n1\n2\n3\n")
    made(source, tmp_path)
    index = prepare(str(tmp_path / "made"), tmp_path / "again", Options(shards=3))
    assert rows(tmp_path / "again", index) == {"a": [1, 2, 3]}
    assert len(index.splits["train"].shards) == 3


@pytest.mark.parametrize(
    ("files", "options", "says"),
    [
        ({}, {}, r"has no known layout. Found nothing. Accepted are\n.*train\*\.parquet"),
        ({"train__csv": "a\n1\n", "train__txt": "x"}, {}, "could be read as csv and text"),
        ({"train__csv": "a\n1\n"}, {"columns": ("b",)}, r"no column 'b'.*Its columns: a"),
        ({"train__csv": "a,b\n1,2\n"}, {"rename": {"a": "b"}}, "two columns would have one name"),
        ({"train__jsonl": '{"a": 1}\n'}, {"tokenize": ("a",), "tokenizer": "word"}, "type int64; only text"),
        ({"train__jsonl": '{"a": 1.5}\n'}, {"classes": ("a",)}, "type double; expected text or integers"),
        ({"train__csv": "a\n1\n"}, {"image_size": (2, 2)}, "no column of encoded images"),
        ({"train__csv": "a\n1\n"}, {"holdout": {"v": 0.1}}, "leaves no row for split v"),
        ({"train__csv": "a\n1\n"}, {"holdout": {"v": 1.5}}, "fractions above 0"),
        ({"train__csv": "a\n"}, {}, "no rows"),
        (
            {"test__txt": "x\n"},
            {"tokenize": ("text",)},
            "trained on split 'train', and there is none among test",
        ),
        ({"train__en": "a\nb\n", "train__de": "a\n"}, {}, r"train\.de ends after 1 lines"),
        ({"train__en": "a", "train__de": "a", "test__en": "a", "test__fr": "a"}, {}, "different languages"),
    ],
)
def test_refusals(files: dict[str, str], options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)" + says):
        made(folder(tmp_path, **files), tmp_path, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_hub_out_of_reach_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import distdl.data.prepare.sources as module

    monkeypatch.setattr(module, "refusal", lambda: "no route in this test")
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"nobody/nothing.*does not answer.*--from FOLDER.*copy the folder"):
        prepare("nobody/nothing", tmp_path / "out")
    assert time.perf_counter() - start < 10
    assert list(tmp_path.iterdir()) == []


def test_the_probe_of_the_hub_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(hub, "PROBE_S", 0.2)
    out_of_reach(monkeypatch)
    assert "127.0.0.1:9 cannot be reached from this machine" in hub.refusal()

    def hang(*_: object, **__: object) -> None:
        release.wait(60)
        raise OSError

    with monkeypatch.context() as slow:  # looking up a name has no time limit of its own
        slow.setattr(hub.socket, "create_connection", hang)
        start = time.perf_counter()
        assert "no answer within 0.2 s" in hub.refusal()
        assert time.perf_counter() - start < 10
        release.set()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.refusal() == "HF_HUB_OFFLINE is set"


def out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens on the discard port


def test_a_tokenizer_on_a_hub_out_of_reach_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_reach(monkeypatch)
    source = folder(tmp_path, train__txt=TEXT)
    start = time.perf_counter()
    with pytest.raises(
        DataError, match=r"'nobody/nothing'.*127\.0\.0\.1:9 cannot be reached.*Copy its tokeni"
    ):
        prepare(str(source), tmp_path / "out", Options(tokenize=("text",), tokenizer="nobody/nothing"))
    assert time.perf_counter() - start < 10


def test_an_edited_tokenizer_is_another_job(tmp_path: Path) -> None:
    source = folder(tmp_path, train__txt=TEXT)
    made(source, tmp_path, tokenize=("text",), tokenizer="word")
    (tmp_path / "tok").mkdir()
    file = tmp_path / "tok" / "tokenizer.json"
    file.write_bytes((tmp_path / "made" / "tokenizer.json").read_bytes())
    for given in (str(file), str(file.parent)):
        out = tmp_path / f"of-{Path(given).name}"
        options = Options(tokenize=("text",), tokenizer=given)
        said: list[str] = []
        prepare(str(source), out, options, say=said.append)
        prepare(str(source), out, options, say=said.append)
        assert [text.split(" is ")[1].startswith("there already") for text in said] == [True]
        edited = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = edited["model"]["vocab"]
        edited["model"]["vocab"] = {word: i + 100 for word, i in vocabulary.items()}
        file.write_text(json.dumps(edited), encoding="utf-8")
        with pytest.raises(DataError, match="exists already"):
            prepare(str(source), out, options)
        before = rows(out, read_index(out))["text"]
        prepare(str(source), out, replace(options, overwrite=True))
        assert rows(out, read_index(out))["text"] == [[i + 100 for i in row] for row in before]


def test_the_separator_is_that_of_each_file(tmp_path: Path) -> None:
    source = folder(
        tmp_path, train_0__csv="a,b\n1,x\n", train_1__tsv="a\tb\n2\ty\n", test__tsv="a\tb\n3\tz\n"
    )
    index, found = made(source, tmp_path)
    assert found == {"a": [1, 2], "b": ["x", "y"]}
    assert rows(tmp_path / "made", index, "test") == {"a": [3], "b": ["z"]}


def test_a_missing_compressed_shard_is_named(tmp_path: Path) -> None:
    source = folder(tmp_path)
    for number in (0, 2):
        name = f"train-{number:05d}-of-00003.csv.gz"
        (source / name).write_bytes(gzip.compress(f"a\n{number}\n".encode()))
    with pytest.raises(DataError, match=r"shards \[1\] are missing"):
        made(source, tmp_path)
    (source / "train-00001-of-00003.csv.gz").write_bytes(gzip.compress(b"a\n1\n"))
    assert made(source, tmp_path)[1] == {"a": [0, 1, 2]}


def test_neither_a_folder_nor_an_id(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist, and it is no catalogue name or hub id"):
        prepare(str(tmp_path / "nothing"), tmp_path / "out")
