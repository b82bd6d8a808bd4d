"""Segmentation, detection, reconstruction, mixup and CutMix against plain computations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.data import Ragged
from distdl.errors import DataError, RecipeError
from distdl.models.layers import average_pool
from distdl.samples import DataInfo, Field
from distdl.tasks import build_task
from distdl.tasks.centres import detections, maps, radius
from distdl.tasks.classes import class_predictions
from distdl.tasks.coco import average_precision
from distdl.tasks.mixing import blend

SHAPE = (12, 8)
SCENES = {
    "image": Field("uint8", SHAPE),
    "mask": Field("uint8", SHAPE),
    "boxes": Field("float", (None, 4)),
    "classes": Field("int64", (None,)),
}


def info(**fields: Field) -> DataInfo:
    return DataInfo("scenes", {"train": 10, "test": 10}, SCENES | fields, "0" * 32)


def task_of(name: str, model: nn.Module | None = None, data: DataInfo | None = None, **keys: Any) -> Any:
    return build_task(name, keys, lambda **said: model or nn.Identity(), data or info())


class Says(nn.Module):
    """Answers what it was given, whatever it is asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: Tensor) -> Tensor:
        return self.answer


# --- segmentation ---


def masks(seed: int, n: int, classes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    found = np.random.default_rng(seed).integers(0, classes, (n, *SHAPE), dtype=np.uint8)
    found[:, 0, :3] = 255
    return found


def test_segmentation_counts_pixels_and_measures_what_a_plain_computation_does() -> None:
    task = task_of("segmentation", num_classes=4)
    found, truths, guesses = [], [], []
    for seed in range(3):
        rows = {"image": np.zeros((2, *SHAPE), np.uint8), "mask": masks(seed, 2, 3)}
        batch = task.collate(rows)
        logits = torch.randn(2, 4, *SHAPE, generator=torch.Generator().manual_seed(seed))
        logits[:, 3] -= 99  # class 3 is never there and never found
        loss = task.loss_sum(Says(logits), batch)
        plain = functional.cross_entropy(logits, batch["masks"].long(), ignore_index=255, reduction="sum")
        torch.testing.assert_close(loss, plain)
        assert task.count(batch) == 2 * (12 * 8 - 3)
        found.append(task.measure(Says(logits), batch))
        truths.append(batch["masks"].numpy())
        guesses.append(logits.argmax(1).numpy())
    truth, guess = np.concatenate(truths), np.concatenate(guesses)
    real = truth != 255
    ious, dices = [], []
    for label in range(3):
        a, b = (truth == label) & real, (guess == label) & real
        ious.append((a & b).sum() / (a | b).sum())
        dices.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    metrics = task.metrics(found)
    assert metrics["miou"] == pytest.approx(np.mean(ious))
    assert metrics["dice"] == pytest.approx(np.mean(dices))
    assert metrics["accuracy"] == pytest.approx((truth == guess)[real].mean())
    assert metrics["loss"] == pytest.approx(sum(one["loss"] for one in found) / real.sum())


def test_a_mask_with_a_class_too_many_is_refused() -> None:
    rows = {"image": np.zeros((2, *SHAPE), np.uint8), "mask": masks(0, 2, 4)}
    with pytest.raises(DataError, match=r"'mask' has class 3; task.num_classes is 3.*from 0 to 2"):
        task_of("segmentation", num_classes=3).collate(rows)
    with pytest.raises(DataError, match=r"'mask'.*uint8 \[6, 8\]; expected uint8 \[12, 8\]"):
        task_of("segmentation", data=info(mask=Field("uint8", (6, 8))), num_classes=3)
    with pytest.raises(DataError, match=r"the task asks for column 'msk'.*did you mean 'mask'"):
        task_of("segmentation", num_classes=3, mask="msk")


# --- detection ---

BOXES = [[[0, 0, 4, 6], [2, 5, 8, 11]], [], [[1, 1, 7, 9]]]
CLASSES = [[1, 0], [], [1]]


def scenes(boxes: list[Any] = BOXES, classes: list[Any] = CLASSES) -> dict[str, Any]:
    flat = np.array([box for some in boxes for box in some], np.float32).reshape(-1, 4)
    labels = np.array([label for some in classes for label in some], np.int64)
    return {
        "image": np.zeros((len(boxes), *SHAPE), np.uint8),
        "boxes": Ragged(flat, np.array([len(some) for some in boxes], np.int64)),
        "classes": Ragged(labels, np.array([len(some) for some in classes], np.int64)),
    }


def perfect(batch: dict[str, Tensor]) -> Tensor:
    """What a model would have to say."""
    return torch.cat([torch.where(batch["heat"] == 1, 20.0, -20.0), batch["geometry"]], 1)


def test_what_is_taught_is_what_is_decoded() -> None:
    task = task_of("detection", num_classes=2, max_objects=5)
    batch = task.collate(scenes())
    assert (batch["images"].shape, batch["heat"].shape) == ((3, 1, *SHAPE), (3, 2, 3, 2))
    assert task.count(batch) == 3
    model = Says(perfect(batch))
    assert float(task.loss_sum(model, batch)) == pytest.approx(0, abs=1e-4)
    found = task.measure(model, batch)
    for (seen, there), boxes, classes in zip(found, BOXES, CLASSES, strict=True):
        sized = [[left, top, right - left, bottom - top] for left, top, right, bottom in boxes]
        assert (there["boxes"], there["classes"]) == (sized, classes)
        objects = zip(seen["scores"], seen["classes"], seen["boxes"], strict=True)
        kept = [(label, box) for score, label, box in objects if score > 0.5]
        assert sorted(kept) == sorted(zip(classes, sized, strict=True))
    assert task.metrics([found[:2], found[2:]]) == {"map": 1.0, "map_50": 1.0, "map_75": 1.0}


def test_a_box_that_is_turned_inside_out_is_a_wrong_one() -> None:
    """COCO's measure would leave out an area below nothing, and so not count it."""
    task = task_of("detection", num_classes=2, min_score=0.5)
    batch = task.collate(scenes([[[0, 0, 4, 6]]], [[1]]))
    output = perfect(batch)
    output[0, 1].clamp_(max=2.0)
    output[0, 1, 2, 1] = 4.0  # surer than the right one
    metrics = []
    for width in (1.0, -1.0):
        output[0, 2:, 2, 1] = torch.tensor([0.5, 0.5, width, 1.0])
        metrics.append(task.metrics([task.measure(Says(output), batch)]))
    assert metrics[0] == metrics[1]
    assert 0 < metrics[1]["map_50"] < 1
    output[0, 2:, 2, 1] = torch.tensor([0.5, 0.5, 50.0, 1.0])
    surest = task.predict(Says(output), batch)[0]["objects"][0]
    assert surest["box"] == [0.0, 8.0, 8.0, 12.0]  # no further than the 12 rows and 8 columns


def test_the_loss_of_detection_is_a_sum_over_images() -> None:
    task = task_of("detection", num_classes=2)
    batch = task.collate(scenes())
    output = torch.randn(3, 6, 3, 2, generator=torch.Generator().manual_seed(1))
    whole = task.loss_sum(Says(output), batch)
    parts = [
        task.loss_sum(Says(output[i : i + 1]), {k: t[i : i + 1] for k, t in batch.items()}) for i in range(3)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)
    expected = 0.0
    for n in range(3):  # equation 1, and absolute errors at centres, element by element
        for row, column in np.ndindex(3, 2):
            centre = False
            for label in range(2):
                heat, p = (
                    float(batch["heat"][n, label, row, column]),
                    float(output[n, label, row, column].sigmoid()),
                )
                centre |= heat == 1
                expected -= (1 - p) ** 2 * np.log(p) if heat == 1 else (1 - heat) ** 4 * p**2 * np.log(1 - p)
            if centre:
                error = (output[n, 2:, row, column] - batch["geometry"][n, :, row, column]).abs()
                expected += float(error[:2].sum() + 0.1 * error[2:].sum())
    assert float(whole) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("width", "height"), [(28, 28), (10, 28), (3, 90)])
