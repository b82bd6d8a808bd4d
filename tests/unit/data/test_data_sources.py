"""Which files a dataset is made of, and what their footers say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distdl.data.catalogue import CATALOGUE, locate
from distdl.data.folders import Splits, parquet_splits
from distdl.data.info import describe
from distdl.data.opening import ready
from distdl.errors import DataError
from distdl.samples import Field


def sources(name: str | None, path: Path | None) -> Splits:
    return parquet_splits(locate(name, path))


def write(file: Path, rows: int = 3, start: int = 0) -> Path:
    """A Parquet file with one column `id`: start .. start + rows - 1."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": np.arange(start, start + rows)}), file)
    return file


def test_the_embedded_images_are_balanced() -> None:
    info = describe("fashion_mnist", None)
    assert dict(info.rows) == {"train": 10_000, "test": 2_000}
    assert info.fields == {"image": Field("uint8", (28, 28)), "label": Field("int64", (), 10)}
    for split, files in sources("fashion_mnist", None).items():
        labels = pa.concat_tables(pq.read_table(f, columns=["label"]) for f in files)["label"].to_numpy()
        assert np.bincount(labels).tolist() == [info.rows[split] // 10] * 10


def test_the_embedded_images_are_small_and_licensed() -> None:
    folder = sources("fashion_mnist", None)["train"][0].parent
    assert sum(f.stat().st_size for f in folder.iterdir()) < 6e6
    assert "Zalando SE" in (folder / "LICENSE").read_text()


def test_an_unknown_name_lists_the_near_and_the_known() -> None:
    with pytest.raises(
        DataError, match=r"'fashion_mnits'.*did you mean 'fashion_mnist'.*Known names: ag_news"
    ):
        describe("fashion_mnits", None)


def test_a_name_that_is_not_prepared_gives_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTDL_DATA", str(tmp_path))
    for name in ("cifar10", "somebody/something"):
        with pytest.raises(DataError, match=rf"distdl data prepare {name} --out {tmp_path / name} "):
            describe(name, None)
    write(tmp_path / "cifar10" / "train.parquet")
    assert describe("cifar10", None).rows == {"train": 3}


def test_every_entry_of_the_catalogue_is_complete() -> None:
    for name, entry in CATALOGUE.items():
        assert entry.hub.count("/") == 1 or Path(entry.hub).is_dir(), name
        assert entry.licence, name
        assert entry.splits[0] == "train", name


def test_exactly_one_of_name_and_path(tmp_path: Path) -> None:
    for name, path in [(None, None), ("fashion_mnist", tmp_path)]:
        with pytest.raises(DataError, match="exactly one"):
            sources(name, path)


@pytest.mark.parametrize("folder", [".", "data"])
def test_plain_and_sharded_files_find_their_split(tmp_path: Path, folder: str) -> None:
    base = tmp_path / folder
    for name in [
        "test",
        "train-00001-of-00002",
        "train-00000-of-00002-0a1b",
        "train_extra",
        "holdout",
        ".train",
    ]:
        write(base / f"{name}.parquet")
    (base / "train-00000-of-00002-0a1b.parquet").rename(base / "train-00000-of-00002.parquet")
    (base / "train_extra.parquet").unlink()
    found = {split: [f.name for f in files] for split, files in sources(None, tmp_path).items()}
    assert found == {
        "holdout": ["holdout.parquet"],
        "test": ["test.parquet"],
        "train": ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
    }


def test_loose_names_that_begin_with_a_split_belong_to_it(tmp_path: Path) -> None:
    for name in ["train_b", "train_a", "train2", "test.1", "trainer"]:
        write(tmp_path / f"{name}.parquet")
    found = {split: [f.stem for f in files] for split, files in sources(None, tmp_path).items()}
    assert found == {"test": ["test.1"], "train": ["train2", "train_a", "train_b"], "trainer": ["trainer"]}


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    for number in (0, 2):
        write(tmp_path / f"train-0000{number}-of-00003.parquet")
    with pytest.raises(DataError, match=r"promise 3 shards, and shards \[1\] are missing"):
        sources(None, tmp_path)


def test_shards_of_two_writings_are_not_mixed(tmp_path: Path) -> None:
    for name in ["train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"]:
        write(tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match="mixed"):
        sources(None, tmp_path)


def test_bad_folders_say_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist; expected a folder made by"):
        sources(None, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no Parquet files in .*looked for train\*.*found nothing"):
        sources(None, tmp_path)
    (tmp_path / "train.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"found train\.csv"):
        sources(None, tmp_path)
    with pytest.raises(DataError, match=r"train\.csv is a file"):
        sources(None, tmp_path / "train.csv")
    write(tmp_path / "my data.parquet")
    with pytest.raises(DataError, match="gives no split"):
        sources(None, tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    file = write(tmp_path / "train.parquet", rows=1000)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"cannot read .*train\.parquet as Parquet.*cut short"):
        describe(None, tmp_path)


def test_rows_are_those_of_all_shards_and_their_columns_agree(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", rows=3)
    write(tmp_path / "train-00001-of-00002.parquet", rows=4)
    info = describe(None, tmp_path)
    assert info.rows == {"train": 7}
    assert info.name == tmp_path.name
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "train-00001-of-00002.parquet")
    with pytest.raises(DataError, match=r"id: string.*id: int64"):
        describe(None, tmp_path)


def test_the_fingerprint_follows_the_bytes_and_not_the_place(tmp_path: Path) -> None:
    write(tmp_path / "a" / "train.parquet")
    write(tmp_path / "a" / "test.parquet", start=5)
    first = describe(None, tmp_path / "a").fingerprint
    assert len(first) == 32
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "data")
    (tmp_path / "b" / "data" / "train.parquet").rename(
        tmp_path / "b" / "data" / "train-00000-of-00001.parquet"
    )
    assert describe(None, tmp_path / "b").fingerprint == first
    write(tmp_path / "a" / "test.parquet", start=6)
    second = describe(None, tmp_path / "a").fingerprint
    assert second != first
    (tmp_path / "a" / "train.parquet").rename(tmp_path / "a" / "swap")
    (tmp_path / "a" / "test.parquet").rename(tmp_path / "a" / "train.parquet")
    (tmp_path / "a" / "swap").rename(tmp_path / "a" / "test.parquet")
    assert describe(None, tmp_path / "a").fingerprint not in (first, second)


def test_the_description_of_the_embedded_images_is_what_their_files_say(tmp_path: Path) -> None:
    said = describe("fashion_mnist", None)
    folder = tmp_path / "fashion_mnist"
    shutil.copytree(locate("fashion_mnist", None), folder)
    found = describe(None, folder)
    assert replace(found, name=said.name) == said
    assert [f.classes for f in found.fields.values()] == [f.classes for f in said.fields.values()]


def test_the_embedded_fingerprint_is_the_one_on_record() -> None:
    # It names the cache folder and is compared at every resume: a change breaks runs that exist.
    assert describe("fashion_mnist", None).fingerprint == "c7825d86ea22abcc03b9ab02d6381eea"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"info": {"features": {"label": 1}}}', '{"info": 3}', '{"info": {"features": [1]}}'],
)
def test_odd_metadata_only_costs_the_class_names(tmp_path: Path, text: str) -> None:
    table = pa.table({"label": np.arange(3)}).replace_schema_metadata({"huggingface": text})
    pq.write_table(table, tmp_path / "train.parquet")
    assert describe(None, tmp_path).fields == {"label": Field("int64")}


