"""`distdl predict` of images and lines of text: the same answers as for the prepared rows; drawing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distdl.data import ready
from distdl.data.catalogue import CATALOGUE, locate
from distdl.data.feed import Feed
from distdl.data.prepare.run import prepare
from distdl.errors import USAGE
from distdl.models import model_factory
from distdl.recipe import load_recipe
from distdl.samples import DataInfo, Field
from distdl.tasks import build_task
from distdl.train.predicting import _flat
from tests.commands import distdl
from tests.runs import train_here

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = {
    "fashion_cnn": {"model": {"width": 2, "hidden": 4}, "data": {"augment": {"flip": False}}},
    "sentiment_lstm": {"model": {"embedding": 4, "hidden": 4}},
}


def trained(name: str, folder: Path) -> Path:
    """The recipe of a run of one step with a small model."""
    file = folder / "recipe.yaml"
    end = {
        "train": {"max_steps": 1, "epochs": None},
        "hardware": {"threads": 1},
        "run": {"dir": str(folder / "run")},
    }
    file.write_text(json.dumps({"extends": str(CONFIGS / f"{name}.yaml"), **SMALL[name], **end}))
    train_here(file, 1)
    return file


def predicted(recipe: Path, given: Path, *options: str) -> list[dict[str, Any]]:
    out = recipe.parent / "out.jsonl"
    code, said = distdl("predict", str(recipe), "--input", str(given), "--out", str(out), *options)
    assert code == 0, said
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_images_in_any_folder(tmp_path: Path) -> None:
    recipe = trained("fashion_cnn", tmp_path)
    whole = predicted(recipe, locate("fashion_mnist", None), "--split", "test")
    assert len(whole) == 2000
    rows = Feed.open(load_recipe(recipe).data).rows("test").gather(np.arange(3))
    for i, pixels in enumerate(rows["image"]):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    found = predicted(recipe, tmp_path / "photos")
    assert [Path(p["file"]).name for p in found] == ["0.png", "1.png", "2.png"]
    assert [p["class"] for p in found] == [p["class"] for p in whole[:3]]
    assert [p["probability"] for p in found] == pytest.approx([p["probability"] for p in whole[:3]])
    assert isinstance(found[0]["class"], str)
    (tmp_path / "scans").mkdir()  # grey ones that were saved in colour are read as the dataset's are
    for i, pixels in enumerate(rows["image"]):
        Image.fromarray(pixels).convert("RGB").save(tmp_path / "scans" / f"{i}.png")
    scans = predicted(recipe, tmp_path / "scans")
    assert [p["probability"] for p in scans] == [p["probability"] for p in found]
    plot = tmp_path / "plots" / "first.png"
    assert predicted(recipe, tmp_path / "photos", "--plot", str(plot)) == found
    with Image.open(plot) as picture:
        assert picture.size[1] > 200
    wrong = ["--input", str(tmp_path / "photos"), "--out", str(tmp_path / "no.csv"), "--plot", "first.docx"]
    code, said = distdl("predict", str(recipe), *wrong)
    assert code == 5
    assert "--plot first.docx: the suffix says the format, and is one of" in said
    assert not (tmp_path / "no.csv").exists()
    Image.fromarray(rows["image"][0][:20]).save(tmp_path / "small.png")
    out = str(tmp_path / "no.csv")
    code, said = distdl("predict", str(recipe), "--input", str(tmp_path / "small.png"), "--out", out)
    assert code == 5
    assert "rows of shape [20, 28], and the model was trained on [28, 28]" in said


def test_labels_that_are_kept_secret_are_not_read(tmp_path: Path) -> None:
    recipe = trained("fashion_cnn", tmp_path)
    embedded = CATALOGUE["fashion_mnist"].embedded
    assert embedded is not None
    rows = pq.read_table(embedded / "test.parquet").slice(0, 20)
    secret = pa.array([-1] * 20, rows.schema.field("label").type)
    for name, table in {
        "known": rows,
        "secret": rows.set_column(1, rows.schema.field("label"), secret),
    }.items():
        (tmp_path / name).mkdir()
        pq.write_table(table, tmp_path / name / "test.parquet")
        prepare(str(tmp_path / name), tmp_path / f"{name}-ready")
    columns = ready(None, tmp_path / "secret-ready").info.fields
    assert columns == ready(None, tmp_path / "known-ready").info.fields
    assert predicted(recipe, tmp_path / "secret-ready") == predicted(recipe, tmp_path / "known-ready")
    # Names of classes come from the dataset of the recipe; that it is not the one of the checkpoint is said.
    pq.write_table(rows, tmp_path / "known" / "train.parquet")
    prepare(str(tmp_path / "known"), tmp_path / "anew")
    words = [
        "predict",
        str(recipe),
        "--input",
        str(tmp_path / "known-ready"),
        "--out",
        str(tmp_path / "o.csv"),
    ]
    code, said = distdl(*words)
    assert (code, "warning" in said) == (0, False)
    code, said = distdl(*words, "data.name=null", f"data.path={tmp_path / 'anew'}")
    assert code == 0, said
    assert "warning: dataset 'anew' is not the one that" in said


def test_lines_of_text_are_read_with_the_tokenizer_of_the_dataset(tmp_path: Path) -> None:
    recipe = trained("sentiment_lstm", tmp_path)
    folder = locate("sentiment", None)
    whole = predicted(recipe, folder, "--split", "test")
    texts = pq.read_table(folder / "text" / "test.parquet").column("text").to_pylist()[:4]
    (tmp_path / "lines.txt").write_text("\n".join(texts) + "\n")
    found = predicted(recipe, tmp_path / "lines.txt")
    assert [p["class"] for p in found] == [p["class"] for p in whole[:4]]
    assert [p["probability"] for p in found] == pytest.approx([p["probability"] for p in whole[:4]])
    (tmp_path / "letters").mkdir()  # a file each, which may have several lines
    for i, text in enumerate(texts):
        (tmp_path / "letters" / f"m-{i}.txt").write_text(text.replace(" ", "\n"))
    letters = predicted(recipe, tmp_path / "letters")
    assert [Path(p["file"]).name for p in letters] == ["m-0.txt", "m-1.txt", "m-2.txt", "m-3.txt"]
    assert [p["probability"] for p in letters] == pytest.approx([p["probability"] for p in found])
    (tmp_path / "letters" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "letters" / ".ipynb_checkpoints" / "m-0.txt").write_text("an old one")
    (tmp_path / "letters" / "m-0.txt").write_text(texts[0] + "\n")
    assert predicted(recipe, tmp_path / "letters") == letters
    (tmp_path / "letters" / "m-4.txt").write_bytes(b"\xff\xfe")
    code, said = distdl("predict", str(recipe), "--input", str(tmp_path / "letters"), "--out", "no.csv")
    assert code == 5
    assert "m-4.txt is no text in UTF-8" in said
    plain = distdl(
        "predict", str(recipe), "--input", "x", "--out", str(tmp_path / "no.csv"), "--plot", "p.png"
    )
    assert plain[0] == 2
    assert "draws nothing: leave out --plot" in plain[1]
    assert found[0]["input"].split()[:3] == texts[0].lower().split()[:3]
    (tmp_path / "train.txt").write_text("\n".join(texts) + "\n")
    other = tmp_path / "other"
    made = ["--out", str(other), "--tokenize", "text", "--tokenizer", "word", "--min-count", "1"]
    assert distdl("data", "prepare", str(tmp_path / "train.txt"), *made)[0] == 0
    code, said = distdl("predict", str(recipe), "--input", str(other), "--out", str(tmp_path / "no.csv"))
    assert code == 5
    assert "was not tokenised with" in said


class Axes:
    """Notes what is drawn, as matplotlib's would draw it."""

    def __init__(self) -> None:
        self.drawn: dict[str, list[float]] = {}

    def plot(self, *values: Any, label: str = "box", **_: Any) -> None:
        self.drawn[label] = np.asarray(values[-1]).tolist()

    def imshow(self, picture: Any, **_: Any) -> None:
        self.drawn.setdefault("pictures", []).append(picture.shape)  # type: ignore[arg-type]

    def text(self, _x: float, _y: float, what: str, **_: Any) -> None:
        self.drawn.setdefault("texts", []).append(what)  # type: ignore[arg-type]

    def set_axis_off(self) -> None: ...

    def legend(self) -> None: ...


