"""Data that are not what they should be: exit code 5, the file, row or column by name, and the way out."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from distdl import errors
from distdl.cli import commands
from distdl.data.index import Index, read_index
from tests.commands import distdl
from tests.faults.mounts import small_disk
from tests.multiprocess.sequences import VOCABULARY, make, sequences, write_source

# A process for each case: a minute and a half in all.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests.multiprocess.sequences"
SPLITS = ("train", "test")
SHARD = "train/data-00001-of-00003.arrow"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a` and `b` of the same columns, `fewer` without one of them, `images` of floats, `uneven` ones; each
    with `source` (Parquet) and `data` (prepared)."""
    folder = tmp_path_factory.mktemp("bad_data")
    fewer = sequences(40, 4, 0)
    del fewer["series"]
    pixels = pa.array(np.zeros(60 * 16 * 16, np.float32))
    floats = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(pixels, 16), 16)
    uneven = pa.array(
        [[[1] * 16] * (15 if row == 7 else 16) for row in range(60)], pa.list_(pa.list_(pa.uint8()))
    )
    labels = ["cat", "dog"] * 30
    for name, columns in {
        "a": sequences(60, 0, 0),
        "b": sequences(40, 2, 0),
        "fewer": fewer,
        "images": {"image": floats, "label": labels},
        "uneven": {"image": uneven, "label": labels},
    }.items():
        make(folder / name, dict.fromkeys(SPLITS, columns), classes=("label",))
    return folder


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    """A command in this process: (exit code, all that it printed)."""
    monkeypatch.setenv("DISTDL_CACHE", str(tmp_path / "cache"))

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["distdl", *map(str, words)])
        code = commands.run()
        return code, "".join(capfd.readouterr())

    return run