def test_class_labels_are_counted(tmp_path: Path) -> None:
    features = {"label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
    table = pa.table({"label": np.arange(3)})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "train.parquet")
    assert describe(None, tmp_path).fields["label"].num_classes == 3


def test_importing_and_describing_needs_neither_torch_nor_datasets() -> None:
    code = (
        "import sys, distdl.cli.data, distdl.data.augment.augmentation\n"
        "distdl.data.describe('fashion_mnist', None)\n"
        "print(sorted({'torch', 'datasets', 'pandas', 'tokenizers', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_fingerprint_reads_a_bounded_part_of_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"x": np.random.default_rng(0).integers(0, 2**60, 2_000_000)})
    pq.write_table(table, tmp_path / "train.parquet", compression="none", use_dictionary=False)
    assert (tmp_path / "train.parquet").stat().st_size > 15e6
    read = []
    plain = Path.open

    def counting(self: Path, *arguments: object) -> object:
        stream = plain(self, *arguments)  # type: ignore[call-overload]
        whole = stream.read

        def counted(size: int = -1) -> bytes:
            data: bytes = whole(size)
            read.append(len(data))
            return data

        stream = Counted(stream, counted)
        return stream

    class Counted:
        def __init__(self, stream: object, read: object) -> None:
            self.stream, self.read = stream, read
            self.seek = stream.seek  # type: ignore[attr-defined]

        def __enter__(self) -> Counted:
            return self

        def __exit__(self, *unused: object) -> None:
            self.stream.close()  # type: ignore[attr-defined]

    monkeypatch.setattr(Path, "open", counting)
    describe(None, tmp_path)
    assert 64 * 4096 <= sum(read) < 500_000


def test_arrays_that_datasets_saved_have_to_be_prepared(tmp_path: Path) -> None:
    import datasets

    from distdl.data.prepare.run import prepare

    datasets.disable_progress_bars()
    features = datasets.Features(
        {"image": datasets.Array2D((2, 3), "uint8"), "label": datasets.Value("int64")}
    )
    columns = {"image": [[[1, 2, 3], [4, 5, 6]]] * 4, "label": [0, 1, 2, 3]}
    saved = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "saved")
    datasets.enable_progress_bars()
    for look in (describe, ready):
        with pytest.raises(
            DataError, match=rf"'image'.*2 x 3.*distdl data prepare {tmp_path}/saved --out DIR"
        ):
            look(None, tmp_path / "saved")
    prepare(str(tmp_path / "saved"), tmp_path / "out")
    assert describe(None, tmp_path / "out").fields["image"] == Field("uint8", (2, 3))


def test_a_save_to_disk_folder_is_used_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("DISTDL_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    saved = datasets.Dataset.from_dict({"id": list(range(10)), "word": [[1] * n for n in range(10)]})
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(
        tmp_path / "two", num_shards={"train": 3, "test": 1}
    )
    datasets.enable_progress_bars()
    assert describe(None, tmp_path / "one").rows == {"train": 10}
    found = ready(None, tmp_path / "two")
    assert found.split("train").rows == [4, 3, 3]
    assert found.info.fields["word"] == Field("int64", (None,))
    assert found.info == describe(None, tmp_path / "two")
    assert not (tmp_path / "cache").exists()
    first = found.info.fingerprint
    shutil.copytree(tmp_path / "two", tmp_path / "moved")
    assert describe(None, tmp_path / "moved").fingerprint == first
    lost = tmp_path / "two" / "train" / "data-00001-of-00003.arrow"
    data = bytearray(lost.read_bytes())
    data[len(data) - 100] ^= 1
    lost.write_bytes(data)
    assert describe(None, tmp_path / "two").fingerprint != first
    lost.write_bytes(data[:-40])
    with pytest.raises(DataError, match=r"cannot read .*data-00001-of-00003\.arrow"):
        describe(None, tmp_path / "two")
    lost.unlink()
    with pytest.raises(DataError, match=r"has lost data-00001-of-00003\.arrow"):
        describe(None, tmp_path / "two")
