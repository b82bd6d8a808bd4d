"""Transcription: strings, their loss, and how wrong a string is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from distdl.data.table.ragged import Ragged
from distdl.errors import DataError, RecipeError
from distdl.models import model_factory
from distdl.recipe.schema import Augment
from distdl.samples import DataInfo, Field
from distdl.tasks import build_task
from distdl.tasks.transcription import edit_distance
from distdl.train.batches import augmentation

FIELDS = {"image": Field("uint8", (16, 24)), "digits": Field("int32", (None,), None, 5)}


def task(fields: dict[str, Field] | None = None) -> Any:
    info = DataInfo("strings", {"train": 1}, FIELDS if fields is None else fields, "f")
    return build_task("transcription", {}, model_factory("crnn_ctc", {"width": 4, "hidden": 8}), info)


def rows(strings: list[list[int]]) -> dict[str, Any]:
    """Symbol s is a bar of brightness 50 * s at its place."""
    image = np.zeros((len(strings), 16, 24), np.uint8)
    for picture, string in zip(image, strings, strict=True):
        for place, symbol in enumerate(string):
            picture[:, place * 8 + 2 : place * 8 + 6] = 50 * (symbol + 1)
    values = np.array([s for string in strings for s in string], np.int32)
    return {"image": image, "digits": Ragged(values, np.array([len(s) for s in strings], np.int64))}


STRINGS = [[0, 1, 2], [4], [3, 3], [], [2, 0, 4], [1, 1, 1]]


@torch.no_grad()
def test_the_loss_is_the_sum_over_rows_and_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    mine = task()
    model = mine.build_model().eval()
    batch = mine.collate(rows(STRINGS))
    assert mine.count(batch) == 6
    assert model(batch["images"]).shape == (6, 24 // 4, 6)
    each = [float(mine.loss_sum(model, mine.collate(rows([s])))) for s in STRINGS]
    assert float(mine.loss_sum(model, batch)) == pytest.approx(sum(each), rel=1e-5)
    # Of the empty string: blanks, which are the last logit, at every step.
    blank = model(mine.collate(rows([[]]))["images"]).log_softmax(2)[0, :, 5]
    assert each[3] == pytest.approx(-float(blank.sum()), rel=1e-5)


def test_it_learns_and_measures_whole_strings_and_edits() -> None:
    torch.manual_seed(0)
    mine = task()
    model = mine.build_model()
    batch = mine.collate(rows(STRINGS))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        (mine.loss_sum(model, batch) / 6).backward()
        optimizer.step()
    with torch.no_grad():
        assert mine.metric_sums(model, batch)["accuracy"] == (6, 6)
        other = {**batch, "symbols": batch["symbols"].clone()}
        other["symbols"][0, 1] = 4
        metrics = mine.metric_sums(model, other)
    assert metrics["accuracy"] == (5, 6)
    assert metrics["error_rate"] == (1, 12)


def test_repeats_are_one_symbol_unless_a_blank_stands_between() -> None:
    best = torch.tensor([[5, 2, 2, 5, 2, 3, 3], [1, 1, 1, 1, 1, 1, 1]])
    batch = {"symbols": torch.tensor([[2, 2, 3], [1, 1, 0]]), "lengths": torch.tensor([3, 2]), "images": None}
    metrics = task().metric_sums(lambda _: functional.one_hot(best, 6).float(), batch)
    assert metrics["accuracy"] == (1, 2)
    assert metrics["error_rate"] == (1, 5)


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("ab", "ba", 2), ("a", "a", 0)],
)
def test_edits(a: str, b: str, edits: int) -> None:
    assert edit_distance([*map(ord, a)], [*map(ord, b)]) == edits


def test_data_that_do_not_suit() -> None:
    with pytest.raises(DataError, match=r"one column of token ids; dataset 'strings' has image"):
        task({"image": FIELDS["image"]})


@torch.no_grad()
def test_predictions_are_the_strings_that_are_measured() -> None:
    torch.manual_seed(0)
    mine = task()
    batch = mine.collate(rows(STRINGS))
    # Blank (5) parts what is alike; what is not parted is one.
    steps = [
        [5, 0, 0, 5, 1, 2],
        [4, 4, 4, 4, 4, 4],
        [3, 5, 3, 3, 5, 5],
        [5] * 6,
        [2, 2, 0, 0, 4, 4],
        [1, 5] * 3,
    ]
    logits = functional.one_hot(torch.tensor(steps), 6).float()
    found = mine.predict(lambda images: logits, batch)
    assert [one["symbols"] for one in found] == STRINGS
    assert mine.metric_sums(lambda images: logits, batch)["accuracy"] == (6, 6)


SOUND = {"audio": Field("halffloat", (None, 16)), "digits": FIELDS["digits"]}


def heard(strings: list[list[int]]) -> dict[str, Any]:
    """Symbol s is 8 frames in which bands 3 s to 3 s + 2 are loud; between two are 4 of silence."""
    frames, lengths = [np.zeros((0, 16), np.float16)], []
    for string in strings:
        one = np.zeros((12 * len(string) + 5, 16), np.float16)
        for place, symbol in enumerate(string):
            one[12 * place + 4 : 12 * place + 12, 3 * symbol : 3 * symbol + 3] = 4
        frames.append(one)
        lengths.append(len(one))
    audio = Ragged(np.concatenate(frames), np.array(lengths, np.int64))
    return {"audio": audio, "digits": rows(strings)["digits"]}


@torch.no_grad()
def test_what_fills_up_the_short_sounds_changes_nothing_of_them() -> None:
    torch.manual_seed(0)
    mine = task(SOUND)
    model = mine.build_model().train()  # no statistic of a batch enters, in training either
    batch = mine.collate(heard(STRINGS))
    logits, steps = model(batch["series"], batch["series_lengths"])
    assert logits.shape == (6, 41 // 4, 6)
    assert steps.tolist() == [(12 * len(s) + 5) // 4 for s in STRINGS]
    for row, string in enumerate(STRINGS):
        alone = mine.collate(heard([string]))
        its, (its_steps,) = model(alone["series"], alone["series_lengths"])
        assert its_steps == steps[row]
        torch.testing.assert_close(logits[row, : steps[row]], its[0], atol=1e-5, rtol=1e-4)
    each = [float(mine.loss_sum(model, mine.collate(heard([s])))) for s in STRINGS]
    assert float(mine.loss_sum(model, batch)) == pytest.approx(sum(each), rel=1e-4)
    # Whatever stands beyond the rows.
    other = {**batch, "series": batch["series"].clone()}
    other["series"][3, 5:] = 100.0
    assert float(mine.loss_sum(model, other)) == pytest.approx(sum(each), rel=1e-4)


def test_it_learns_to_read_sounds() -> None:
    torch.manual_seed(0)
    mine = task(SOUND)
    model = mine.build_model()
    batch = mine.collate(heard(STRINGS))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(120):
        optimizer.zero_grad()
        (mine.loss_sum(model, batch) / 6).backward()
        optimizer.step()
    with torch.no_grad():
        assert mine.metric_sums(model, batch)["accuracy"] == (6, 6)
        assert [one["symbols"] for one in mine.predict(model, batch)] == STRINGS


def test_a_row_too_short_for_its_string_is_said() -> None:
    mine = task(SOUND)
    mine.build_model()
    # 23 frames are 5 steps: enough for 5 symbols, not for 3 that are alike, with one more.
    audio = Ragged(np.ones((23, 16), np.float16), np.array([23], np.int64))
    for string, fits in (([0, 1, 2, 3, 4], True), ([1, 1, 1], True), ([1, 1, 1, 0], False), ([], True)):
        row = {"audio": audio, "digits": rows([string])["digits"]}
        if fits:
            mine.collate(row)
        else:
            with pytest.raises(DataError, match=r"it is 5 steps.*the 4 symbols.*need 6: \[1, 1, 1, 0\]"):
                mine.collate(row)
    picture = task()
    picture.build_model()
    with pytest.raises(DataError, match="it is 6 steps"):
        picture.collate(rows([[1, 2, 1, 2, 1, 2, 3]]) | {"image": np.zeros((1, 16, 24), np.uint8)})


@torch.no_grad()
def test_sounds_of_one_length_and_very_short_ones() -> None:
    torch.manual_seed(0)
    fixed = task({**SOUND, "audio": Field("float", (40, 16))})
    model = fixed.build_model()
    batch = fixed.collate({"audio": np.ones((2, 40, 16), np.float32), "digits": rows([[1], [2]])["digits"]})
    assert model(batch["series"], batch["series_lengths"])[1].tolist() == [10, 10]
    mine = task(SOUND)
    audio = Ragged(np.ones((3, 16), np.float16), np.array([1, 2], np.int64))
    batch = mine.collate({"audio": audio, "digits": rows([[1], []])["digits"]})
    assert torch.isfinite(mine.loss_sum(mine.build_model(), batch))


def test_what_the_vocabulary_and_the_model_have_no_room_for() -> None:
    with pytest.raises(DataError, match=r"'digits' has tokens from 5 to 5, and a vocabulary of 5"):
        task().collate({**rows([[4]]), "digits": Ragged(np.array([5]), np.array([1]))})
    strangers = {**FIELDS, "digits": Field("int32", (None,))}
    with pytest.raises(DataError, match=r"give task\.vocabulary"):
        task(strangers)
    info = DataInfo("strings", {"train": 1}, strangers, "f")
    assert build_task("transcription", {"vocabulary": 6}, model_factory("crnn_ctc", {}), info)
    with pytest.raises(RecipeError, match=r"a step of 4 columns of an image, and these are 3 wide"):
        task({**FIELDS, "image": Field("uint8", (16, 3))}).build_model()


def test_random_changes_to_the_strings_are_refused() -> None:
    """They are what there is to learn: the only column of varying length, and no input."""
    for augment in (Augment(token_dropout=0.5), Augment(jitter=0.5)):
        recipe: Any = SimpleNamespace(data=SimpleNamespace(augment=augment))
        plan: Any = SimpleNamespace(sequence="digits")
        with pytest.raises(RecipeError, match=r"would change column 'digits', .* predicts from image"):
            augmentation(recipe, plan, task())