def recipe(folder: Path, data: dict[str, Any], **changes: dict[str, Any]) -> Path:
    """A recipe on sequences; `task` and `model` are replaced where given, other sections changed."""
    sections: dict[str, Any] = {
        "task": {"name": f"{HERE}:Ids"},
        "model": {"name": "examples.own_sequences.task:Pooled", "vocab_size": VOCABULARY},
        "data": data,
        "batch": {"global": 24, "micro": 4},
        "optim": {"name": "sgd", "lr": 0.1},
        "train": {"max_steps": 3},
        "hardware": {"threads": 1, "device": "cpu"},
        "run": {"dir": str(folder / "run")},
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def images(folder: Path, data: dict[str, Any]) -> Path:
    model = {"name": "cnn5", "width": 4, "hidden": 16}
    return recipe(folder, data, task={"name": "image_classification"}, model=model)


def train(path: Path) -> tuple[int, str]:
    """`distdl train`, in a process of its own: it sets up handlers and threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTDL_CACHE", str(path.parent / "cache"))
        return distdl("train", str(path), cwd=ROOT)


def assert_says(result: tuple[int, str], *words: object, code: int = errors.DATA) -> None:
    assert result[0] == code, result[1]
    for word in words:
        assert str(word) in result[1]
    assert "Traceback" not in result[1]


# --- columns ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--columns", "tokens,labell"], ["'labell'; did you mean 'label'?", "id, tokens, series"]),
        (["--rename", "token=words"], ["'token'; did you mean 'tokens'?"]),
        (["--tokenize", "text"], ["no column 'text'", "Its columns: id, tokens"]),
        (["--tokenize", "tokens"], ["'tokens'", "only text can be tokenised"]),
        (["--classes", "lable"], ["'lable'; did you mean 'label'?"]),
    ],
)  # fmt: skip
def test_prepare_names_a_column_that_is_missing_or_of_another_type(
    options: list[str], words: list[str], sound: Path, call: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert_says(
        call("data", "prepare", sound / "a" / "source", "--out", out, "--workers", 1, *options), *words
    )
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("key", ["tokens", "label"])
def test_a_task_that_asks_for_another_column(key: str, sound: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, {"path": str(sound / "a" / "data")}, task={"name": f"{HERE}:Ids", key: f"{key}s"})
    assert_says(train(path), f"column '{key}s'", f"did you mean '{key}'?", "section task", "--rename")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"), [("images", "float [16 x 16]"), ("uneven", "uint8 [varies x varies]")]
)
def test_images_of_another_type_or_of_several_sizes(
    name: str, shape: str, sound: Path, tmp_path: Path
) -> None:
    path = images(tmp_path, {"path": str(sound / name / "data")})
    assert_says(train(path), "uint8 image column", f"image ({shape})", "distdl data prepare", "--image-size")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("column", "augment", "expected"),
    [
        ("tokens", {"jitter": 0.1}, "floats"),
        ("series", {"token_dropout": 0.1}, "integers"),
        ("tokens", {"token_dropout": 0.1, "token_dropout_id": 10**12}, "1000000000000 does not fit"),
    ],
)
def test_an_augmentation_of_another_type(
    column: str, augment: dict[str, Any], expected: str, sound: Path, tmp_path: Path
) -> None:
    data = {"path": str(sound / "a" / "data"), "sequence": column, "augment": augment}
    assert_says(
        train(recipe(tmp_path, data)),
        f"column '{column}'",
        "int32" if column == "tokens" else "float32",
        expected,
    )


def fixed_images(folder: Path) -> Path:
    """Parquet whose feature promises 16 x 16 pixels; row 7 of split train has 15 lines."""
    image = {"shape": [16, 16], "dtype": "uint8", "_type": "Array2D"}
    features = {"image": image, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    about = json.dumps({"info": {"features": features}})
    rows = [[[1] * 16] * (15 if row == 7 else 16) for row in range(20)]
    write_source(folder, {})
    for split in SPLITS:
        columns = {"image": pa.array(rows if split == "train" else rows[8:], pa.list_(pa.list_(pa.uint8()))),
                   "label": [0, 1] * (10 if split == "train" else 6)}  # fmt: skip
        pq.write_table(
            pa.table(columns).replace_schema_metadata({"huggingface": about}), folder / f"{split}.parquet"
        )
    return folder


def test_ragged_where_fixed_is_needed(call: Any, tmp_path: Path) -> None:
    source = fixed_images(tmp_path / "in")
    words = (
        "'image'",
        "[16, 16]",
        "row 7 of split 'train'",
        "15 where 16 are expected",
        "leave such rows out",
    )
    assert_says(call("data", "prepare", source, "--out", tmp_path / "out", "--workers", 1), *words)
    assert_says(train(images(tmp_path, {"path": str(source)})), *words)


def test_no_rows(call: Any, tmp_path: Path) -> None:
    nothing = {"id": pa.array([], pa.int64()), "label": pa.array([], pa.int64())}
    source = write_source(tmp_path / "in", {"train": nothing, "test": {"id": [1], "label": [0]}})
    words = ("split 'train'", source / "train.parquet", "no rows", "leave it out")
    assert_says(call("data", "prepare", source, "--out", tmp_path / "out"), *words)
    assert_says(call("plan", recipe(tmp_path, {"path": str(source)})), *words)


# --- sequences ---


def test_sequence_columns(sound: Path, call: Any, tmp_path: Path) -> None:
    prepared, source = str(sound / "a" / "data"), str(sound / "a" / "source")

    def plan(path: str, **data: Any) -> tuple[int, str]:
        found: tuple[int, str] = call("plan", recipe(tmp_path, {"path": path, **data}))
        return found

    packed = {"order": "packed", "pack_length": 8}
    assert_says(plan(prepared, **packed), "tokens, series", "name one in data.sequence")
    assert_says(plan(prepared, **packed, sequence="tokns"), "'tokns'", "did you mean 'tokens'?")
    assert_says(plan(prepared, sequence="label"), "'label'", "It has tokens, series, fixed")
    bucketed = plan(prepared, order="length_bucketed", sequence="fixed")
    assert_says(bucketed, "'fixed'", "of varying length", "It has tokens, series.")
    assert plan(prepared, sequence="fixed")[0] == errors.DONE
    assert_says(plan(source, **packed, sequence="tokens"), "only a prepared dataset", "distdl data prepare")
    task, model = {"name": "text_classification"}, {"name": "lstm"}
    data = {"path": prepared, **packed, "sequence": "tokens"}
    whole = call("plan", recipe(tmp_path, data, task=task, model=model))
    assert_says(
        whole, "'text_classification' reads each row for itself: leave data.order out", code=errors.USAGE
    )


# --- mixtures ---


@pytest.mark.parametrize(
    ("weights", "code", "words"),
    [
        ((1.5, -0.5), errors.DATA, ["[1.5, -0.5]", "-0.5 is not above 0", "leave out"]),
        ((1.0, 0.0), errors.DATA, ["0 is not above 0", "leave out"]),
        ((0.5, 0.4), errors.DATA, ["sum to 0.9, not to 1", "[0.5555556, 0.4444444]"]),
        ((float("nan"), 0.5), errors.USAGE, ["recipe.yaml:", "not a finite number"]),
    ],
)
def test_weights_that_are_no_distribution(
    weights: tuple[float, float], code: int, words: list[str], sound: Path, call: Any, tmp_path: Path
) -> None:
    mixture = {str(sound / name / "data"): weight for name, weight in zip("ab", weights, strict=True)}
    assert_says(call("plan", recipe(tmp_path, {"mixture": mixture})), *words, code=code)


def test_mixtures_that_do_not_fit_together(sound: Path, call: Any, tmp_path: Path) -> None:
    mixture = {str(sound / name / "data"): 0.5 for name in ("a", "fewer")}
    words = ("'series'", "float[varying]", "missing", "--columns")
    assert_says(call("plan", recipe(tmp_path, {"mixture": mixture})), *words)
    assert_says(call("plan", recipe(tmp_path, {"mixture": {}})), "names no dataset")
    shuffle = call("plan", recipe(tmp_path, {"mixture": mixture, "shuffle": False}))
    assert_says(shuffle, "recipe.yaml:", "always shuffled", code=errors.USAGE)


# --- files ---


def broken(sound: Path, folder: Path) -> Path:
    shutil.copytree(sound / "a" / "data", folder / "data")
    return folder / "data"


def rewrite(data: Path, change: Callable[[Index], Index]) -> None:
    """The index changed, with a hash that fits its new text."""
    (data / "index.json").write_text(change(read_index(data)).to_json())


def test_a_flipped_bit(sound: Path, call: Any, tmp_path: Path) -> None:
    data = broken(sound, tmp_path)
    shard = data / SHARD
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 2] ^= 4
    shard.write_bytes(whole)
    assert_says(
        call("data", "verify", data), f"{shard}: its bytes are not those", "1 of 15 files", "copy it again"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "missing"),
    [(SHARD, False), (SHARD, True), ("train/offsets/tokens.npy", False)],
)
def test_a_file_cut_short_or_gone(file: str, missing: bool, sound: Path, call: Any, tmp_path: Path) -> None:
    data = broken(sound, tmp_path)
    if missing:
        (data / file).unlink()
    else:
        (data / file).write_bytes((data / file).read_bytes()[:-8])
    assert_says(call("data", "verify", data), data / file)
    assert_says(
        train(recipe(tmp_path, {"path": str(data)})), data / file, data / "index.json", "distdl data verify"
    )


def one_row_more(index: Index) -> Index:
    train = index.splits["train"]
    first, *others = train.shards
    shards = (first.model_copy(update={"rows": first.rows + 1}), *others)
    changed = train.model_copy(update={"shards": shards})
    return index.model_copy(update={"splits": {**index.splits, "train": changed}})


def another_name(index: Index) -> Index:
    return index.model_copy(
        update={"columns": {("words" if n == "tokens" else n): c for n, c in index.columns.items()}}
    )


def another_type(index: Index) -> Index:
    tokens = index.columns["tokens"].model_copy(update={"dtype": "int64"})
    return index.model_copy(update={"columns": {**index.columns, "tokens": tokens}})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (one_row_more, ["20 rows, and the index says 21"]),
        (another_name, ["tokens", "missing"]),
        (another_type, ["tokens", "int32", "int64"]),
    ],
)  # fmt: skip
def test_opening_finds_an_index_that_disagrees(
    change: Any, words: list[str], sound: Path, tmp_path: Path
) -> None:
    data = broken(sound, tmp_path)
    rewrite(data, change)
    assert_says(train(recipe(tmp_path, {"path": str(data)})), data / "train", *words)


@pytest.mark.parametrize("change", [one_row_more, another_name, another_type])
def test_verify_finds_an_index_that_disagrees(change: Any, sound: Path, call: Any, tmp_path: Path) -> None:
    data = broken(sound, tmp_path)
    rewrite(data, change)
    shard = data / "train" / "data-00000-of-00003.arrow"
    assert_says(call("data", "verify", data), f"{shard}: ", "and the index says", "Prepare or copy it again")


def test_an_edited_index(sound: Path, call: Any, tmp_path: Path) -> None:
    index = broken(sound, tmp_path) / "index.json"
    index.write_text(index.read_text().replace('"rows": 20', '"rows": 21', 1))
    assert_says(call("plan", recipe(tmp_path, {"path": str(index.parent)})), index, "Prepare it again")


@pytest.mark.slow
def test_no_space_in_the_cache(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        monkeypatch.setenv("DISTDL_CACHE", str(disk))
        code = distdl("train", str(recipe(tmp_path, {"path": str(sound / "a" / "source")})), cwd=ROOT)
        assert_says(code, disk, "free", "another disk")
        assert not list(disk.rglob("index.json"))


# --- transforms ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workers", "code", "words"),
    [
        ("lose_a_row", 0, errors.DATA, ["given 4 rows", "returned 3 rows of 'id'", "as many rows"]),
        ("lose_a_row", 1, errors.DATA, ["given 4 rows", "returned 3 rows of 'id'", "as many rows"]),
        ("lose_a_label", 0, errors.DATA, ["given 4 rows", "returned 3 rows of 'label'", "as many rows"]),
        ("forget_to_return", 0, errors.DATA, ["returned NoneType", "dict of columns"]),
        ("lose_a_rwo", 0, errors.USAGE, ["data.transform", "did you mean 'lose_a_row'"]),
        ("VOCABULARY", 0, errors.USAGE, ["data.transform", "expected a function"]),
    ],
)
def test_a_transform_that_does_not_work(
    name: str, workers: int, code: int, words: list[str], sound: Path, tmp_path: Path
) -> None:
    data = {"path": str(sound / "a" / "data"), "transform": f"{HERE}:{name}"}
    hardware = {"threads": 1, "device": "cpu", "workers": workers}
    result = train(recipe(tmp_path, data, hardware=hardware))
    assert_says(result, f"{HERE}:{name}", *words, code=code)