def test_a_box_shifted_by_the_radius_still_overlaps(width: float, height: float) -> None:
    r = radius(width, height)

    def overlap(a: float, b: float) -> float:
        """Intersection over union after the corners moved by a and b, right and down."""
        w, h = width - a + b, height - a + b
        both = (min(width, width + b) - max(0, a)) * (min(height, height + b) - max(0, a))
        return both / (width * height + w * h - both)

    worst = min(overlap(a, b) for a in (-r, r) for b in (-r, r))
    assert worst == pytest.approx(0.7)


def test_heat_is_one_at_the_centre_and_falls_off_around_it() -> None:
    boxes = [np.array([[8, 8, 40, 40]], np.float32)]
    heat, geometry = maps(boxes, [np.array([1])], 2, (48, 50))
    assert heat.shape == (1, 2, 12, 13)
    assert heat[0, 1, 6, 6] == 1
    assert not heat[0, 0].any()
    assert 0 < heat[0, 1, 6, 8] < heat[0, 1, 6, 7] == heat[0, 1, 5, 6] < 1
    assert geometry[0, :, 6, 6].tolist() == [0, 0, 8, 8]
    assert np.count_nonzero(geometry) == 2


def test_average_precision_by_hand() -> None:
    """Three objects of one class; found are one, a false one, another. Precision is 1 up to recall 1/3, then
    2/3 up to 2/3, then 0; it is read at 101 recalls."""
    truth = [{"boxes": [[0, 0, 10, 10], [20, 20, 10, 10], [40, 40, 10, 10]], "classes": [3, 3, 3]}]
    seen = {
        "boxes": [[0, 0, 10, 10], [60, 0, 10, 10], [20, 20, 10, 10]],
        "classes": [3, 3, 3],
        "scores": [0.9, 0.8, 0.7],
    }
    expected = (34 * 1 + 33 * 2 / 3) / 101
    assert average_precision(truth, [seen], 100) == pytest.approx(
        {"map": expected, "map_50": expected, "map_75": expected}
    )
    shifted = seen | {"boxes": [[0, 0, 10, 7], [60, 0, 10, 10], [20, 20, 10, 7]]}  # IoU 0.7
    found = average_precision(truth, [shifted], 100)
    assert found["map_50"] == pytest.approx(expected)
    assert found["map_75"] == 0
    assert found["map"] == pytest.approx(expected * 5 / 10)  # 0.50 to 0.70
    nothing = {"boxes": [], "classes": [], "scores": []}
    assert average_precision(truth, [nothing], 100)["map"] == 0
    assert average_precision([{"boxes": [], "classes": []}], [nothing], 100)["map"] == 0


