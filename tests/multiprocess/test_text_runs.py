"""Every recipe for text and for strings in images, smaller and on a slice of data: it learns, alike at one
and two processes, and predicts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distdl.data import open_split, ready
from distdl.data.prepare.options import Options
from distdl.data.prepare.run import prepare
from distdl.testing import run_world
from tests.commands import distdl
from tests.multiprocess.test_parity import check_learns_alike, results
from tests.runs import shortened, train_rank

pytestmark = pytest.mark.slow

WORDS = {"one": "eins", "two": "zwei", "red": "rot", "blue": "blau", "cat": "Katze", "dog": "Hund"}
ENCODER = {"embedding": 12, "hidden": 12}

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "r8_lstm": ("classes", ENCODER),
    "spam_lstm": ("classes", ENCODER),
    "r8_autoencoder": ("classes", {**ENCODER, "code": 12}),
    "r8_from_autoencoder": ("classes", ENCODER),
    "help_en_de": ("pairs", {"embedding": 12, "hidden": 12}),
    "brown_lstm_lm": ("prose", {"embedding": 12, "hidden": 12}),
    "digits_ctc": ("digits", {"width": 4, "hidden": 12}),
}
"""Recipe -> what it is trained on here, and what is smaller. In this order: one begins with another's run."""


def sentence(rng: np.random.Generator) -> list[str]:
    return rng.choice([*WORDS], rng.integers(1, 5)).tolist()


