"""Text classification, and the sentences that come with the package."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.data.description import describe_data
from distdl.data.feed import Feed
from distdl.data.index import hash_file, read_index
from distdl.data.prepare.options import Options
from distdl.data.prepare.run import prepare
from distdl.data.prepare.tokenize import decode
from distdl.data.table.ragged import Ragged
from distdl.errors import DataError, RecipeError
from distdl.models import model_factory
from distdl.plan import make_plan
from distdl.recipe import load_recipe
from distdl.samples import DataInfo, Field
from distdl.tasks import Task, build_task
from distdl.topology import Topology

FIELDS = {"text": Field("int32", (None,), None, 9), "label": Field("int64", (), 3)}
CONFIG = Path(__file__).resolve().parents[3] / "configs" / "sentiment_lstm.yaml"


def data(fields: dict[str, Field] | None = None) -> DataInfo:
    return DataInfo("lines", {"train": 1}, FIELDS if fields is None else fields, "f")


class Asked:
    """A model factory that notes what it is asked for; its model averages real tokens."""

    def __call__(self, **given: Any) -> nn.Module:
        self.seen = given
        return Bag(given["vocabulary"], given["num_outputs"])


class Bag(nn.Module):
    def __init__(self, vocabulary: int, classes: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, classes)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(tokens.shape[1]) < lengths[:, None]
        total: Tensor = (self.table(tokens) * real[..., None]).sum(1)
        return total / lengths.clamp(min=1)[:, None]


def ragged(*rows: list[int]) -> Ragged:
    values = np.array([token for row in rows for token in row], np.int32)
    return Ragged(values, np.array([len(row) for row in rows], np.int64))


def task(**keys: Any) -> Task:
    return build_task("text_classification", keys, Asked(), data())


def test_collate_pads_and_says_how_long() -> None:
    rows = {"text": ragged([5, 6, 7], [8], []), "label": np.array([0, 2, 1])}
    batch = task().collate(rows)
    assert batch["tokens"].tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]]
    assert batch["lengths"].tolist() == [3, 1, 0]
    assert batch["labels"].tolist() == [0, 2, 1]
    assert {t.dtype for t in batch.values()} == {torch.int64}
    assert task().count(batch) == 3
    empty = task().collate({"text": ragged([], []), "label": np.array([0, 2])})
    assert empty["tokens"].shape == (2, 1)


def test_its_padding_is_what_joins_batches_of_different_widths() -> None:
    torch.manual_seed(0)
    whole, label = [[5, 6, 7], [8], [1, 2, 3, 4]], [0, 2, 1]
    mine: Any = task()
    model = mine.build_model()
    together = mine.collate({"text": ragged(*whole), "label": np.array(label)})
    parts = [
        mine.collate({"text": ragged(*whole[a:b]), "label": np.array(label[a:b])})
        for a, b in ((0, 2), (2, 3))
    ]
    assert set(mine.padding) == {"tokens"}
    pads = [
        functional.pad(p["tokens"], (0, 4 - p["tokens"].shape[1]), value=mine.padding["tokens"])
        for p in parts
    ]
    assert torch.equal(torch.cat(pads), together["tokens"])
    torch.testing.assert_close(
        sum(mine.loss_sum(model, p) for p in parts), mine.loss_sum(model, together), atol=1e-6, rtol=0
    )


def test_losses_and_metrics_are_sums() -> None:
    torch.manual_seed(0)
    smoothed = task(label_smoothing=0.1)
    model = smoothed.build_model()
    batch = smoothed.collate({"text": ragged([5, 6], [8], [1]), "label": np.array([0, 2, 1])})
    logits = model(batch["tokens"], batch["lengths"])
    mean = functional.cross_entropy(logits, batch["labels"], label_smoothing=0.1)
    torch.testing.assert_close(smoothed.loss_sum(model, batch), mean * 3)
    with torch.no_grad():
        metrics = smoothed.metric_sums(model, batch)
    assert metrics["accuracy"] == (int((logits.argmax(1) == batch["labels"]).sum()), 3)
    plain = float(functional.cross_entropy(logits.detach(), batch["labels"], reduction="sum"))
    assert metrics["loss"] == (pytest.approx(plain), 3)


def test_the_model_hears_how_many_tokens_and_classes() -> None:
    asked = Asked()
    build_task("text_classification", {}, asked, data()).build_model()
    assert asked.seen == {"vocabulary": 9, "num_outputs": 3}
    unsaid = data({**FIELDS, "text": replace(FIELDS["text"], vocabulary=None)})
    build_task("text_classification", {"vocabulary": 40}, asked, unsaid).build_model()
    assert asked.seen["vocabulary"] == 40
    with pytest.raises(DataError, match=r"does not say how many.*'text'.*task.vocabulary"):
        build_task("text_classification", {}, asked, unsaid)
    with pytest.raises(RecipeError, match=r"task.vocabulary = 8: .* has 9 different"):
        task(vocabulary=8)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"text": FIELDS["text"]},
        {"text": Field("string"), "label": FIELDS["label"]},
        {"text": Field("float32", (None,)), "label": FIELDS["label"]},
        {"en": FIELDS["text"], "de": FIELDS["text"], "label": FIELDS["label"]},
    ],
)
def test_columns_that_do_not_suit(fields: dict[str, Field]) -> None:
    with pytest.raises(DataError, match="one column of token ids") as caught:
        build_task("text_classification", {}, Asked(), data(fields))
    assert all(name in str(caught.value) for name in fields)


def test_an_index_says_how_many_tokens_there_are(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"text": text, "kind": k}) + "\n" for text, k in [("a b a", 0), ("b c a", 1)])
    )
    options = Options(tokenize=("text",), tokenizer="word", min_count=1)
    index = prepare(str(tmp_path / "train.jsonl"), tmp_path / "out", options)
    assert index.vocabulary == {"text": 4 + 3}
    fields = index.info().fields
    assert (fields["text"].vocabulary, fields["kind"].vocabulary) == (7, None)


def test_the_sentences_are_whole_and_need_no_preparation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTDL_CACHE", str(tmp_path / "none"))
    recipe = load_recipe(CONFIG)
    info = describe_data(recipe.data)
    assert dict(info.rows) == {"train": 9504, "test": 1064}
    assert info.fields["label"].num_classes == 2
    # It is compared at every resume: a change breaks runs that exist.
    assert info.fingerprint == "7d241fc21c0380a4077b40d446fb08c9"
    ready = Feed.open(recipe.data).parts[0]
    assert ready.index is not None
    assert all(hash_file(ready.folder / file.file) == file.hash for file in ready.index.files())
    assert "cjhutto" in (ready.folder / "LICENSE").read_text()
    assert sum(f.stat().st_size for f in ready.folder.rglob("*") if f.is_file()) < 2e6
    assert make_plan(recipe, Topology.of(1, 8), info).order == "length_bucketed"
    assert not (tmp_path / "none").exists()


def test_the_sentences_and_their_source_agree() -> None:
    import pyarrow.parquet as pq

    feed = Feed.open(load_recipe(CONFIG).data)
    folder = feed.parts[0].folder
    tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    assert read_index(folder).vocabulary == {"text": len(json.loads(tokenizer)["model"]["vocab"])}
    texts = {
        split: pq.read_table(folder / "text" / f"{split}.parquet").to_pydict() for split in ("train", "test")
    }
    lowered = {split: {t.lower() for t in found["text"]} for split, found in texts.items()}
    assert not lowered["train"] & lowered["test"]
    rows = feed.rows("test").gather(np.arange(5))
    assert rows["label"].tolist() == texts["test"]["label"][:5]
    for ids, text in zip(rows["text"].tolist(), texts["test"]["text"], strict=False):
        known = [w for w in decode(tokenizer, ids).split() if w != "<unk>"]
        assert known
        assert all(word in text.lower() for word in known)


def test_an_lstm_learns_the_sentences() -> None:
    recipe = load_recipe(CONFIG, ["model.hidden=8", "model.embedding=16", "model.dropout=0.0"])
    feed = Feed.open(recipe.data)
    mine = build_task("text_classification", {}, model_factory("lstm", recipe.model.options()), feed.info)
    torch.manual_seed(0)
    model = mine.build_model()
    batch = mine.collate(feed.rows("train").gather(np.arange(32)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(15):
        optimizer.zero_grad()
        (mine.loss_sum(model, batch) / mine.count(batch)).backward()
        optimizer.step()
    with torch.no_grad():
        assert mine.metric_sums(model, batch)["accuracy"][0] >= 30


@pytest.mark.parametrize(
    ("tokens", "label", "says"),
    [
        ([5, 9], 0, r"column 'text' has tokens from 5 to 9, and a vocabulary of 9"),
        ([-1, 5], 0, r"column 'text' has tokens from -1 to 5"),
        ([5], -1, r"column 'label' has labels from -1 to -1, and 3 classes.*kept secret"),
        ([5], 3, r"column 'label' has labels from 3 to 3, and 3 classes, 0 to 2"),
    ],
)
def test_tokens_and_labels_that_are_none_are_named(tokens: list[int], label: int, says: str) -> None:
    with pytest.raises(DataError, match=says):
        task().collate({"text": ragged(tokens), "label": np.array([label])})