@pytest.mark.parametrize("known", [True, False])
def test_a_forecast_is_drawn_after_its_history(known: bool) -> None:
    fields = {"history": Field("float", (2,)), "future": Field("float", (1,)), "scale": Field("float")}
    data = DataInfo("s", {"train": 1}, fields, "f")
    task: Any = build_task("forecasting", {}, model_factory("lstm", {}), data)
    axes = Axes()
    row = {"history": np.array([1.0, 2.0]), "future": np.array([3.0 * known])}
    task.draw(axes, row, {"forecast": [4.0]})
    expected = {"history": [1, 2], "forecast": [4]} | ({"future": [3]} if known else {})
    assert axes.drawn == expected


@pytest.mark.parametrize("shape", [(8, 12), (8, 12, 3), (3, 8, 12)])
def test_masks_and_boxes_are_drawn_over_their_picture(shape: tuple[int, ...]) -> None:
    fields = {
        "image": Field("uint8", shape),
        "mask": Field("uint8", (8, 12)),
        "boxes": Field("float", (None, 4)),
        "classes": Field("int64", (None,)),
    }
    data = DataInfo("scenes", {"train": 1}, fields, "f")
    seen = (8, 12) if len(shape) == 2 else (8, 12, 3)
    masks: Any = build_task("segmentation", {"num_classes": 3}, model_factory("unet", {}), data)
    axes = Axes()
    masks.draw(axes, {"image": np.zeros(shape, np.uint8)}, {"mask": np.ones((8, 12), np.uint8)})
    assert axes.drawn == {"pictures": [seen, (8, 12)]}
    boxes: Any = build_task("detection", {"num_classes": 3}, model_factory("centernet", {}), data)
    axes, found = Axes(), {"box": [1.0, 2.0, 5.0, 7.0], "class": 2, "score": 0.5}
    boxes.draw(axes, {"image": np.zeros(shape, np.uint8)}, {"objects": [found]})
    assert axes.drawn == {"pictures": [seen], "texts": ["2 0.50"], "box": [2.0, 2.0, 7.0, 7.0, 2.0]}


