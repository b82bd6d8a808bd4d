"""Small datasets of sequences, and what a person might train on them: tasks that count, transforms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.data import Ragged
from distdl.data.prepare.options import Options
from distdl.data.prepare.run import prepare
from distdl.tasks import Batch, Rows
from examples.own_sequences.task import Classify, NextToken

VOCABULARY = 50
ROWS = {"a": (163, 37), "b": (71, 20)}
"""Rows of split train and of split test; no multiple of anything."""

Columns = dict[str, Any]


def write_source(folder: Path, splits: dict[str, Columns]) -> Path:
    """A folder of Parquet files, one a split."""
    folder.mkdir(parents=True)
    for split, columns in splits.items():
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    return folder


def make(folder: Path, splits: dict[str, Columns], **options: Any) -> Path:
    """The prepared dataset of these columns, in `folder`/data."""
    source = write_source(folder / "source", splits)
    prepare(str(source), folder / "data", Options(**{"shards": 3, **options}))
    return folder / "data"


def sequences(rows: int, seed: int, first_id: int) -> Columns:
    """`rows` rows: an id, tokens and a series of 1 to 24 items, a series of 12, and a class."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(0.12, rows), 24)
    tokens = [rng.integers(2, VOCABULARY, n, dtype=np.int32).tolist() for n in lengths]
    series = [rng.normal(size=n).astype(np.float32).tolist() for n in lengths]
    fixed = rng.normal(size=rows * 12).astype(np.float32)
    return {
        "id": np.arange(first_id, first_id + rows),
        "tokens": pa.array(tokens, pa.list_(pa.int32())),
        "series": pa.array(series, pa.list_(pa.float32())),
        "fixed": pa.FixedSizeListArray.from_arrays(pa.array(fixed), 12),
        "label": [("even", "odd")[sum(t) % 2] for t in tokens],
    }


def make_sequences(folder: Path) -> dict[str, str]:
    """Both datasets: name -> folder. No id is in both."""
    found = {}
    for number, (name, (train, test)) in enumerate(ROWS.items()):
        splits = {
            "train": sequences(train, number, 1000 * number),
            "test": sequences(test, 7 + number, 1000 * number + 500),
        }
        found[name] = str(make(folder / name, splits, classes=("label",)))
    return found


# --- tasks ---


class Ids(Classify):
    """Keeps the ids of its rows, and counts those evaluated."""

    def collate(self, rows: Rows) -> Batch:
        return {**super().collate(rows), "ids": torch.from_numpy(rows["id"])}

    def metric_sums(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, int]]:
        ids = batch["ids"]  # the second of each pair 0: the sum itself is the metric
        return {**super().metric_sums(model, batch), "rows": (len(ids), 0), "ids": (int(ids.sum()), 0)}


class Next(NextToken):
    """Counts the targets evaluated, and sums them up."""

    def metric_sums(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, int]]:
        targets = batch["tokens"][:, 1:][batch["real"]]
        counted = {"targets": (len(targets), 0), "tokens": (int(targets.sum()), 0)}
        return {**super().metric_sums(model, batch), **counted}


class Curve(Ids):
    """Classifies a series, of one length or of several."""

    def collate(self, rows: Rows) -> Batch:
        found = rows[self._tokens]
        varies = isinstance(found, Ragged)
        values = found.padded(0) if varies else found
        lengths = found.lengths.copy() if varies else np.full(len(found), found.shape[1])
        return {
            "tokens": torch.from_numpy(values),
            "lengths": torch.from_numpy(lengths),
            "labels": torch.from_numpy(rows[self._label].astype(np.int64)),
            "ids": torch.from_numpy(rows["id"]),
        }


class Waves(nn.Module):
    """Mean over a series of a few features of each value -> logits."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.features = nn.Linear(1, 8)
        self.head = nn.Linear(8, num_outputs)

    def forward(self, series: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(series.shape[1]) < lengths[:, None]
        found = functional.silu(self.features(series[:, :, None])) * real[:, :, None]
        logits: Tensor = self.head(found.sum(1) / lengths[:, None])
        return logits


# --- transforms ---


def swap_tokens(rows: Columns, key: int) -> Columns:
    """Other tokens in the place of a fifth of them."""
    rng = np.random.default_rng(key)
    tokens = rows["tokens"]
    other = rng.integers(2, VOCABULARY, len(tokens.values), dtype=tokens.values.dtype)
    values = np.where(rng.random(len(other)) < 0.2, other, tokens.values)
    return {**rows, "tokens": replace(tokens, values=values)}


def roll_images(rows: Columns, key: int) -> Columns:
    """All images of a microbatch moved sideways."""
    return {**rows, "image": np.roll(rows["image"], key % 5, axis=2)}


def lose_a_row(rows: Columns, key: int) -> Columns:
    """One row less than given."""
    return {name: column.rows(0, len(column) - 1) if isinstance(column, Ragged) else column[:-1]
            for name, column in rows.items()}  # fmt: skip


def lose_a_label(rows: Columns, key: int) -> Columns:
    """One column is a row short."""
    return {**rows, "label": rows["label"][:-1]}


def forget_to_return(rows: Columns, key: int) -> None:
    """Changes nothing, gives nothing back."""
