"""verify finds every flipped bit; info and head say what is there."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from distdl.cli.commands import app
from distdl.data.index import INDEX_FILE, read_index
from distdl.data.prepare.inspect import head, summary, summary_lines, unchecked, verify
from distdl.data.prepare.options import Options
from distdl.data.prepare.run import prepare
from distdl.errors import DataError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("inspect")
    (base / "source").mkdir()
    lines = [f"sentence {n} about" + " words" * (n % 5) for n in range(20)]
    (base / "source" / "train.txt").write_text("\n".join(lines) + "\n")
    prepare(str(base / "source"), base / "out", Options(shards=3, tokenize=("text",), tokenizer="word"))
    return base / "out"


def test_every_file_is_checked_and_every_flipped_bit_found(dataset: Path) -> None:
    verify(dataset)
    random = np.random.default_rng(0)
    for file in sorted(f for f in dataset.rglob("*") if f.is_file()):
        whole = file.read_bytes()
        for at in {0, len(whole) - 1, *random.integers(0, len(whole), 12).tolist()}:
            broken = bytearray(whole)
            broken[at] ^= 1 << int(random.integers(8))
            file.write_bytes(broken)
            with pytest.raises(DataError, match=file.name.replace(".", r"\.")):
                verify(dataset)
        file.write_bytes(whole)
    verify(dataset)


def test_files_behind_urls_are_said_to_be_unchecked(dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    whole = CliRunner().invoke(app, ["data", "verify", str(copy)])
    assert "is whole" in whole.output
    index = read_index(copy)
    split = index.splits["train"]
    shards = tuple(s.model_copy(update={"file": f"s3://bucket/{s.file}"}) for s in split.shards[1:])
    split = split.model_copy(update={"shards": (split.shards[0], *shards)})
    index = index.model_copy(update={"splits": {"train": split}})
    (copy / INDEX_FILE).write_text(index.to_json(), encoding="utf-8")
    assert unchecked(copy, verify(copy)) == 2
    done = CliRunner().invoke(app, ["data", "verify", str(copy)])
    assert done.exit_code == 0
    assert "is whole" not in done.output
    assert "2 lie behind URLs: not checked" in done.output


def test_all_that_is_wrong_is_listed(dataset: Path) -> None:
    first, second = sorted((dataset / "train").glob("*.arrow"))[:2]
    kept = first.read_bytes(), second.read_bytes()
    first.write_bytes(kept[0] + b"x")
    second.unlink()
    try:
        with pytest.raises(
            DataError, match=rf"(?s)2 of \d files.*{first.name}: \d+ bytes.*{second.name}: No such"
        ):
            verify(dataset)
    finally:
        first.write_bytes(kept[0])
        second.write_bytes(kept[1])


def test_an_index_that_disagrees_with_its_shards(dataset: Path) -> None:
    index = read_index(dataset)
    train = index.splits["train"]
    text = (dataset / INDEX_FILE).read_text()

    def rewrite(**changes: object) -> None:
        splits = {"train": train.model_copy(update=changes)}
        (dataset / INDEX_FILE).write_text(index.model_copy(update={"splits": splits}).to_json())

    try:
        shards = (train.shards[0].model_copy(update={"rows": 5}), *train.shards[1:])
        rewrite(shards=shards)
        with pytest.raises(DataError, match=r"data-00000-of-00003\.arrow: 6 rows, and the index says 5"):
            verify(dataset)
        rewrite(offsets={"text": train.offsets["text"].model_copy(update={"longest": 99})})
        with pytest.raises(DataError, match=r"text\.npy: offsets that disagree"):
            verify(dataset)
    finally:
        (dataset / INDEX_FILE).write_text(text)
    verify(dataset)


def test_info_has_rows_columns_and_lengths(dataset: Path) -> None:
    found = summary(dataset)
    lengths = found["splits"]["train"]["lengths"]["text"]
    assert lengths == {"mean": 5.0, "longest": 7, "total": 100}
    assert found["columns"]["text"] == {"dtype": "int32", "shape": [None], "classes": None}
    text = "\n".join(summary_lines(found))
    assert "split train: 20 rows, 3 shards" in text
    assert "text: length 5.0 on average, 7 at most" in text
    assert "column text: int32 [varies]" in text
    assert found["fingerprint"] in text


def test_head_shows_tokens_as_text_and_images_as_sizes(dataset: Path, tmp_path: Path) -> None:
    lines = list(head(dataset, "train", 8))
    assert sum(line.startswith("row ") for line in lines) == 8
    assert lines[15].endswith("(5)  'sentence <unk> about words words'")
    with pytest.raises(DataError, match=r"no split 'test'\. Its splits: train"):
        list(head(dataset, "test", 1))
    table = pa.table({"image": pa.array([[[1, 2], [3, 4]]], pa.list_(pa.list_(pa.uint8(), 2), 2))})
    (tmp_path / "d").mkdir()
    pq.write_table(table, tmp_path / "d" / "train.parquet")
    prepare(str(tmp_path / "d"), tmp_path / "out")
    assert list(head(tmp_path / "out", "train", 5)) == ["row 0", "  image: uint8 2 x 2"]