def test_csv_has_a_column_for_a_list_without_items() -> None:
    assert _flat({"row": 0, "objects": [], "forecast": [1.5, 2]}) == {
        "row": 0,
        "objects": "[]",
        "forecast_1": 1.5,
        "forecast_2": 2,
    }


def test_what_a_task_of_ones_own_lacks_is_said(tmp_path: Path) -> None:
    recipe = trained("fashion_cnn", tmp_path)
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "one.png")
    for number, (inputs, made, says) in enumerate(
        [
            (None, 1, "has `predict`, and `inputs` None; expected the columns"),
            (("picture",), 1, "`inputs` ('picture',); expected the columns that it predicts from"),
            (("image",), 0, "returned 0 predictions for 1 rows: expected one a row"),
        ]
    ):
        (tmp_path / f"half_done{number}.py").write_text(
            "from distdl.tasks.image_classification import ImageClassification\n"
            "class Task(ImageClassification):\n"
            "    def __init__(self, make_model, data_info):\n"
            "        super().__init__(make_model, data_info)\n"
            f"        self.inputs = {inputs!r}\n"
            "    def predict(self, model, batch):\n"
            f"        return super().predict(model, batch)[:{made}]\n"
        )
        words = ["predict", str(recipe), f"task.name=half_done{number}:Task", "--input", "one.png"]
        code, said = distdl(*words, "--out", "no.csv", cwd=tmp_path)
        assert code == USAGE, said
        assert says in " ".join(said.split())
        assert not (tmp_path / "no.csv").exists()