@pytest.mark.parametrize(
    ("boxes", "classes", "says"),
    [
        (
            [[[0, 0, 4, 4]]],
            [[2]],
            "classes reach from 2 to 2; task.num_classes is 2, so they have to be 0 to 1",
        ),
        ([[[0, 0, np.nan, 4]]], [[0]], r"box \[0.0, 0.0, nan, 4.0\] is empty, or not finite"),
        ([[[4, 0, 4, 4]]], [[0]], r"box \[4.0, 0.0, 4.0, 4.0\] is empty"),
        ([[[0, 0, 4, 4]]], [[0, 1]], "a row has 1 boxes and 2 classes"),
        ([[[0, 0, 4, 4]] * 6], [[0] * 6], "a row has 6 objects; set task.max_objects to that or more"),
    ],
)
def test_objects_that_cannot_be_learnt_are_refused(boxes: Any, classes: Any, says: str) -> None:
    task = task_of("detection", num_classes=2, max_objects=5)
    with pytest.raises(DataError, match=f"columns 'boxes' and 'classes': {says}"):
        task.collate(scenes(boxes, classes))


def test_columns_and_models_that_do_not_suit_detection() -> None:
    with pytest.raises(DataError, match=r"'boxes'.*float \['varies'\]; expected .* floats \[k, 4\]"):
        task_of("detection", data=info(boxes=Field("float", (None,))), num_classes=2)
    with pytest.raises(DataError, match=r"'classes'.*float \['varies'\]; expected .* integers \[k\]"):
        task_of("detection", data=info(classes=Field("float", (None,))), num_classes=2)
    task = task_of("detection", num_classes=2)
    with pytest.raises(RecipeError, match=r"gives \[3, 6, 12, 8\].*expects \[3, 6, 3, 2\]"):
        task.loss_sum(Says(torch.zeros(3, 6, *SHAPE)), task.collate(scenes()))


def test_of_neighbouring_cells_the_best_is_kept() -> None:
    output = torch.full((1, 5, 4, 4), -9.0)
    output[0, 0, 1, 1], output[0, 0, 1, 2], output[0, 0, 3, 3] = 3.0, 2.0, 1.0
    (found,) = detections(output, 1, 3)
    assert found["scores"] == pytest.approx([0.9526, 0.7311, 0], abs=1e-3)


def test_an_object_has_the_name_of_its_class() -> None:
    named = Field("int64", (None,), 2, classes=("cup", "plate"))
    task = task_of("detection", data=info(classes=named), num_classes=2)
    batch = task.collate(scenes())
    found = task.predict(Says(perfect(batch)), batch)
    assert [sorted({one["class"] for one in row["objects"]}) for row in found] == [
        ["cup", "plate"],
        [],
        ["plate"],
    ]


