"""Every recipe for images, with a smaller network on a slice of data: it learns, alike at any world size."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distdl.data import open_split, ready
from distdl.data.catalogue import CATALOGUE
from distdl.recipe import Recipe
from distdl.testing import run_world
from tests.commands import distdl
from tests.multiprocess.test_parity import check_learns_alike, results
from tests.runs import shortened, train_rank

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
GARMENTS, SCENES = "garments", "scenes"

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "fashion_resnet": (GARMENTS, {"width": 4}),
    "cifar100_resnet18": (GARMENTS, {"width": 4}),
    "mnist_cnn5": (GARMENTS, {"width": 4}),
    "reference/cnn5": (GARMENTS, {"width": 4}),
    "reference/cnn20": (GARMENTS, {}),
    "reference/cnn20_rnn1": (GARMENTS, {"hidden": 16}),
    "reference/rnn5": (GARMENTS, {"hidden": 16}),
    "mnist_autoencoder": (GARMENTS, {"hidden": [64], "code": 8}),
    "fashion_conv_autoencoder": (GARMENTS, {"width": 4}),
    "scenes_unet": (SCENES, {"width": 4, "levels": 2}),
    "scenes_centernet": (SCENES, {"width": 4, "hidden": 16}),
}
"""Recipe -> what it is trained on here, and what is smaller. In this order: one begins with another's run."""


def scenes_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scenes", ROOT / "benchmarks" / "scenes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `garments`, 48 + 16 of the images that come with the package, and `scenes` composed of them."""
    folder = tmp_path_factory.mktemp("data")
    (folder / GARMENTS).mkdir()
    embedded = CATALOGUE["fashion_mnist"].embedded
    assert embedded is not None
    for split, rows in (("train", 48), ("test", 16)):
        table = pq.read_table(embedded / f"{split}.parquet").slice(0, rows)
        pq.write_table(table, folder / GARMENTS / f"{split}.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTDL_CACHE", str(folder / "cache"))
        scenes_script().compose(str(folder / GARMENTS), folder / SCENES, {"train": 48, "test": 16}, seed=7)
    return folder


def small(name: str, data: Path, folder: Path, **changes: Any) -> Recipe:
    kind, model = SMALL[name]
    begin = {"init": {"from": str(folder / "fashion_resnet")}} if name == "scenes_centernet" else {}
    return shortened(name, data / kind, folder / name, model, **begin, **changes)


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """World size -> the folder with a run of every recipe."""
    found = {}
    for size in (1, 2):
        found[size] = tmp_path_factory.mktemp(f"world{size}")
        recipes = [small(name, data, found[size]) for name in SMALL]
        cache = {"DISTDL_CACHE": str(data / "cache")}
        for recipe in recipes:
            assert run_world(train_rank, size, recipe, env=cache) == [0] * size
    return found


@pytest.mark.parametrize("name", SMALL)
def test_it_learns_and_two_processes_do_the_same_to_the_bit(name: str, runs: dict[int, Path]) -> None:
    check_learns_alike(runs[1] / name, runs[2] / name)


ELSEWHERE = ("fashion_resnet", "mnist_autoencoder", "scenes_unet", "scenes_centernet")
"""Networks that are unlike each other, under the engine that cuts parameters apart."""


@pytest.mark.parametrize("name", ELSEWHERE)
def test_sharded_parameters_give_the_same_bits(
    name: str, runs: dict[int, Path], data: Path, tmp_path: Path
) -> None:
    if name == "scenes_centernet":  # begins with it
        (tmp_path / "fashion_resnet").symlink_to(runs[2] / "fashion_resnet")
    recipe = small(name, data, tmp_path, hardware={"engine": "fsdp"})
    assert run_world(train_rank, 2, recipe, env={"DISTDL_CACHE": str(data / "cache")}) == [0, 0]
    check_learns_alike(runs[2] / name, tmp_path / name)


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith("reference/")])
def test_reference_networks_learn_by_sgd_and_cross_entropy_with_ddp_and_deepspeed(
    name: str, engine: str, data: Path, tmp_path: Path
) -> None:
    sgd = {"name": "sgd", "lr": 0.02, "momentum": 0.9}
    recipe = shortened(
        name,
        data / GARMENTS,
        tmp_path / "run",
        SMALL[name][1],
        optim=sgd,
        train={"reduction": "fast", "max_steps": 12},
        hardware={"engine": engine},
    )
    assert run_world(train_rank, 2, recipe, env={"DISTDL_CACHE": str(data / "cache")}) == [0, 0]
    losses = [row["loss"] for row in results(tmp_path / "run")[0]]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def predicted(name: str, runs: dict[int, Path], data: Path, *overrides: str) -> tuple[Path, list[Any]]:
    """What `distdl predict` writes and draws of the test rows, and where."""
    given = data / SMALL[name][0]
    return predicted_of(runs[1] / name, given, data, *overrides, "--split", "test")


def predicted_of(run: Path, given: Path, data: Path, *options: str) -> tuple[Path, list[Any]]:
    out, plot = run / f"{given.name}.jsonl", run / f"{given.name}.png"
    words = ["predict", str(run / "recipe.yaml"), *options, "--input", str(given), "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTDL_CACHE", str(data / "cache"))
        code, said = distdl(*words, "--plot", str(plot))
    assert code == 0, said
    assert plot.stat().st_size > 10_000
    return out, [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def photos(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two scenes of the test split, as a folder of pictures."""
    folder = tmp_path_factory.mktemp("photos")
    scenes = open_split(ready(None, data / SCENES), "test", ["image"]).gather(np.arange(2))["image"]
    for number, scene in enumerate(scenes):
        Image.fromarray(scene).save(folder / f"{number}.png")
    return folder