def tables(split: str, rows: int) -> dict[str, pa.Table]:
    rng = np.random.default_rng([rows, len(split)])
    texts = [sentence(rng) for _ in range(rows)]
    strings = [rng.integers(0, 4, rng.integers(1, 4)).tolist() for _ in range(rows)]
    image = np.zeros((rows, 16, 48), np.uint8)
    for picture, string in zip(image, strings, strict=True):
        for place, symbol in enumerate(string):
            picture[4 * symbol : 4 * symbol + 4, place * 16 + 4 : place * 16 + 12] = 255
    lines = pa.FixedSizeListArray.from_arrays(pa.array(image.reshape(-1)), 48)
    return {
        "classes": pa.table(
            {"text": [" ".join(t) for t in texts], "label": ["cat" if "cat" in t else "other" for t in texts]}
        ),
        "pairs": pa.table(
            {"en": [" ".join(t) for t in texts], "de": [" ".join(WORDS[w] for w in t) for t in texts]}
        ),
        # The next word follows from the last: there is something to learn.
        "prose": pa.table({"text": [" ".join(([*WORDS] * 4)[i % 6 : i % 6 + 12]) for i in range(2 * rows)]}),
        "digits": pa.table(
            {
                "image": pa.FixedSizeListArray.from_arrays(lines, 16),
                "digits": [" ".join(map(str, string)) for string in strings],
            }
        ),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `classes`, `pairs`, `prose` and `digits`, prepared: 48 + 16 rows, of `prose` twice as many."""
    folder = tmp_path_factory.mktemp("data")
    for split, rows in (("train", 48), ("test", 16)):
        for kind, table in tables(split, rows).items():
            (folder / "in" / kind).mkdir(parents=True, exist_ok=True)
            pq.write_table(table, folder / "in" / kind / f"{split}.parquet")
    options = {
        "classes": Options(tokenize=("text",), classes=("label",), tokenizer="word", min_count=1),
        "pairs": Options(tokenize=("en", "de"), tokenizer="word", min_count=1),
        "prose": Options(tokenize=("text",), tokenizer="word", min_count=1),
        "digits": Options(tokenize=("digits",), tokenizer="space", min_count=1),
    }
    for kind, how in options.items():
        prepare(str(folder / "in" / kind), folder / kind, how)
    return folder


def changes(name: str, folder: Path) -> dict[str, Any]:
    begin = {"init": {"from": str(folder / "r8_autoencoder")}} if "from" in name else {}
    lanes = {"data": {"pack_length": 5, "eval_pack_length": 20}} if "lm" in name else {}
    return {"optim": {"lr": 0.01}, **begin, **lanes}


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """World size -> the folder with a run of every recipe."""
    found = {}
    for size in (1, 2):
        folder = found[size] = tmp_path_factory.mktemp(f"world{size}")
        for name, (kind, model) in SMALL.items():
            recipe = shortened(name, data / kind, folder / name, model, **changes(name, folder))
            assert run_world(train_rank, size, recipe) == [0] * size
    return found


@pytest.mark.parametrize("name", SMALL)
def test_it_learns_and_two_processes_do_the_same_to_the_bit(name: str, runs: dict[int, Path]) -> None:
    check_learns_alike(runs[1] / name, runs[2] / name)


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
@pytest.mark.parametrize("name", ["r8_autoencoder", "help_en_de", "digits_ctc"])
def test_under_engines_that_cut_parameters_apart(
    name: str, engine: str, data: Path, runs: dict[int, Path], tmp_path: Path
) -> None:
    """Among them three modules with one weight, and a search that calls the model anew for each token."""
    kind, model = SMALL[name]
    exact = engine == "fsdp"
    recipe = shortened(
        name,
        data / kind,
        tmp_path,
        model,
        optim={"lr": 0.01},
        train={"reduction": "exact" if exact else "fast"},
        hardware={"engine": engine},
    )
    assert run_world(train_rank, 2, recipe) == [0, 0]
    if exact:
        check_learns_alike(runs[2] / name, tmp_path)
        return
    (rows, tensors), (others, theirs) = results(tmp_path), results(runs[2] / name)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in others], rel=1e-3)
    assert tensors.keys() == theirs.keys()


@pytest.mark.parametrize(
    ("name", "given", "keys"),
    [
        ("r8_from_autoencoder", "red cat\ntwo dog\n", {"class", "probability"}),
        ("r8_autoencoder", "red cat\ntwo dog\n", {"input", "steps", "loss", "text"}),
        ("help_en_de", "red cat\ntwo dog\n", {"input", "text"}),
        ("brown_lstm_lm", "red cat\ntwo dog\n", {"input", "tokens", "text"}),
    ],
)
def test_lines_of_text_are_predicted(
    name: str, given: str, keys: set[str], runs: dict[int, Path], tmp_path: Path
) -> None:
    (tmp_path / "in.txt").write_text(given)
    out = tmp_path / "out.jsonl"
    words = ["predict", str(runs[1] / name / "recipe.yaml"), "--input", str(tmp_path / "in.txt")]
    code, said = distdl(*words, "--out", str(out))
    assert code == 0, said
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(found) == 2
    assert all(keys <= set(one) for one in found)
    assert [one["input"] for one in found] == given.splitlines()


def test_strings_are_read_in_a_folder_of_pictures(data: Path, runs: dict[int, Path], tmp_path: Path) -> None:
    recipe = str(runs[1] / "digits_ctc" / "recipe.yaml")
    (tmp_path / "photos").mkdir()
    rows = open_split(ready(None, data / "digits"), "test", ["image"]).gather(np.arange(16))
    for number, picture in enumerate(rows["image"]):
        Image.fromarray(picture).save(tmp_path / "photos" / f"{number:02d}.png")
    found = []
    for given in (
        ["--input", str(data / "digits"), "--split", "test"],
        ["--input", str(tmp_path / "photos")],
    ):
        out = tmp_path / "out.jsonl"
        code, said = distdl("predict", recipe, *given, "--out", str(out))
        assert code == 0, said
        found.append([json.loads(line) for line in out.read_text().splitlines()])
    assert [Path(one["file"]).name for one in found[1]] == [f"{number:02d}.png" for number in range(16)]
    assert [one["text"] for one in found[1]] == [one["text"] for one in found[0]]