# --- reconstruction ---


def test_reconstruction_sums_squares_of_an_image() -> None:
    task = task_of("reconstruction", data=DataInfo("d", {}, {"image": Field("uint8", SHAPE)}, "0"))
    pixels = np.random.default_rng(0).integers(0, 256, (3, *SHAPE), dtype=np.uint8)
    batch = task.collate({"image": pixels})
    answer = torch.rand(3, 1, *SHAPE)
    plain = ((answer[:, 0].double().numpy() - pixels / 255) ** 2).sum()
    assert task.count(batch) == 3
    assert float(task.loss_sum(Says(answer), batch)) == pytest.approx(plain, rel=1e-5)
    sums = task.metric_sums(Says(answer), batch)
    assert sums["squared_error"] == (pytest.approx(plain), 3)
    assert sums["pixel_error"] == (pytest.approx(plain), 3 * 96)
    found = task.predict(Says(answer), batch)
    assert sum(one["squared_error"] for one in found) == pytest.approx(plain, rel=1e-5)
    assert np.array_equal(found[1]["image"], answer[1, 0].numpy())
    with pytest.raises(DataError, match=r"needs one uint8 image column.*image.*mask.*Name it in task.image"):
        task_of("reconstruction")


# --- mixup and CutMix ---


def test_blends_are_of_two_images_by_the_share() -> None:
    images = torch.arange(1.0, 7.0)[:, None, None, None].expand(6, 1, 10, 9).clone()
    before = images.clone()
    kinds = set()
    for seed in range(40):
        torch.manual_seed(seed)
        mixed, order, share = blend(images, 0.4, 1.0)
        assert torch.equal(images, before)
        assert sorted(order.tolist()) == list(range(6))
        own = images.mean((1, 2, 3))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), share * own + (1 - share) * own[order])
        kinds.add(bool((mixed == images).logical_or(mixed == images[order]).all()))
        torch.manual_seed(seed)
        again = blend(images, 0.4, 1.0)
        assert torch.equal(again[0], mixed)
    assert kinds == {True, False}  # pasted, and blended everywhere


@pytest.mark.parametrize("keys", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_the_loss_of_a_blend_is_that_of_both_labels(keys: dict[str, float]) -> None:
    fields = {"image": Field("uint8", SHAPE), "label": Field("int64", (), 5)}
    model = nn.Sequential(nn.Flatten(), nn.Linear(96, 5))
    task = task_of("image_classification", model, DataInfo("d", {}, fields, "0"), label_smoothing=0.1, **keys)
    rng = np.random.default_rng(0)
    rows = {"image": rng.integers(0, 256, (7, *SHAPE), dtype=np.uint8), "label": rng.integers(0, 5, 7)}
    batch = task.collate(rows)
    torch.manual_seed(3)
    loss = task.loss_sum(model, batch)
    torch.manual_seed(3)
    mixed, order, share = blend(batch["images"], keys.get("mixup", 0), keys.get("cutmix", 0))
    one_hot = functional.one_hot(batch["labels"], 5).float()
    target = share * one_hot + (1 - share) * one_hot[order]
    plain = functional.cross_entropy(model(mixed), target, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(loss, plain)
    with torch.no_grad():
        assert task.metric_sums(model, batch) == task.metric_sums(model, batch)  # nothing is blended there


def test_images_of_many_channels_are_refused_not_taken_for_rows() -> None:
    with pytest.raises(DataError, match=r"images of \[13, 12, 8\]: expected .* up to four channels"):
        task_of(
            "reconstruction", data=DataInfo("x", {"train": 1}, {"image": Field("uint8", (13, 12, 8))}, "f")
        )


def test_outputs_beyond_the_classes_are_no_answer() -> None:
    (found,) = class_predictions(torch.tensor([[0.0, 1.0, 9.0]]), ("shirt", "coat"))
    assert found == {"class": "coat", "probability": pytest.approx(torch.tensor([0.0, 1.0]).softmax(0)[1])}


@pytest.mark.parametrize("size", [(2, 2), (3, 5), (7, 7), (9, 8)])
def test_average_pool_is_that_of_torch(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True)
    found, expected = average_pool(x, size), functional.adaptive_avg_pool2d(x, size)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    torch.testing.assert_close(*(torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected)))