def test_masks_are_written_as_pictures_of_class_numbers(
    runs: dict[int, Path], data: Path, photos: Path
) -> None:
    out, found = predicted("scenes_unet", runs, data)
    true = open_split(ready(None, data / SCENES), "test", None).gather(np.arange(16))["mask"]
    masks = np.stack([np.asarray(Image.open(out.parent / one["mask"])) for one in found])
    rows, _ = results(runs[1] / "scenes_unet")
    assert (masks == true).mean() == pytest.approx(rows[-1]["eval_accuracy"])
    assert Image.open(out.parent / found[0]["mask"]).convert("RGB").getpixel((0, 0)) is not None
    out, found = predicted_of(runs[1] / "scenes_unet", photos, data)  # a folder of pictures: the same
    assert [Path(one["file"]).name for one in found] == ["0.png", "1.png"]
    again = np.stack([np.asarray(Image.open(out.parent / one["mask"])) for one in found])
    assert np.array_equal(again, masks[:2])


def test_objects_are_listed_best_first_and_from_a_score_on(
    runs: dict[int, Path], data: Path, photos: Path
) -> None:
    every = predicted("scenes_centernet", runs, data, "task.min_score=0.0")[1]
    assert len(every) == 16
    scores = [[one["score"] for one in row["objects"]] for row in every]
    assert all(row == sorted(row, reverse=True) for row in scores)
    bound = scores[0][2]
    some = predicted("scenes_centernet", runs, data, f"task.min_score={bound}")[1]
    assert [o["score"] for row in some for o in row["objects"]] == [
        s for row in scores for s in row if s >= bound
    ]
    assert all(len(o["box"]) == 4 for row in every for o in row["objects"])
    names = ready(None, data / SCENES).info.fields["classes"].classes
    assert len(names) == 10
    assert {o["class"] for row in every for o in row["objects"]} <= {*names}
    again = predicted_of(runs[1] / "scenes_centernet", photos, data, "task.min_score=0.0")[1]
    assert [row["objects"] for row in again] == [row["objects"] for row in every[:2]]


def test_pictures_come_back_from_an_autoencoder(runs: dict[int, Path], data: Path) -> None:
    out, found = predicted("mnist_autoencoder", runs, data)
    rows, _ = results(runs[1] / "mnist_autoencoder")
    assert np.mean([one["squared_error"] for one in found]) == pytest.approx(rows[-1]["eval_squared_error"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTDL_CACHE", str(data / "cache"))
        given = open_split(ready(None, data / GARMENTS), "test", ["image"]).gather(np.arange(16))["image"]
    back = np.stack([np.asarray(Image.open(out.parent / one["image"])) for one in found])
    errors = ((back / 255 - given / 255) ** 2).sum((1, 2))
    assert errors == pytest.approx([one["squared_error"] for one in found], rel=0.01)  # pixels are rounded


def test_scenes_are_made_of_whole_garments_that_do_not_overlap(data: Path, tmp_path: Path) -> None:
    found = ready(None, data / SCENES)
    rows = open_split(found, "test", None).gather(np.arange(16))
    boxes, classes = rows["boxes"].tolist(), rows["classes"].tolist()
    assert {len(some) for some in boxes} <= {1, 2, 3, 4}
    for image, mask, some, labels in zip(rows["image"], rows["mask"], boxes, classes, strict=True):
        painted = np.zeros_like(mask)
        for (left, top, right, bottom), label in zip(some, labels, strict=True):
            inside = np.s_[int(top) : int(bottom), int(left) : int(right)]
            assert not painted[inside].any()
            painted[inside] = mask[inside]
            assert set(np.unique(mask[inside])) <= {0, label + 1}
            edges = mask[inside][0], mask[inside][-1], mask[inside][:, 0], mask[inside][:, -1]
            assert all(edge.any() for edge in edges)
        assert np.array_equal(painted, mask)
        assert np.array_equal(mask > 0, image > 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTDL_CACHE", str(data / "cache"))
        scenes_script().compose(str(data / GARMENTS), tmp_path / "again", {"train": 48, "test": 16}, seed=7)
    assert ready(None, tmp_path / "again").info.fingerprint == found.info.fingerprint
